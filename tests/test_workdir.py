"""The folder of a run: one run at a time, one configuration, whole lines only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import default
from tests import tiny_run
from train.errors import ConfigError
from train.files import flatten, write_json, write_text
from train.run.log import PhaseLog
from train.run.workdir import check_workdir, claim

ROOT = Path(__file__).parents[1]


def run_train(*arguments, **environment):
    """`python -m train` on one device, as a user would run it."""
    return subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestClaim:
    def test_records_the_config_and_can_be_repeated(self, tmp_path):
        config = default.get_config()
        for _ in range(2):
            with claim(tmp_path / "run", config):
                pass
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())
        assert recorded["guided"]["bottleneck"]["num_steps"] == 20

    def test_second_run_is_refused(self, tmp_path):
        config = default.get_config()
        with (
            claim(tmp_path, config),
            pytest.raises(ConfigError, match="another run is writing to workdir"),
            claim(tmp_path, config),
        ):
            pass

    def test_of_several_processes_the_first_may_hold_it(self, tmp_path, monkeypatch):
        with claim(tmp_path, default.get_config()):
            with pytest.raises(ConfigError, match="another run is writing"):
                check_workdir(tmp_path, default.get_config())
            monkeypatch.setattr(jax, "process_count", lambda: 2)
            check_workdir(tmp_path, default.get_config())

    def test_another_config_is_refused_with_the_fields(self, tmp_path):
        config = default.get_config()
        with claim(tmp_path, config):
            pass
        before = (tmp_path / "config.json").read_bytes()
        config.seed = 1
        config.guided.mu = 5.0
        config.new_field = 3
        with pytest.raises(ConfigError) as info, claim(tmp_path, config):
            pass
        message = str(info.value)
        assert "guided.mu (20.0 -> 5.0)" in message and "seed (0 -> 1)" in message
        assert "new_field (absent -> 3)" in message and "batch_size" not in message
        assert "\n" not in message
        assert (tmp_path / "config.json").read_bytes() == before

    def test_a_run_may_be_given_more_phases(self, tmp_path):
        config = default.get_config()
        config.phases = ("plain", "control")
        with claim(tmp_path, config):
            pass
        config.guided.mu = 3.0  # its section was there, but not among the phases
        config.more = default.guided_phase(init="plain")
        config.phases = ("plain", "control", "guided", "more")
        with claim(tmp_path, config):
            pass
        recorded = json.loads((tmp_path / "config.json").read_text())
        assert recorded["phases"] == list(config.phases)
        assert recorded["guided"]["mu"] == 3.0

    @pytest.mark.parametrize(
        "phases", [("plain",), ("control", "plain"), ("guided", "plain", "control")]
    )
    def test_its_own_phases_stay_and_stay_first(self, tmp_path, phases):
        config = default.get_config()
        config.phases = ("plain", "control")
        with claim(tmp_path, config):
            pass
        config.phases = phases
        with (
            pytest.raises(ConfigError, match="another configuration: phases"),
            claim(tmp_path, config),
        ):
            pass

    def test_a_finished_phase_is_not_changed_along_with_a_new_one(self, tmp_path):
        config = default.get_config()
        config.phases = ("plain", "control")
        with claim(tmp_path, config):
            pass
        config.phases = ("plain", "control", "guided")
        config.control.learning_rate = 0.5
        with (
            pytest.raises(ConfigError, match="control.learning_rate"),
            claim(tmp_path, config),
        ):
            pass

    def test_fields_that_change_no_number_are_free(self, tmp_path):
        config = default.get_config()
        with claim(tmp_path, config):
            pass
        config.progress = False
        config.num_threads = 7
        with claim(tmp_path, config):
            pass

    def test_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(ConfigError, match="cannot write to workdir"),
            claim(tmp_path / "file" / "run", default.get_config()),
        ):
            pass


class TestPhaseLog:
    def test_drops_what_will_be_written_again(self, tmp_path):
        with PhaseLog(tmp_path, "a", 0, tensorboard=False) as log:
            for step in (1, 2, 3):
                log.write(step, "train", {"loss": step / 10})
        with PhaseLog(tmp_path, "b", 0, tensorboard=False) as log:
            log.write(9, "train", {"loss": 0.9})
        path = tmp_path / "metrics.jsonl"
        with path.open("a") as file:
            file.write('{"phase": "a", "st')
        with PhaseLog(tmp_path, "a", 2, tensorboard=False):
            pass
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(x["phase"], x["step"]) for x in lines] == [
            ("a", 1),
            ("a", 2),
            ("b", 9),
        ]


class TestWriteText:
    def test_leaves_the_old_file_when_writing_fails(self, tmp_path):
        path = tmp_path / "file.json"
        write_text(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write_text(path, "new \ud800")
        assert path.read_text() == "old"


class TestWriteJson:
    def test_what_json_cannot_say_is_null(self, tmp_path):
        path = tmp_path / "file.json"
        write_json(path, {"a": [1.5, float("nan")], "b": {"c": (float("inf"), None)}})
        text = path.read_text()
        assert json.loads(text) == {"a": [1.5, None], "b": {"c": [None, None]}}
        assert "NaN" not in text and "Infinity" not in text


def test_flatten_joins_the_names():
    tree = {"a": {"b": {"c": 1}, "d": [2, 3]}, "e": None, "f": {}}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [2, 3], "e": None}


class TestCommand:
    def test_unknown_field_is_one_line_with_a_proposal(self, tmp_path):
        done = run_train("--config.batch_sise=8", f"--workdir={tmp_path / 'run'}")
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "batch_sise" in line and "did you mean" in line.lower()
        assert "batch_size" in line
        assert not (tmp_path / "run").exists()

    def test_impossible_value_is_one_line(self, tmp_path):
        workdir = tmp_path / "run"
        done = run_train("--config.guided.mu=-2.0", f"--workdir={workdir}")
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line == "error: guided.mu=-2.0: must not be negative"
        assert not workdir.exists()

    def test_missing_data_set_is_one_line(self, tmp_path):
        done = run_train(
            "--config.dataset=cifar10",
            f"--config.data_dir={tmp_path}",
            f"--workdir={tmp_path / 'run'}",
        )
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "python -m train.prepare cifar10" in line

    def test_second_run_is_refused_with_status_two(self, tmp_path):
        with claim(tmp_path, tiny_run.make_config(tmp_path)):
            done = run_train(f"--workdir={tmp_path}")
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "another run is writing" in line

    def test_trains(self, tmp_path, photo_digits_dir):
        (tmp_path / "tiny.py").write_text(
            "from tests import tiny_run\n\n\ndef get_config():\n"
            f"    return tiny_run.make_config({str(photo_digits_dir)!r})\n"
        )
        done = run_train(
            f"--config={tmp_path / 'tiny.py'}",
            "--config.phases=('plain',)",
            f"--workdir={tmp_path / 'run'}",
        )
        assert done.returncode == 0, done.stderr
        assert "| plain |" in done.stdout
        assert (tmp_path / "run" / "results.json").exists()
        assert (tmp_path / "run" / "models" / "plain.npz").exists()
