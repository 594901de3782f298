"""A function over chunks of a batch, one by one; imports jax and numpy only.

A batch may be spread over devices: a chunk then has images of each, and no image leaves
its own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def map_chunks(fn, batch, chunk_size, *, num_shards=1):
    """The results of fn over chunks of the leading axis, one after the other.

    The last chunk is filled up with copies of the last example.

    Args:
      fn: of a batch.
      batch: arrays [N, ...].
      chunk_size: examples at once, of each shard.
      num_shards: of the leading axis, one to a device; divides N.
    """
    size = jax.tree.leaves(batch)[0].shape[0] // num_shards
    num_chunks = -(-size // chunk_size)
    if num_chunks == 1:
        return fn(batch)
    padding = num_chunks * chunk_size - size

    def split(x):
        x = x.reshape(num_shards, size, *x.shape[1:])
        if padding:
            x = jnp.concatenate([x, jnp.repeat(x[:, -1:], padding, axis=1)], axis=1)
        x = x.reshape(num_shards, num_chunks, chunk_size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(num_chunks, -1, *x.shape[3:])

    def join(x):
        x = x.reshape(num_chunks, num_shards, chunk_size, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 1).reshape(num_shards, -1, *x.shape[3:])
        return x[:, :size].reshape(num_shards * size, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, batch)))


def on_each_device(fn, *batch):
    """``fn(*batch)``; where the batch is spread over devices, each does its own part.

    A loop then ends on a device when its own examples are done.
    """
    sharding = batch_sharding(batch[0])
    if sharding is None:
        return fn(*batch)
    spread = sharding.spec
    return jax.shard_map(
        fn, mesh=sharding.mesh, in_specs=(spread,) * len(batch), out_specs=spread
    )(*batch)


def num_shards(x):
    """How many pieces the leading axis of an array is in, as far as that shows.

    It shows of an array, and while tracing where a mesh has ``Explicit`` axes.
    """
    sharding = batch_sharding(x)
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in _names(sharding))


def batch_sharding(x):
    """The ``NamedSharding`` of the leading axis alone, or None where it has none."""
    sharding = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not _names(sharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def has_spread_axis(x):
    """Whether Explicit axes spread one of an array's; it merges with no other."""
    return any(jax.typeof(x).sharding.spec)


def is_traced(x):
    """Whether an array has no values yet."""
    return isinstance(x, jax.core.Tracer)


def _names(sharding):
    """The names of the mesh's axes over which the leading axis is spread."""
    first = sharding.spec[0] if len(sharding.spec) else None
    return (first,) if isinstance(first, str) else tuple(first or ())


def as_pytree(fn):
    """A callable that jit takes as an argument: a pytree of arrays, or static."""
    leaves = jax.tree.leaves(fn)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fn
    return jax.tree_util.Partial(fn)
