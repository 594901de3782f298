"""What can go wrong with a run is one line, and is known before anything is written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_run
from train.data.dataset import Data
from train.errors import ConfigError, DatasetError, Faults, FaultsError
from train.run import loop, results
from train.run.plan import plan_phases
from train.run.stop import Stop, Stopped, on_signals


def make_data(config, *, num=64, num_classes=10, **fields):
    side = config.image_size
    example = {"image": np.zeros((side, side, 3), np.uint8), "label": 0, **fields}
    return Data([example] * num, [example] * 8, [example] * 8, num_classes)


class TestPlan:
    """Faults that only the data show, told for all phases at the start."""

    def test_one_class_has_no_wrong_one_to_move_away_from(self, tmp_path):
        config = tiny_run.make_config(tmp_path)
        with pytest.raises(ConfigError, match="needs two classes") as info:
            plan_phases(config, make_data(config, num_classes=1))
        assert "guided.method" in str(info.value)

    def test_true_masks_must_be_there(self, tmp_path):
        config = tiny_run.make_guided_config(tmp_path)
        config.guided.teacher = "mask"
        with pytest.raises(ConfigError, match="has no masks"):
            plan_phases(config, make_data(config))

    def test_a_batch_larger_than_the_data(self, tmp_path):
        config = tiny_run.make_config(tmp_path)
        with pytest.raises(ConfigError, match="more than the 15 examples"):
            plan_phases(config, make_data(config, num=15))

    def test_a_warm_up_of_all_the_steps(self, tmp_path):
        config = tiny_run.make_guided_config(tmp_path)
        config.guided.warmup_epochs = 1.9  # of 2.0: both are 8 steps
        with pytest.raises(ConfigError, match="warmup_epochs=1.9 is all of its 8"):
            plan_phases(config, make_data(config))

    def test_a_fit_phase_is_planned_in_steps(self, tmp_path):
        config = tiny_run.make_config(tmp_path)
        plans = plan_phases(config, make_data(config))
        assert [plan.num_steps for plan in plans] == [8, 4, 4]
        assert [plan.save_every for plan in plans] == [4, 4, 4]


class TestNothingIsWritten:
    """A refused run leaves no trace: the workdir is not even made."""

    @pytest.mark.parametrize("kind", [str, Path])
    @pytest.mark.parametrize(
        "address",
        ["gs://bucket/run", "s3://b", "hdfs://x/y", "GS://b", "file:///tmp/x"]
        + ["abfs://c@d/e", "memory://", "gcs://b/r", "a+b://c"],
    )
    def test_an_address_is_no_workdir(self, address, kind, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        address = kind(address)
        with pytest.raises(ConfigError, match="is an address, not a folder"):
            loop.train_and_evaluate(tiny_run.make_config(tmp_path), address)
        assert not list(tmp_path.iterdir())

    def test_a_file_is_no_workdir(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match="is a file"):
            loop.train_and_evaluate(tiny_run.make_config(tmp_path), tmp_path / "file/x")

    def test_a_phase_that_does_not_fit(self, photo_digits_dir, tmp_path):
        config = tiny_run.make_config(photo_digits_dir)
        config.batch_size = 128
        with pytest.raises(ConfigError, match="more than the 64 examples"):
            loop.train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("text", ["{", "[]", '{"phases": 3}', "\x00", ""])
    def test_a_damaged_config_is_named(self, text, tmp_path):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json|another configuration"):
            loop.train_and_evaluate(tiny_run.make_config(tmp_path), tmp_path)
        assert (tmp_path / "config.json").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


class TestSignals:
    def test_a_signal_in_the_loop_is_noted_and_elsewhere_ends_the_run(self):
        with on_signals() as stop:
            with stop.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("the signal did not end it")

    def test_one_that_python_would_lose_comes_again(self):
        class Losing:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)

        with on_signals(), pytest.raises(Stopped) as info:
            Losing()
            time.sleep(60)
        assert info.value.number == signal.SIGTERM

    def test_a_second_ctrl_c_does_not_wait(self):
        stop = Stop()
        with stop.deferred():
            stop.note(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                stop.note(signal.SIGINT)

    @pytest.mark.parametrize(
        "number",
        [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    )
    def test_in_the_final_evaluation_it_stops_and_goes_on(
        self, number, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
        config.plain.num_epochs = 1.0
        measured = []

        def interrupting(*args, **options):
            measured.append(args)
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did not end the evaluation")

        with monkeypatch.context() as patch:
            patch.setattr(results.splits, "measure_split", interrupting)
            with pytest.raises(Stopped) as info:
                loop.train_and_evaluate(config, tmp_path)
        assert info.value.number == number and len(measured) == 1
        outcome = loop.train_and_evaluate(config, tmp_path)
        assert outcome["plain"][1]["accuracy"] >= 0.0
        assert (tmp_path / "results.json").exists()


READING = """
import numpy as np, os, signal, subprocess, sys, threading, time
from train.data.batches import iterate, make_train_dataset
from train.errors import DatasetError

