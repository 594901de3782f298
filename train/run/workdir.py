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
import os
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ibsgl_jax.app.outputs import is_address
from train.configuration import config_changes, without_new_phases
from train.errors import ConfigError
from train.files import write_json


def check_workdir(workdir, config):
    """That the folder can be this run's, as far as reading tells; nothing is written.

    Raises:
      ConfigError: it is no local path, cannot be written to, or holds another run.
    """
    if is_address(workdir):
        raise ConfigError(
            f"workdir {workdir} is an address, not a folder; mount it (gcsfuse for "
            "gs://) and give the folder"
        )
    workdir = Path(workdir)
    nearest = next(
        path for path in (workdir, *workdir.absolute().parents) if path.exists()
    )
    if not nearest.is_dir():
        raise ConfigError(f"cannot write to workdir {workdir}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to workdir {workdir}: Permission denied")
    # Of several processes the first one may hold it already, and tells if it cannot.
    if jax.process_count() == 1 and (workdir / ".lock").exists():
        with _locked(workdir):
            pass
    if (workdir / "config.json").exists():
        _check_config_file(workdir / "config.json", json.loads(config.to_json()))


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
    except OSError as error:
        raise ConfigError(
            f"cannot write to workdir {workdir}: {error.strerror}"
        ) from error
    with _locked(workdir):
        _record_config(workdir / "config.json", json.loads(config.to_json()))
        yield


@contextlib.contextmanager
def _locked(workdir: Path):
    """Hold the folder's lock; ConfigError where another process does."""
    try:
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
        yield


def _record_config(path: Path, config: dict):
    if path.exists():
        _check_config_file(path, config)
    write_json(path, config, sort_keys=True)


def _check_config_file(path: Path, config: dict):
    """ConfigError unless the run recorded there is this one, but for later phases."""
    try:
        before = json.loads(path.read_text())
        changes = config_changes(*without_new_phases(before, config))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); put it right or choose another --workdir"
        ) from None
    if changes:
        raise ConfigError(
            f"workdir {path.parent} holds a run of another configuration: "
            f"{', '.join(changes)}; choose another --workdir"
        )
