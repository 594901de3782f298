"""The wheel: what is in it, what it says of itself, and that it works elsewhere."""

import configparser
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ibsgl_jax import attribution

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "ibsgl_jax", "train", "configs"
# The first setuptools that builds wheels by itself; the extra "test" asks for it.
OLDEST = 70, 1

pytestmark = pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < OLDEST,
    reason="pip install 'setuptools>=70.1'",
)


def run(*command, cwd, **environment):
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    options = "--no-deps", "--no-build-isolation", "--no-index"
    built = run(*pip, "wheel", ".", *options, "-w", "wheels", cwd=copy)
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "wheels").glob("ibsgl_jax-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the installed package, far from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    options = "--no-deps", "--no-index", "--target"
    done = run(*pip, "install", *options, folder, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_every_module_and_data_file_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        path.relative_to(ROOT)
        for source in SOURCES
        for path in (ROOT / source).rglob("*")
        if path.suffix in (".py", ".html", ".typed")
    }
    for path in expected:
        inside = path if path.parts[0] == "ibsgl_jax" else "ibsgl_jax/trainer" / path
        assert inside.as_posix() in names


def test_metadata_tells_what_it_is_and_every_extra(wheel):
    found = metadata(wheel)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    assert set(found.get_all("Provides-Extra")) == set(extras)
    for extra, lines in extras.items():
        required = [
            line for line in found.get_all("Requires-Dist") if f'"{extra}"' in line
        ]
        assert len(required) == len(lines.split()), extra
    for keyword in ("JAX", "saliency maps", "information bottleneck"):
        assert keyword in found["Keywords"]
    assert found["Project-URL"] == "Paper, https://bmvc2022.mpi-inf.mpg.de/605/"
    assert found["License-Expression"] or found["License"] == "Apache-2.0"
    assert found.get_payload().startswith("# ")


def test_it_serves_the_library_from_elsewhere(installed, tmp_path):
    code = (
        "import ibsgl_jax as i; print(i.__file__, len(i.attribution.METHODS), "
        "i.__version__)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    place, num_methods, version = done.stdout.split()
    assert Path(place) == installed / "ibsgl_jax" / "__init__.py"
    assert num_methods == str(len(attribution.METHODS))
    assert (installed / f"ibsgl_jax-{version}.dist-info").is_dir()


def test_it_serves_the_command_from_elsewhere(installed, tmp_path):
    command = installed / "bin" / "ibsgl"
    done = run(command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    for name in ("explain", "export", "train"):
        assert name in done.stdout
    done = run(command, "explain", "none.jpg", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 2
    assert "none.jpg" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_it_serves_the_trainer_and_a_config_of_ones_own(installed, tmp_path):
    """The configuration lies in one folder, the command runs in another."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "here").mkdir()
    own = tmp_path / "mine" / "config.py"
    own.write_text(
        "from configs import photos\n\n\ndef get_config():\n"
        "    config = photos.get_config()\n    config.guided.mu = -1.0\n"
        "    return config\n"
    )
    done = run(
        installed / "bin" / "ibsgl",
        "train",
        f"--config={own}",
        "--config.data=gone",
        cwd=tmp_path / "here",
        PYTHONPATH=str(installed),
        XLA_FLAGS="",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: 2 faults",
        "  guided.mu=-1.0: must not be negative",
        f"  {tmp_path / 'here' / 'gone'}: no such folder",
    ]
    assert not any((tmp_path / "here").iterdir())
