"""Ctrl-C before a command has begun: one line and status 130, never a traceback."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

import ibsgl_jax
from ibsgl_jax.app import interrupt
from tests.layers import ROOT
from train.run.stop import SIGNALS, Stopped, on_signals

TRACED = "import time:"  # Python's own lines, one for each module that it has imported
COMMANDS = {
    "ibsgl": ("ibsgl_jax", "models"),
    "train": ("train", "--workdir=never"),
    "evaluate": ("train.evaluate", "--workdir=never"),
    "scores": ("train.scores", "--workdir=never"),
    "sweep": ("train.sweep", "--workdir=never"),
    "teachers": ("train.teachers", "--workdir=never"),
    "prepare": ("train.prepare", "never"),
    "compile": ("train.compile",),
}
CASES = [
    *((name, module) for name in ("ibsgl", "train") for module in ("jaxlib", "chex")),
    *((name, "numpy") for name in COMMANDS),
    ("ibsgl", "flax"),
]
# The flags are read next, and then the command begins.
LATE = [("train", "train.run.loop"), ("train", "configs.default")]


def interrupted(*command, after, cwd):
    """(status, stdout, stderr) of python -m COMMAND, interrupted after an import."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = []
    for line in process.stderr:
        if line.startswith(TRACED):
            if line.split("|")[-1].strip() == after:
                process.send_signal(signal.SIGINT)
        else:
            told.append(line)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, "".join(told)


@pytest.mark.parametrize("name, module", CASES)
def test_while_it_imports(name, module, tmp_path):
    ending = interrupted(*COMMANDS[name], after=module, cwd=tmp_path)
    assert ending == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, module", LATE)
def test_while_it_reads_the_flags(name, module, tmp_path):
    status, _, told = interrupted(*COMMANDS[name], after=module, cwd=tmp_path)
    assert status == 130
    assert len(told.splitlines()) <= 1 and "Traceback" not in told


def test_a_command_hears_as_usual():
    usual = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        interrupt.raise_on_interrupt()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # A process in the background ignores Ctrl-C, and goes on to do so.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt.exit_on_interrupt()
        interrupt.raise_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


class TestInTheMiddleOfAnImport:
    """Here of a package that swallows what comes while it is imported."""

    @pytest.fixture(autouse=True)
    def swallowing(self, tmp_path, monkeypatch):
        (tmp_path / "swallowing.py").write_text(
            "import os, time\n"
            "try:\n"
            "    os.kill(os.getpid(), int(os.environ['NUMBER']))\n"
            "    time.sleep(0.2)\n"
            "    whole = True\n"
            "except BaseException:\n"
            "    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "swallowing", raising=False)

    @pytest.mark.parametrize("number", SIGNALS)
    def test_a_run_is_stopped_afterwards(self, number, monkeypatch):
        monkeypatch.setenv("NUMBER", str(int(number)))
        with on_signals(), pytest.raises(Stopped) as stopped:
            swallowing = importlib.import_module("swallowing")
            time.sleep(60)
        assert swallowing.whole and stopped.value.number == number

    def test_a_command_is_stopped_afterwards(self, monkeypatch):
        monkeypatch.setenv("NUMBER", str(int(signal.SIGINT)))
        usual = signal.getsignal(signal.SIGINT)
        try:
            interrupt.exit_on_interrupt()
            interrupt.raise_on_interrupt()
            with pytest.raises(KeyboardInterrupt):
                swallowing = importlib.import_module("swallowing")
                time.sleep(60)
            assert swallowing.whole
        finally:
            signal.signal(signal.SIGINT, usual)


def test_the_package_imports_nothing_before_it_is_used():
    code = "import sys, ibsgl_jax.app.interrupt; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = done.stdout.split()
    assert "ibsgl_jax" in loaded and not {"jax", "numpy"} & set(loaded)


def test_what_is_no_module_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'saliencies'"):
        _ = ibsgl_jax.saliencies
    assert set(ibsgl_jax.__all__) <= set(dir(ibsgl_jax))
