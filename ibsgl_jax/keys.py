"""Random keys: one that all images share, or one for each; imports jax and chex only.

A shared key gives every image the same draws, so that a result depends neither on the
image's neighbours nor on its place in the batch.
"""

import chex
import jax
import jax.numpy as jnp


def check(key: chex.PRNGKey | None, num_examples: int | None = None) -> chex.PRNGKey:
    """A typed key [] or keys [N].

    Args:
      key: typed (``jax.random.key``), or the numbers of an old one
        (``jax.random.PRNGKey``).
      num_examples: N; None where one key alone will do.

    Raises:
      ValueError: no key, a plain number, or a shape other than [] or [N].
    """
    wanted = "jax.random.key(0)"
    if num_examples is not None:
        wanted += ", or keys [N], one per image"
    if key is None or not hasattr(key, "dtype"):
        raise ValueError(f"key={key!r} is no random key: give {wanted}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim < 1:
            raise ValueError(
                f"key is an array {key.dtype}{list(key.shape)}: give {wanted}"
            )
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.shape != () and (num_examples is None or key.shape != (num_examples,)):
        number = "" if num_examples is None else f" for {num_examples} images"
        raise ValueError(f"key has shape {key.shape}{number}: give {wanted}")
    return key


def fold_in(key: chex.PRNGKey, data: chex.Numeric) -> chex.PRNGKey:
    """``jax.random.fold_in`` of one key, or of each of keys [N]."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def split(key: chex.PRNGKey, num: int) -> chex.PRNGKey:
    """Keys [num] from one key, [num, N] from keys [N]."""
    if key.ndim == 0:
        return jax.random.split(key, num)
    return jax.vmap(lambda k: jax.random.split(k, num), out_axes=1)(key)


def normal(key: chex.PRNGKey, shape: tuple[int, ...], *, axis: int = 0) -> chex.Array:
    """Standard-normal draws of a shape, with an axis for the images put in.

    Its length is 1 where all images share one key, N for keys [N].
    """
    if key.ndim == 0:
        return jnp.expand_dims(jax.random.normal(key, shape), axis)
    return jax.vmap(lambda k: jax.random.normal(k, shape), out_axes=axis)(key)
