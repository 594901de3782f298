"""Swin transformers with a tap before their global pooling; imports jax and flax.

Attention in windows of the map, which every second block shifts by half a window, and
between the stages four cells become one. The features are a map behind the last
LayerNorm, signed; behind the pooling stands one dense layer. Before the LayerNorm a
gradient times the features would be zero in every cell, as in ``vit``. A map that
windows do not divide is padded with zeros, as by torchvision. No stochastic depth.

Reference: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", ICCV 2021.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ibsgl_jax.models.attention import Attention
from ibsgl_jax.models.heads import PooledClassifier
from ibsgl_jax.models.normalize import layer_normalize

_init = nn.initializers.truncated_normal(0.02)
_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def _fill_up(x, side):
    """[N, h, w, D] with zeros below and to the right, h and w multiples of `side`."""
    height, width = ((0, -n % side) for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), height, width, (0, 0)))


def _split(x, side):
    """A map's squares: [N, h, w, D] -> [N, h/side, w/side, side, side, D]."""
    num, height, width, channels = x.shape
    x = x.reshape(num, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3)


def _offsets(side):
    """For two of a window's cells, [side^2, side^2], their offset's place in a table.

    The table's (2 side - 1)^2 rows go through the offsets down, and in each to the
    right, from 1 - side to side - 1.
    """
    row, column = np.divmod(np.arange(side**2), side)
    down, right = (at[:, None] - at[None] + side - 1 for at in (row, column))
    return (2 * side - 1) * down + right


def _strangers(size, side, shifts):
    """Whether only the shift has brought two cells together, [windows, side^2, side^2].

    What is shifted out of a map of the size (height, width) comes in at its other end.
    """
    row, column = (
        np.digitize(np.arange(length), (length - side, length - shift))
        for length, shift in zip(size, shifts, strict=True)
    )
    regions = 3 * row[:, None] + column[None]
    regions = _split(regions[None, ..., None], side).reshape(-1, side**2)
    return regions[:, :, None] != regions[:, None]


class Block(nn.Module):
    """Attention in windows and two dense layers, each behind a LayerNorm.

    Attributes:
      width: number of channels D.
      num_heads: of the attention.
      window: side of a window, in cells.
      shift: of the windows, in cells; none along a side that one window covers.
      dtype: compute dtype.
    """

    width: int
    num_heads: int
    window: int
    shift: int = 0
    dtype: Any = jnp.float32

    def setup(self):
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_init)
        self.norm1, self.norm2 = _norm(dtype=self.dtype), _norm(dtype=self.dtype)
        self.attention = Attention(self.num_heads, self.dtype)
        self.fc1, self.fc2 = dense(4 * self.width), dense(self.width)
        num_offsets = (2 * self.window - 1) ** 2
        self.offset_bias = self.param(
            "offset_bias", _init, (num_offsets, self.num_heads)
        )

    def __call__(self, x):
        """Of a map [N, h, w, D] one of the same shape."""
        x = x + self._attend(layer_normalize(self.norm1, x))
        y = nn.gelu(self.fc1(layer_normalize(self.norm2, x)), approximate=False)
        return x + self.fc2(y)

    def _attend(self, x):
        """Attention of the cells in each window, [N, h, w, D]."""
        side, (height, width) = self.window, x.shape[1:3]
        x = _fill_up(x, side)
        size = x.shape[1:3]
        shifts = [self.shift if length > side else 0 for length in size]
        x = _split(jnp.roll(x, [-n for n in shifts], (1, 2)), side)
        cells = x.reshape(x.shape[0], -1, side**2, self.width)
        bias = jnp.moveaxis(self.offset_bias[_offsets(side)], -1, 0)[None, None]
        # As in the original: no more than e^-100 of a weight goes to a stranger.
        apart = np.float32(-100) * _strangers(size, side, shifts)
        cells = self.attention(cells, cells, bias + apart[None, :, None])
        x = cells.reshape(x.shape).swapaxes(2, 3).reshape(-1, *size, self.width)
        return jnp.roll(x, shifts, (1, 2))[:, :height, :width]


class Merge(nn.Module):
    """Four cells side by side, a LayerNorm and a dense layer, to twice the width."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[N, h, w, D] -> [N, h/2, w/2, 2D], rounded up."""
        channels = x.shape[-1]
        x = _split(_fill_up(x, 2), 2).swapaxes(3, 4)  # first down, then right
        x = x.reshape(*x.shape[:3], 4 * channels)
        x = layer_normalize(_norm(dtype=self.dtype, name="norm"), x)
        dense = partial(nn.Dense, dtype=self.dtype, use_bias=False, kernel_init=_init)
        return dense(2 * channels, name="fc")(x)


class Swin(PooledClassifier):
    """A Swin transformer, split behind its last LayerNorm.

    Attributes:
      stage_sizes: number of blocks in each stage.
      num_heads: of each stage.
      width: number of channels of the first stage; each next one has twice as many,
        at half the height and width.
      window: side of a window, in cells.
      num_classes: number of logits C.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: accepted as in the other models; there is no BatchNorm to use it.
    """

    stage_sizes: Sequence[int]
    num_heads: Sequence[int] = (3, 6, 12, 24)
    width: int = 96
    window: int = 7
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    # Features may be negative: guide with rectify_features=False.
    signed_features = True

    def setup(self):
        self.patch_embed = nn.Conv(
            self.width,
            (4, 4),
            strides=4,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_init,
        )
        self.patch_norm = _norm(dtype=self.dtype)
        steps = []
        for i, (size, heads) in enumerate(
            zip(self.stage_sizes, self.num_heads, strict=True)
        ):
            if i:
                steps.append(Merge(self.dtype, name=f"merge{i - 1}"))
            for j in range(size):
                shift = self.window // 2 if j % 2 else 0
                block = Block(
                    self.width * 2**i,
                    heads,
                    self.window,
                    shift,
                    self.dtype,
                    name=f"stage{i}_{j}",
                )
                steps.append(block)
        self.steps = steps
        self.norm = _norm(dtype=self.dtype)
        self.fc = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=_init)

    def features(self, images, train=False):
        """The map behind the last LayerNorm.

        Args:
          images: `[N, H', W', 3]`. What does not fill a patch of 4 x 4 is left out.
          train: no effect here.

        Returns:
          `[N, H'/32, W'/32, K]`, rounded up, in the compute dtype; signed.
        """
        del train
        x = self.patch_embed(images.astype(self.dtype))
        x = layer_normalize(self.patch_norm, x)
        for step in self.steps:
            x = step(x)
        return layer_normalize(self.norm, x)


SwinTiny = partial(Swin, stage_sizes=(2, 2, 6, 2))
SwinSmall = partial(Swin, stage_sizes=(2, 2, 18, 2))
