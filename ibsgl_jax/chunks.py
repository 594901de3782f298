"""A function over chunks of a batch, one by one; imports jax and numpy only."""

import jax
import jax.numpy as jnp
import numpy as np


def map_chunks(fn, batch, chunk_size):
    """The results of fn over chunks of the leading axis, one after the other.

    The last chunk is filled up with copies of the last example.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    num_chunks = -(-size // chunk_size)
    if num_chunks == 1:
        return fn(batch)
    padding = num_chunks * chunk_size - size

    def split(x):
        if padding:
            x = jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)])
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    def join(x):
        return x.reshape(num_chunks * chunk_size, *x.shape[2:])[:size]

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, batch)))


def as_pytree(fn):
    """A callable that jit takes as an argument: a pytree of arrays, or static."""
    leaves = jax.tree.leaves(fn)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fn
    return jax.tree_util.Partial(fn)
