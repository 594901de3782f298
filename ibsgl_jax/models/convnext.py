"""ConvNeXt with a tap before its global pooling; imports only jax and flax.

Behind the pooling stand a LayerNorm and one dense layer; the features before it are the
last block's, and signed. No stochastic depth.

Reference: Liu et al., "A ConvNet for the 2020s", CVPR 2022.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ibsgl_jax.convolutions import depthwise
from ibsgl_jax.models.normalize import layer_normalize

_init = nn.initializers.truncated_normal(0.02)
_norm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class Block(nn.Module):
    """7x7 depthwise, LayerNorm, two dense layers, a scale, and a shortcut."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_init)
        y = nn.Conv(
            self.width,
            (7, 7),
            padding=3,
            feature_group_count=self.width,
            conv_general_dilated=depthwise,
            dtype=self.dtype,
            kernel_init=_init,
            name="depthwise",
        )(x)
        y = layer_normalize(_norm(dtype=self.dtype, name="norm"), y)
        y = nn.gelu(dense(4 * self.width, name="fc1")(y), approximate=False)
        y = dense(self.width, name="fc2")(y)
        scale = self.param("scale", nn.initializers.constant(1e-6), (self.width,))
        return x + y * scale.astype(y.dtype)[None, None, None]


class ConvNeXt(nn.Module):
    """A ConvNeXt, split at the output of its last block.

    Attributes:
      stage_sizes: number of blocks in each stage.
      stage_widths: number of channels of each stage; it halves height and width, the
        first divides them by four.
      num_classes: number of logits C.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: accepted as in the other models; there is no BatchNorm to use it.
    """

    stage_sizes: Sequence[int]
    stage_widths: Sequence[int] = (96, 192, 384, 768)
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    # Features may be negative: guide with rectify_features=False.
    signed_features = True

    def setup(self):
        steps = []
        for i, (size, width) in enumerate(
            zip(self.stage_sizes, self.stage_widths, strict=True)
        ):
            side = 2 if i else 4
            conv = nn.Conv(
                width,
                (side, side),
                strides=side,
                padding="VALID",
                dtype=self.dtype,
                kernel_init=_init,
                name=f"down{i}_conv",
            )
            norm = _norm(dtype=self.dtype, name=f"down{i}_norm")
            steps += [norm, conv] if i else [conv, norm]
            steps += [
                Block(width, self.dtype, name=f"stage{i}_{j}") for j in range(size)
            ]
        self.steps = steps
        self.norm = _norm(dtype=jnp.float32)
        self.fc = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=_init)

    def features(self, images, train=False):
        """The last block's output.

        Args:
          images: `[N, H', W', 3]`, at least 32 x 32.
          train: no effect here.

        Returns:
          `[N, H'/32, W'/32, K]` in the compute dtype, signed.
        """
        del train
        x = images.astype(self.dtype)
        for step in self.steps:
            is_norm = isinstance(step, nn.LayerNorm)
            x = layer_normalize(step, x) if is_norm else step(x)
        return x

    def head(self, features, train=False, keys=None):
        """Float32 logits `[N, C]` of features `[N, H, W, K]`; keys are not used."""
        del train, keys
        pooled = jnp.mean(features.astype(jnp.float32), axis=(1, 2))
        return self.fc(self.norm(pooled))

    def __call__(self, images, train=False, keys=None):
        """Float32 logits `[N, C]` of images `[N, H', W', 3]`."""
        return self.head(self.features(images, train), train, keys)


ConvNeXtTiny = partial(ConvNeXt, stage_sizes=(3, 3, 9, 3))
ConvNeXtSmall = partial(ConvNeXt, stage_sizes=(3, 3, 27, 3))
