"""Classifier heads as plain callables on features; imports only jax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PooledLinear(NamedTuple):
    """The head `logits = mean over space of features, times kernel, plus bias`.

    A pytree, so it passes through jit, vmap and grad as an argument. Being linear in
    the features it lets `bottleneck.attribute` replace noise on the features by the
    equivalent noise on the logits.

    Attributes:
      kernel: weights `[K, C]`.
      bias: `[C]`.
    """

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """Float32 logits `[..., C]` of features `[..., H, W, K]`."""
        pooled = jnp.mean(features.astype(jnp.float32), axis=(-3, -2))
        return pooled @ self.kernel.astype(jnp.float32) + self.bias.astype(jnp.float32)
