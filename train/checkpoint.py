"""Save, verify and restore training states with orbax.

Each save carries a checksum of its arrays. A checkpoint that cannot be read or does not
match is named and passed over for the one before it. May import orbax, jax, numpy.
"""

import logging
import zlib
from pathlib import Path

import jax
import numpy as np

LOGGER = logging.getLogger("train")
# The newest ones kept, beside the best by validation accuracy.
NUM_LATEST = 2


class CheckpointError(ValueError):
    """No usable checkpoint; the message names the folder and what to do."""


def open_manager(folder):
    """An orbax manager of the checkpoints of one phase."""
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
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager, state, *, accuracy: float, meta: dict):
    """Save asynchronously; the arrays are copied first.

    Args:
      manager: from ``open_manager``.
      state: TrainState, equal on all devices.
      accuracy: on the validation split, for keeping the best.
      meta: small JSON-serialisable dict, returned by ``restore``.
    """
    import orbax.checkpoint as ocp

    arrays = jax.device_get(state)
    step = int(arrays.step)
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave({**meta, "checksum": checksum(arrays)}),
        ),
        metrics={"accuracy": float(accuracy)},
    )


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
            # Orbax raises whatever the damaged file provokes.
            saved = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
                ),
            )
            meta = dict(saved["meta"])
            if meta.pop("checksum") != checksum(saved["state"]):
                raise CheckpointError("its arrays do not match their checksum")
        except Exception as error:  # noqa: BLE001
            LOGGER.warning(
                "checkpoint %s/%d is damaged (%s); trying the one before it",
                manager.directory,
                step,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            damaged.append(step)
            continue
        _set_aside(manager, damaged)
        return saved["state"], meta
    if steps:
        raise CheckpointError(
            f"no checkpoint in {manager.directory} can be used (tried {steps}); "
            "restore them from a copy, or delete the folder to start this phase again"
        )
    return None


def _set_aside(manager, steps):
    """Move damaged checkpoints out of the way of the saves to come."""
    folder = Path(manager.directory)
    if steps and jax.process_index() == 0:
        for step in steps:
            (folder / str(step)).rename(folder.parent / f"{folder.name}_{step}_damaged")
        manager.reload()


def checksum(tree) -> int:
    """crc32 over the bytes of every array, in the order of the tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value


def _validation_accuracy(checkpoint_metrics):
    return checkpoint_metrics["accuracy"]
