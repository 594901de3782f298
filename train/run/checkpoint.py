"""Save, verify and restore training states with orbax.

Each save carries a checksum of its arrays. A checkpoint that cannot be read or does not
match is named and passed over for the one before it.
"""

import contextlib
import json
import logging
import shutil
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.data.faults import shown
from train.errors import CheckpointError
from train.files import write_text

LOGGER = logging.getLogger("train")
# The newest ones kept, beside the best by validation accuracy.
NUM_LATEST = 2
TRASH = "trash"
# In a checkpoint's folder once it is whole: the checksum of every other file.
FILES = "files.json"


@contextlib.contextmanager
def open_manager(folder):
    """An orbax manager of the checkpoints of one phase; waits for its saves at the end.

    Raises:
      CheckpointError: there are checkpoints, and none of them can be read; or a save
        failed.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

    # BestN and LatestN together: best_fn with max_to_keep would delete the newest.
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(
            [
                policy.LatestN(NUM_LATEST),
                policy.BestN(get_metric_fn=_validation_accuracy, n=1),
            ]
        ),
        best_fn=_validation_accuracy,
        cleanup_tmp_directories=True,
        # Moved there, then deleted: a kill in between leaves no half checkpoint.
        todelete_subdir=TRASH,
    )
    logging.getLogger("absl").addFilter(_is_no_trace_of_orbax)
    folder = Path(folder).absolute()
    # Before orbax looks: it reads what every checkpoint says and stops at a bad one.
    if jax.process_index() == 0:
        _check_headers(folder)
    _wait("checkpoints")
    try:
        manager = ocp.CheckpointManager(folder, options=options)
    except OSError:
        raise  # a full disk, a folder that may not be written
    except Exception as error:  # noqa: BLE001  (orbax raises anything)
        raise CheckpointError(
            f"the checkpoints in {folder} cannot be opened: {_reason(error)}; restore "
            "them from a copy, or delete the folder to start this phase again"
        ) from error
    try:
        yield manager
    except BaseException:
        # That error is the one to tell, not what closing makes of it.
        with contextlib.suppress(Exception):
            manager.close()
        raise
    wait(manager)
    manager.close()
    if jax.process_index() == 0:
        shutil.rmtree(folder / TRASH, ignore_errors=True)


def _is_no_trace_of_orbax(record) -> bool:
    """Of what fails in its threads the traceback is not shown: the error is raised."""
    return "/orbax/" not in record.pathname or record.levelno < logging.ERROR


def wait(manager):
    """Until what was saved is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    with _save_errors(manager):
        manager.wait_until_finished()
        _seal(manager)


def latest_path(manager):
    """The folder of the newest checkpoint that is on disk, or None."""
    wait(manager)
    step = manager.latest_step()
    return None if step is None else Path(manager.directory) / str(step)


@contextlib.contextmanager
def _save_errors(manager):
    try:
        yield
    except Exception as error:  # noqa: BLE001  (orbax and tensorstore raise anything)
        raise CheckpointError(
            f"cannot save to {manager.directory}: {_reason(error)}; the checkpoints "
            "before it are whole: make room and repeat the command"
        ) from error


def _check_headers(folder):
    """Set aside checkpoints whose accuracy or time is none; all of them: an error."""
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    damaged = []
    for step in sorted(steps, reverse=True):
        try:
            metrics = json.loads((folder / str(step) / "metrics/metrics").read_text())
            float(metrics["accuracy"])
            header = folder / str(step) / "_CHECKPOINT_METADATA"
            if header.exists():
                float(json.loads(header.read_text())["commit_timestamp_nsecs"])
        except Exception as error:  # noqa: BLE001
            _warn(folder, step, error)
            damaged.append(step)
    if damaged and len(damaged) == len(steps):
        raise _none_left(folder, damaged)
    _set_aside(folder, damaged)


