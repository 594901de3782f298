"""EfficientNet-Lite with a tap before its global pooling; imports only jax and flax.

TensorFlow's 'SAME' padding, BatchNorm epsilon 1e-3 and ReLU6 throughout; no
squeeze-and-excitation. Fewer parts than the published training recipe: no dropout
before the classifier and no stochastic depth, so that the head is exactly linear.

Reference: Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", 2019, and the Lite variants released by its authors in 2020.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from ibsgl_jax.convolutions import depthwise
from ibsgl_jax.models.heads import PooledClassifier
from ibsgl_jax.models.normalize import normalize


class Stage(NamedTuple):
    """Inverted-residual blocks with the same width."""

    size: int
    kernel: int
    stride: int
    expansion: int
    filters: int


LITE0_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _scaled(stages: Sequence[Stage], width: float, depth: float) -> tuple[Stage, ...]:
    """Wider, to a multiple of 8, and deeper but for the first and the last stage."""
    last = len(stages) - 1
    return tuple(
        stage._replace(
            size=stage.size if i in (0, last) else math.ceil(depth * stage.size),
            filters=int(width * stage.filters + 4) // 8 * 8,
        )
        for i, stage in enumerate(stages)
    )


# Stem and head stay as they are.
LITE1_STAGES = _scaled(LITE0_STAGES, 1.0, 1.1)
LITE2_STAGES = _scaled(LITE0_STAGES, 1.1, 1.2)


def _conv(filters, size, stride=1, *, dtype, groups=1):
    return nn.Conv(
        filters,
        (size, size),
        strides=stride,
        padding="SAME",
        use_bias=False,
        dtype=dtype,
        feature_group_count=groups,
        conv_general_dilated=depthwise if groups > 1 else None,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )


def _norm(*, dtype, axis_name):
    return nn.BatchNorm(momentum=0.99, epsilon=1e-3, dtype=dtype, axis_name=axis_name)


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; a shortcut where shapes agree."""

    width_in: int
    kernel: int
    stride: int
    expansion: int
    filters: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(_norm, dtype=self.dtype, axis_name=self.axis_name)
        width = self.width_in * self.expansion
        if self.expansion != 1:
            self.expand_conv = conv(width, 1)
            self.expand_bn = norm()
        self.depthwise_conv = conv(width, self.kernel, self.stride, groups=width)
        self.depthwise_bn = norm()
        self.project_conv = conv(self.filters, 1)
        self.project_bn = norm()

    def __call__(self, x, train=False):
        y = x
        if self.expansion != 1:
            y = nn.relu6(normalize(self.expand_bn, self.expand_conv(y), train))
        y = nn.relu6(normalize(self.depthwise_bn, self.depthwise_conv(y), train))
        y = normalize(self.project_bn, self.project_conv(y), train)
        return x + y if self.stride == 1 and self.width_in == self.filters else y


class EfficientNetLite(PooledClassifier):
    """An EfficientNet-Lite, split after the 1x1 convolution before its pooling.

    Attributes:
      stages: the inverted-residual stages.
      stem_filters: width of the 3x3 stride 2 stem.
      head_filters: number K of features.
      num_classes: number of logits C.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: pmap axis over which BatchNorm averages its batch moments while
        training; None outside pmap. Not used with `train=False`.
    """

    stages: Sequence[Stage]
    stem_filters: int = 32
    head_filters: int = 1280
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(_norm, dtype=self.dtype, axis_name=self.axis_name)
        self.stem_conv = conv(self.stem_filters, 3, 2)
        self.stem_bn = norm()
        blocks = []
        width = self.stem_filters
        for stage in self.stages:
            for j in range(stage.size):
                block = InvertedResidual(
                    width,
                    stage.kernel,
                    stage.stride if j == 0 else 1,
                    stage.expansion,
                    stage.filters,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"block{len(blocks)}",
                )
                blocks.append(block)
                width = stage.filters
        self.blocks = blocks
        self.head_conv = conv(self.head_filters, 1)
        self.head_bn = norm()
        self.fc = nn.Dense(self.num_classes, dtype=jnp.float32)

    def features(self, images, train=False):
        """Activations before the global pooling.

        Args:
          images: `[N, H', W', 3]`.
          train: use the batch's moments in BatchNorm (and update them: apply with
            `mutable=["batch_stats"]`).

        Returns:
          `[N, H'/32, W'/32, K]` in the compute dtype, in [0, 6].
        """
        x = self.stem_conv(images.astype(self.dtype))
        x = nn.relu6(normalize(self.stem_bn, x, train))
        for block in self.blocks:
            x = block(x, train)
        return nn.relu6(normalize(self.head_bn, self.head_conv(x), train))


EfficientNetLite0 = partial(EfficientNetLite, stages=LITE0_STAGES)
EfficientNetLite1 = partial(EfficientNetLite, stages=LITE1_STAGES)
EfficientNetLite2 = partial(EfficientNetLite, stages=LITE2_STAGES)
