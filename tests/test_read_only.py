"""Folders that may be read and not written, as a command finds them.

Who runs the tests as root may write anywhere; the command runs without that right.
"""

import os
import subprocess
import sys

import pytest

from tests import pictures

# Started before the command and then it: root may not pass by a file's permissions
# (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; 24 is Linux's PR_CAPBSET_DROP). In a program
# of its own, for a process that has run JAX must not fork.
OBEYING = """
import ctypes, os, sys
if os.getuid() == 0:
    for capability in (1, 2):
        if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):
            sys.exit("root is not to be bound here")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def train(*options, cwd, home):
    root = os.path.abspath(".")
    return subprocess.run(
        [
            *(sys.executable, "-c", OBEYING),
            *("-m", "train", f"--config={root}/configs/photos.py"),
            *("--config.model=small_resnet", "--config.head.init=random"),
            *("--config.phases=('head',)", "--config.picture_phases=()"),
            *("--config.head.num_epochs=1", "--config.tensorboard=False"),
            *options,
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, "HOME": str(home)},
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
