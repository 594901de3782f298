"""Attention of tokens; imports only jax and flax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_init = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Attention of Q tokens [..., Q, D] to others [..., T, D]: [..., Q, D].

    A float32 bias, of the rank of [..., num_heads, Q, T], is added to the scores.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, others, bias=None):
        width = x.shape[-1]
        dense = partial(nn.Dense, width, dtype=self.dtype, kernel_init=_init)

        def project(name, tokens):
            sizes = self.num_heads, width // self.num_heads
            return dense(name=name)(tokens).reshape(*tokens.shape[:-1], *sizes)

        query, key, value = (
            project(name, tokens)
            for name, tokens in (("query", x), ("key", others), ("value", others))
        )
        query = query * (width // self.num_heads) ** -0.5
        # In float32: the softmax's sum runs over all tokens.
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key).astype(jnp.float32)
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(scores).astype(self.dtype)
        mixed = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        return dense(name="out")(mixed.reshape(x.shape))