def workers():
    command = ["pgrep", "-f", "-P", str(os.getpid()), "spawn_main"]
    found = subprocess.run(command, capture_output=True).stdout
    return [int(pid) for pid in found.split()]

def kill():
    while not workers():
        time.sleep(0.01)
    for worker in workers():
        os.kill(worker, signal.SIGKILL)

# More than the pipe holds that starts a process.
source = [{"image": np.zeros((256, 256, 3), np.uint8), "label": 0}] * 64
batches = make_train_dataset(source, batch_size=4, seed=0)
stream = iterate(batches, num_workers=1)
"""


class TestWorkers:
    """In a process of its own: grain's workers are processes."""

    def start(self, program):
        return subprocess.Popen(
            [sys.executable, "-c", READING + program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=os.getcwd(),
        )

    @pytest.mark.parametrize("start", ["threading.Thread(target=kill).start()", ""])
    def test_a_killed_one_is_one_line(self, start):
        """While it starts, or later."""
        program = f"""
try:
    {start or "next(stream); kill()"}
    for _ in range(1000):
        next(stream)
except DatasetError as error:
    print(error)
"""
        told, faults = self.start(program).communicate(timeout=120)
        assert "was killed" in told, faults[-2000:]

    def test_none_outlives_its_reader(self):
        process = self.start(
            "next(stream); print(*workers(), flush=True); time.sleep(600)"
        )
        (worker,) = process.stdout.readline().split()
        process.kill()
        command, end = Path(f"/proc/{worker}/cmdline"), time.monotonic() + 20
        while command.exists() and command.read_bytes():  # a dead one's is empty
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.1)
        process.communicate()


def test_faults_are_told_line_by_line():
    error = FaultsError("folder: 2 faults\n  a: no picture\n  b: one picture")
    assert isinstance(error, DatasetError)
    assert error.lines == ["folder: 2 faults", "  a: no picture", "  b: one picture"]


class TestFaults:
    def test_the_only_one_is_raised_as_it_is(self):
        faults = Faults()
        assert not faults
        faults.stop()
        with faults.gather():
            raise DatasetError("no folder")
        for _ in range(2):  # what comes of it, and the same again
            with faults.gather():
                raise DatasetError("no folder")
        with faults.gather():
            raise ZeroDivisionError
        with pytest.raises(DatasetError) as info:
            faults.stop()
        assert not isinstance(info.value, FaultsError)

    def test_several_come_with_what_they_are_of(self):
        faults = Faults()
        faults.add("mu", "=-1: must not be negative")
        faults.add("mu", " is a fault already")
        with faults.gather():
            raise FaultsError("photos: 2 faults\n  one class\n  photos/a: damaged")
        assert faults.has("mu", "nu") and not faults.has("nu")
        with pytest.raises(FaultsError) as info:
            faults.stop()
        assert isinstance(info.value, ConfigError | DatasetError)
        assert info.value.lines == [
            "3 faults",
            "  mu=-1: must not be negative",
            "  photos: one class",
            "  photos/a: damaged",
        ]

    def test_our_own_are_not_hidden(self):
        with pytest.raises(ZeroDivisionError), Faults().gather():
            raise ZeroDivisionError
