"""Trackers by stand-ins for their packages; metrics as a table."""

import json
import logging
import sys
import types

import numpy as np
import pytest

from configs import default
from train.errors import ConfigError
from train.run import runs, trackers


class FakeRun:
    def __init__(self):
        self.lines, self.is_finished = [], False

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.made = []

    def init(**options):
        run = FakeRun()
        module.made.append((options, run))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    module = types.ModuleType("mlflow")
    module.calls = []

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            module.calls.append(("experiment", name))
            return "7"

        def create_run(self, number, run_name):
            module.calls.append(("run", number, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_param(self, run, key, value):
            module.calls.append(("param", key, value))

        def log_metric(self, run, key, value, step):
            module.calls.append(("metric", key, value, step))

        def set_terminated(self, run):
            module.calls.append(("end", run))

    module.MlflowClient = MlflowClient
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_wandb_gets_every_line(wandb, tmp_path):
    config = default.get_config()
    opened = trackers.Trackers(("wandb",), tmp_path / "cells", "plain", config)
    opened.write("train", {"loss": np.float32(0.5)}, 3)
    opened.write("validation", {"accuracy": 0.75}, 4)
    opened.close()
    ((options, run),) = wandb.made
    assert options["project"] == "cells" and options["name"] == "plain"
    assert options["config"]["batch_size"] == config.batch_size
    assert run.lines == [(3, {"train/loss": 0.5}), (4, {"validation/accuracy": 0.75})]
    assert run.is_finished


def test_mlflow_gets_every_value(mlflow, tmp_path):
    opened = trackers.Trackers(
        ("mlflow",), tmp_path / "cells", "plain", default.get_config()
    )
    opened.write("train", {"loss": 0.5, "accuracy": 1.0}, 3)
    opened.close()
    assert mlflow.calls[:2] == [("experiment", "cells"), ("run", "7", "plain")]
    assert ("param", "guided.mu", 20.0) in mlflow.calls
    assert mlflow.calls[-3:] == [
        ("metric", "train/loss", 0.5, 3),
        ("metric", "train/accuracy", 1.0, 3),
        ("end", "r"),
    ]


def test_a_failure_is_told_once_and_stops_nothing(wandb, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("train"), "propagate", True)
    opened = trackers.Trackers(("wandb",), tmp_path, "plain", default.get_config())

    def fail(values, step):
        raise ConnectionError("no network")

    wandb.made[0][1].log = fail
    opened.write("train", {"loss": 0.5}, 3)
    opened.write("train", {"loss": 0.5}, 4)
    opened.close()
    assert [r.getMessage() for r in caplog.records] == [
        "wandb: no network; the run goes on without it"
    ]


def test_what_is_not_there_is_told_before_the_run(monkeypatch):
    with pytest.raises(ConfigError, match="no 'comet'; there are wandb, mlflow"):
        trackers.check(("comet",))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        trackers.check(("mlflow",))


def test_metrics_as_a_table(tmp_path):
    pytest.importorskip("pandas")
    lines = [
        {"phase": "plain", "step": 3, "split": "train", "loss": 0.5},
        {"phase": "plain", "step": 4, "split": "validation", "accuracy": 0.75},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "pl'
    (tmp_path / "metrics.jsonl").write_text(text)
    frame = runs.read(tmp_path)
    assert list(frame.columns) == ["phase", "step", "split", "accuracy", "loss"]
    assert frame.loc[1, "accuracy"] == 0.75 and np.isnan(frame.loc[1, "loss"])
    with pytest.raises(ConfigError, match="no run"):
        runs.read(tmp_path, file="timing")
