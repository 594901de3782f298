"""The folder of a run, and who may write there.

config.json      the configuration; a run of another one is refused, but for
                 further phases after those that it has
metrics.jsonl    one line per log interval, a function of config and seed alone
timing.jsonl     speed and memory of the same intervals
tensorboard/     the same, per phase
checkpoints/     per phase
"""

import contextlib
import fcntl
import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from train.configuration import config_changes, without_new_phases
from train.errors import ConfigError
from train.files import write_json


@contextlib.contextmanager
def claim(workdir: Path, config):
    """Hold the folder for this run alone and record its configuration.

    Raises:
      ConfigError: another process is running there, or the folder belongs to a run of
        another configuration (the message names the fields that differ).
    """
    with contextlib.ExitStack() as opened:
        refusal = None
        if jax.process_index() == 0:
            try:
                opened.enter_context(_claim(workdir, config))
            except ConfigError as error:
                refusal = error
        if jax.process_count() > 1:
            refused = multihost_utils.broadcast_one_to_all(refusal is not None)
            if refused and refusal is None:
                refusal = ConfigError("process 0 refused the workdir; see its message")
        if refusal:
            raise refusal
        yield


@contextlib.contextmanager
def _claim(workdir: Path, config):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a")
    except OSError as error:
        raise ConfigError(
            f"cannot write to workdir {workdir}: {error.strerror}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing to workdir {workdir}; choose another --workdir"
            ) from None
        _record_config(workdir / "config.json", json.loads(config.to_json()))
        yield


def _record_config(path: Path, config: dict):
    if path.exists():
        before = json.loads(path.read_text())
        changes = config_changes(*without_new_phases(before, config))
        if changes:
            raise ConfigError(
                f"workdir {path.parent} holds a run of another configuration: "
                f"{', '.join(changes)}; choose another --workdir"
            )
    write_json(path, config, sort_keys=True)
