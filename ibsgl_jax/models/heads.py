"""Classifier heads, and models that end in one; imports only jax and flax."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct


# Compared by identity, so that jax.jit(head) can hold it as a function.
@struct.dataclass(eq=False)
class PooledLinear:
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
        kernel, bias = self.kernel.astype(jnp.float32), self.bias.astype(jnp.float32)
        # In float32 on every device: never in TF32 or bfloat16.
        logits = jnp.matmul(pooled, kernel, precision="highest")
        return logits + jnp.broadcast_to(bias, logits.shape)


class PooledClassifier(nn.Module):
    """A model whose head is a mean over space and one dense layer.

    A subclass gives `features(images, train)` and, in its `setup`, the layer `fc`.
    """

    def head(self, features, train=False, keys=None):
        """Float32 logits `[N, C]` of features `[N, H, W, K]`; keys are not used."""
        del train, keys
        return self.fc(jnp.mean(features.astype(jnp.float32), axis=(1, 2)))

    def __call__(self, images, train=False, keys=None):
        """Float32 logits `[N, C]` of images `[N, H', W', 3]`."""
        return self.head(self.features(images, train), train, keys)

    @staticmethod
    def pooled_linear(variables) -> PooledLinear:
        """The head as a `PooledLinear`, from the model's variables."""
        return PooledLinear(**variables["params"]["fc"])
