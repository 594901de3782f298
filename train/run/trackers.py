"""Metrics to a tracker of experiments, beside the run's own files.

A tracker is a function that opens one: ``(workdir, phase, config) -> Tracker``. Its
package is imported where it is used. What fails in it is told once and stops nothing:
the run's own metrics.jsonl has everything.
"""

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.errors import Faults
from train.files import flatten

LOGGER = logging.getLogger("train")


class Tracker(NamedTuple):
    """An open tracker.

    Attributes:
      write: ``(values, step)``: dict of "split/name" -> float.
      close: ``()``.
    """

    write: Callable[[dict, int], None]
    close: Callable[[], None]


def open_wandb(workdir: Path, phase: str, config) -> Tracker:
    """Weights & Biases: a project per run, a run per phase, taken up again."""
    import wandb

    run = wandb.init(
        project=workdir.absolute().name,
        name=phase,
        id=phase,
        resume="allow",
        dir=str(workdir),
        config=json.loads(config.to_json()),
    )
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def open_mlflow(workdir: Path, phase: str, config) -> Tracker:
    """MLflow: an experiment per run, a run per phase, at MLFLOW_TRACKING_URI."""
    import mlflow

    client = mlflow.MlflowClient()
    name = workdir.absolute().name
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(number, run_name=phase).info.run_id
    for field, value in flatten(json.loads(config.to_json())).items():
        client.log_param(run, field, value)

    def write(values, step):
        for key, value in values.items():
            client.log_metric(run, key, value, step=step)

    return Tracker(write, lambda: client.set_terminated(run))


TRACKERS = {"wandb": open_wandb, "mlflow": open_mlflow}


def check(names):
    """That the trackers are known and installed.

    Raises:
      ConfigError: those that are not.
    """
    faults = Faults()
    for name in names:
        if name not in TRACKERS:
            faults.add(f"trackers: no {name!r}", f"; there are {', '.join(TRACKERS)}")
        elif importlib.util.find_spec(name) is None:
            faults.add(f"trackers: no package {name}", f": pip install {name}")
    faults.stop()


class Trackers:
    """The trackers of a phase, opened together; each ends at its first failure.

    Args:
      names: of ``TRACKERS``.
      workdir, phase, config: of the run.
    """

    def __init__(self, names, workdir, phase, config):
        self._open = {}
        for name in names:
            opening = functools.partial(TRACKERS[name], Path(workdir), phase, config)
            self._try(name, opening)

    def _try(self, name, action):
        try:
            result = action()
        except Exception as error:  # noqa: BLE001  (a tracker raises anything)
            LOGGER.warning("%s: %s; the run goes on without it", name, error)
            self._open.pop(name, None)
        else:
            if isinstance(result, Tracker):
                self._open[name] = result

    def write(self, split: str, values: dict, step: int):
        """The values of one log line."""
        named = {f"{split}/{key}": float(value) for key, value in values.items()}
        for name, tracker in list(self._open.items()):
            self._try(name, functools.partial(tracker.write, named, step))

    def close(self):
        """Close all."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
