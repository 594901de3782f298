"""The masks of a batch: which examples have one, and what lies outside of it."""

import jax
import jax.numpy as jnp


def known(mask):
    """bool [N]: whether an example has a mask; one without has all zeros."""
    return jnp.any(mask > 0, axis=(1, 2))


def outside(mask):
    """float32 [N, H, W]: 1 outside of the object's mask; 0 everywhere without one."""
    there = known(mask)[:, None, None]
    return jnp.where(there, (mask == 0).astype(jnp.float32), 0.0)


def resized(mask, size):
    """float32 [N, h, w] in [0, 1]: the mask at another resolution, soft at its edge."""
    return jax.image.resize(mask.astype(jnp.float32), (len(mask), *size), "linear")
