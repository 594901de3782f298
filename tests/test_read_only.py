"""Folders that may be read and not written, as a command finds them.

Who runs the tests as root may write anywhere; the command runs without that right.
"""

import ctypes
import os
import subprocess
import sys

import pytest

from tests import pictures

DROP = 24  # PR_CAPBSET_DROP of Linux: what the next program may not have
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # to pass by a file's permissions


def obey_permissions():
    if os.getuid() == 0:
        for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
            if ctypes.CDLL(None).prctl(DROP, capability, 0, 0, 0):
                raise OSError("root is not to be bound here")


def train(*options, cwd, home):
    root = os.path.abspath(".")
    return subprocess.run(
        [
            *(sys.executable, "-m", "train", f"--config={root}/configs/photos.py"),
            *("--config.model=small_resnet", "--config.head.init=random"),
            *("--config.phases=('head',)", "--config.picture_phases=()"),
            *("--config.head.num_epochs=1", "--config.tensorboard=False"),
            *options,
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, "HOME": str(home)},
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """Pictures, and a home, that nobody may write to."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = pictures.fill(tmp_path / "photos", number=20)
    (tmp_path / "home").mkdir()
    paths = [folder, *folder.iterdir(), tmp_path / "home"]
    for path in paths:
        path.chmod(0o555)
    yield folder
    for path in paths:
        path.chmod(0o755)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_pictures_that_may_only_be_read_are_learned_from(locked, tmp_path):
    options = "--config.data=photos", "--workdir=run"
    done = train(*options, cwd=tmp_path, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "models" / "head.npz").exists()
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_workdir_that_may_not_be_written_is_one_line(locked, tmp_path):
    run = tmp_path / "home" / "run"
    options = "--config.data=photos", f"--workdir={run}"
    done = train(*options, cwd=tmp_path, home=tmp_path / "home")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: cannot write to workdir {run}: Permission denied"
    ]
    assert not run.exists()
