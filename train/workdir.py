"""The folder of a run: who may write there, and the logs that go into it.

    config.json      the configuration; a run of another one is refused, but for
                     further phases after those that it has
    metrics.jsonl    one line per log interval, a function of config and seed alone
    timing.jsonl     speed and memory of the same intervals
    tensorboard/     the same, per phase
    checkpoints/     per phase

May import ml_collections' ConfigDict values as given, numpy, tensorboardX where used.
"""

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path

import jax

# Fields that may differ when a run is continued: they change no number.
FREE_FIELDS = ("data_dir", "num_threads", "num_workers", "progress", "tensorboard")


class ConfigError(ValueError):
    """The configuration asks for something impossible; one line that says what."""


class DiskError(ValueError):
    """The disk took no more; one line that says where."""


@contextlib.contextmanager
def disk_errors():
    """A full disk is one line: what is there stays whole, and the run can go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskError(
            f"cannot write {error.filename or 'the logs'}: {error.strerror}; make room "
            "and repeat the command"
        ) from error


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
            from jax.experimental import multihost_utils

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
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_changes(before: dict, now: dict) -> list[str]:
    """The fields that make another run of it: "NAME (before -> now)"."""
    before, now = _flat(before), _flat(now)
    return [
        f"{name} ({before.get(name, 'absent')} -> {now.get(name, 'absent')})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in FREE_FIELDS
    ]


def without_new_phases(before: dict, now: dict) -> tuple[dict, dict]:
    """Both, less the phases that ``now`` lists after those of ``before``.

    A run may be given more phases: those that are finished do not depend on them.
    """
    old, new = (list(config.get("phases", ())) for config in (before, now))
    added = new[len(old) :]
    if new[: len(old)] != old:
        return before, now
    before, now = (
        {k: v for k, v in config.items() if k not in added} for config in (before, now)
    )
    return before, now | {"phases": old}


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else name).items()
    }


def write_text(path: Path, text: str):
    """Write a whole file or nothing of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


class PhaseLog:
    """Appends the log lines of one phase; on other processes than 0 it does nothing.

    Args:
      workdir: folder of the run.
      phase: name of the phase.
      start_step: lines of this phase after this step are dropped: the run goes on from
        there and will write them again.
      tensorboard: also write event files.
    """

    def __init__(self, workdir: Path, phase: str, start_step: int, *, tensorboard=True):
        self._phase = phase
        self._files = {}
        self._events = None
        if jax.process_index() != 0:
            return
        for name in ("metrics", "timing"):
            path = workdir / f"{name}.jsonl"
            _drop_lines(path, phase, start_step)
            self._files[name] = open(path, "a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(workdir / "tensorboard" / phase), purge_step=start_step + 1
            )

    def write(self, step: int, split: str, values: dict, *, file: str = "metrics"):
        """One line: phase, step, split and the values."""
        if not self._files:
            return
        line = {"phase": self._phase, "step": step, "split": split, **values}
        self._files[file].write(json.dumps(line) + "\n")
        self._files[file].flush()
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, step)

    def sync(self):
        """Everything written so far is on disk, as a checkpoint will assume."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for file in self._files.values():
            file.close()
        if self._events:
            self._events.close()


def _drop_lines(path: Path, phase: str, last_step: int):
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        if line["phase"] != phase or line["step"] <= last_step:
            kept.append(text + "\n")
    write_text(path, "".join(kept))