def save(manager, state, *, accuracy: float, meta: dict):
    """Save asynchronously; the arrays are copied first.

    Raises:
      CheckpointError: this save or the one before it could not be written.

    Args:
      manager: from ``open_manager``.
      state: TrainState, equal on all devices.
      accuracy: on the validation split, for keeping the best; with several labels per
        image their mean average precision.
      meta: small JSON-serialisable dict, returned by ``restore``.
    """
    import orbax.checkpoint as ocp

    arrays = jax.device_get(state)
    step = int(arrays.step)
    meta = {**meta, "checksum": checksum((arrays, _bytes(meta)))}
    with _save_errors(manager):
        manager.wait_until_finished()  # the save before this one
        _seal(manager)
        # Here, not at the start: a run that is refused leaves everything as it is.
        if jax.process_index() == 0:
            shutil.rmtree(Path(manager.directory) / TRASH, ignore_errors=True)
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
            ),
            metrics={"accuracy": float(accuracy)},
        )
        manager.unsealed = step


def restore(manager, like):
    """The newest checkpoint that is whole.

    Args:
      manager: from ``open_manager``.
      like: a state of the same structure and shapes.

    Returns:
      (state of NumPy arrays, meta), or None if nothing was ever saved.

    Raises:
      CheckpointError: there are checkpoints, and none of them is whole or fits.
    """
    import orbax.checkpoint as ocp

    steps = sorted(manager.all_steps(), reverse=True)
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    damaged = []
    for step in steps:
        try:
            _check_files(Path(manager.directory) / str(step))
            # Orbax raises whatever the damaged file provokes.
            saved = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
                ),
            )
            meta = dict(saved["meta"])
            if meta.pop("checksum") != checksum((saved["state"], _bytes(meta))):
                raise CheckpointError("its arrays do not match their checksum")
        except Exception as error:  # noqa: BLE001
            _mute_closed_loops()
            _warn(manager.directory, step, error)
            damaged.append(step)
            continue
        if damaged:
            if jax.process_index() == 0:
                _set_aside(Path(manager.directory), damaged)
            _wait("damaged")
            manager.reload()
        return saved["state"], meta
    if steps:
        raise _none_left(manager.directory, steps)
    return None


def _warn(folder, step, error):
    LOGGER.warning(
        "checkpoint %s/%d is damaged (%s); trying the one before it",
        folder,
        step,
        _reason(error),
    )


def _reason(error) -> str:
    return shown(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _mute_closed_loops():
    """A read that fails leaves futures behind, each of which tells of it once more."""
    tell = sys.unraisablehook
    if getattr(tell, "is_muted", False):
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    hook.is_muted = True
    sys.unraisablehook = hook


def _none_left(folder, steps) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint in {folder} can be used (tried {steps}); "
        "restore them from a copy, or delete the folder to start this phase again"
    )


def _set_aside(folder: Path, steps):
    """Move damaged checkpoints out of the way of the saves to come."""
    for step in steps:
        target = folder.parent / f"{folder.name}_{step}_damaged"
        while target.exists():
            target = target.with_name(target.name + "_again")
        (folder / str(step)).rename(target)


def _wait(name):
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _seal(manager):
    """Record the files of the checkpoint that was saved last."""
    step = getattr(manager, "unsealed", None)
    if step is None or jax.process_index() != 0:
        return
    folder = Path(manager.directory) / str(step)
    sums = {
        str(path.relative_to(folder)): zlib.crc32(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILES
    }
    write_text(folder / FILES, json.dumps(sums, indent=0))
    manager.unsealed = None


def _check_files(folder: Path):
    """Raise CheckpointError unless every file is what it was when it was sealed."""
    # A run that was killed right after a save had no time to seal it; then the
    # checksum of the arrays has to do.
    if not (folder / FILES).exists():
        return
    for name, expected in json.loads((folder / FILES).read_text()).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"its file {name} is missing")
        if zlib.crc32(path.read_bytes()) != expected:
            raise CheckpointError(f"its file {name} has changed")


def checksum(tree) -> int:
    """crc32 over the bytes of every array, in the order of the tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value


def _bytes(meta: dict):
    """As they will be read back, for the checksum."""
    return np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8)


def _validation_accuracy(checkpoint_metrics):
    return checkpoint_metrics["accuracy"]
