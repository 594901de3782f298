"""The devices of a run: one axis over all of them, with a batch shared along it.

The only place that maps over devices; everything else is a function of one of them.
"""

import collections
import functools
import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.errors import ConfigError

AXIS = "devices"
# Batches on their way to the devices ahead of the step.
AHEAD = 2


def over_devices(step, *, in_axes, out_axes=0, donate_argnums=()):
    """``step`` on every device at once, with the axis name ``AXIS``.

    Args:
      step: function of one device.
      in_axes: per argument 0 where it is shared along its first axis (see ``shard``),
        None where every device gets all of it.
      out_axes: None for a result that is equal everywhere; 0 stacks the results.
      donate_argnums: arguments whose memory the results may take.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=in_axes,
        out_axes=out_axes,
        donate_argnums=donate_argnums,
    )


def compiled(step, config, model, *, num_carried: int = 1, **options):
    """``step(variables, ..., batch)`` over all devices, compiled once per options."""
    return _compiled(
        step,
        model,
        tuple(config.image_mean),
        tuple(config.image_std),
        num_carried,
        tuple(sorted(options.items())),
    )


@functools.lru_cache(maxsize=64)
def _compiled(step, model, mean, std, num_carried, options):
    return over_devices(
        functools.partial(
            step, model=model, image_stats={"mean": mean, "std": std}, **dict(options)
        ),
        in_axes=(None,) * num_carried + (0,),
    )


def unshard(values, size):
    """[local devices, n, ...] -> NumPy [size, ...]."""
    return np.asarray(values).reshape(size, *values.shape[2:]) if size else values


def shard(batch):
    """[B, ...] -> [local devices, B / devices, ...]."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)


def gather(values):
    """Join the examples that every process measured; their number may differ."""
    size = len(next(iter(values.values())))
    sizes = multihost_utils.process_allgather(np.int32(size)).reshape(-1)
    padded = {
        k: np.pad(v, [(0, sizes.max() - size)] + [(0, 0)] * (v.ndim - 1))
        for k, v in values.items()
    }
    gathered = multihost_utils.process_allgather(padded)
    return {
        k: np.concatenate([row[:n] for row, n in zip(v, sizes, strict=True)])
        for k, v in gathered.items()
    }


def replicate(state):
    """The state as pmap gives it back, so that a step is compiled once, not twice."""
    identity = over_devices(lambda state, _: state, in_axes=(None, 0), out_axes=None)
    return identity(state, np.zeros(jax.local_device_count()))


def prefetch(stream, config):
    """The batches, with the places of their examples, on the devices ahead of use."""
    count = jax.process_count()
    place = np.arange(config.batch_size // count, dtype=np.int32) * count
    place += jax.process_index()
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    sharding = jax.NamedSharding(mesh, jax.P(AXIS))
    queue = collections.deque()
    for batch in itertools.chain(stream, [None] * AHEAD):
        if batch is not None:
            batch = shard({**batch, "place": place})
            queue.append(jax.device_put(batch, sharding))
        if len(queue) > AHEAD or batch is None:
            if not queue:
                return
            yield queue.popleft()


def check_devices(config):
    """ConfigError unless a batch can be shared among the devices."""
    if config.batch_size % jax.device_count():
        raise ConfigError(
            f"batch_size={config.batch_size} of the run is not divisible by the "
            f"{jax.device_count()} devices; evaluate it on a number that divides it"
        )
