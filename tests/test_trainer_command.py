"""`ibsgl train` runs from any folder, and what is installed is all of it."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibsgl_jax.app import trainer

ROOT = Path(__file__).parents[1]
INSIDE = "ibsgl_jax.trainer."


def test_every_folder_of_code_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = set()
    for top in ("ibsgl_jax", "train", "configs"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.parent.relative_to(ROOT).parts)
            there.add(name if top == "ibsgl_jax" else INSIDE + name)
    assert listed == there
    # Nothing that could be in the way of another package.
    assert {name.split(".")[0] for name in listed} == {"ibsgl_jax"}


def test_files_that_are_no_code_are_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = dict(setup["options.package_data"])
    for path in (ROOT / "train").rglob("*.html"):
        room = path.parents[1].relative_to(ROOT)
        pattern = f"{path.parent.name}/*.html"
        assert pattern in data[INSIDE + ".".join(room.parts)].split()


def test_every_command_is_there():
    for module in trainer.COMMANDS.values():
        parts = module.split(".")
        path = ROOT.joinpath(*parts)
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def ibsgl(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ibsgl_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        timeout=120,
    )


def test_a_config_of_ones_own_in_a_folder_of_ones_own(tmp_path):
    """It imports the trainer's configs; the mistake is told before anything is made."""
    (tmp_path / "mine.py").write_text(
        "from configs import photos\n\n\ndef get_config():\n"
        "    return photos.get_config()\n"
    )
    done = ibsgl("train", "--config=mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: no data: give the folder of your pictures, --config.data=FOLDER\n"
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["mine.py"]


@pytest.mark.slow
def test_the_trainers_own_config_is_found_from_anywhere(tmp_path):
    done = ibsgl(
        "train", "--config=configs/photos.py", "--config.data=gone", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/gone: no such folder\n"
    assert not list(tmp_path.iterdir())
