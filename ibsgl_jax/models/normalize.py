"""BatchNorm and LayerNorm in any compute dtype; imports only jax and flax."""

import jax
from flax import linen as nn


def normalize(norm: nn.BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """`norm` of `[N, ..., K]`, by the batch's moments where `train`, else the running.

    Flax's BatchNorm relies on implicit promotion (of bfloat16 features by float32
    moments), which a caller may have switched off; so it is allowed here.
    """
    with jax.numpy_dtype_promotion("standard"):
        return norm(x, use_running_average=not train)


def layer_normalize(norm: nn.LayerNorm, x: jax.Array) -> jax.Array:
    """`norm` of `[..., K]`, which relies on implicit promotion as BatchNorm does."""
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)
