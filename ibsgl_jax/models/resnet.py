"""Residual networks with a tap after the last ReLU; imports only jax and flax.

The layout is torchvision's (stride on the 3x3 convolution of a bottleneck, explicit
padding), so that pretrained weights give the same numbers; layers carry torchvision's
names with `_` for `.` inside a stage (`layer1_0/conv1` is `layer1.0.conv1`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ibsgl_jax.models.heads import PooledClassifier
from ibsgl_jax.models.normalize import normalize

_he_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(filters, size, stride=1, *, dtype, padding=None):
    padding = size // 2 if padding is None else padding
    return nn.Conv(
        filters,
        (size, size),
        strides=stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=_he_init,
    )


def _norm(*, dtype, axis_name, zero=False):
    return nn.BatchNorm(
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, H, W, *] -> [N, H/s, W/s, filters]`."""

    filters: int
    stride: int = 1
    project: bool = False
    zero_init: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    expansion = 1

    def setup(self):
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(_norm, dtype=self.dtype, axis_name=self.axis_name)
        self.conv1 = conv(self.filters, 3, self.stride)
        self.bn1 = norm()
        self.conv2 = conv(self.filters, 3)
        self.bn2 = norm(zero=self.zero_init)
        if self.project:
            self.downsample_conv = conv(self.filters, 1, self.stride)
            self.downsample_bn = norm()

    def __call__(self, x, train=False):
        y = nn.relu(normalize(self.bn1, self.conv1(x), train))
        y = normalize(self.bn2, self.conv2(y), train)
        if self.project:
            x = normalize(self.downsample_bn, self.downsample_conv(x), train)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: `[N, H, W, *] -> [N, H/s, W/s, 4 filters]`."""

    filters: int
    stride: int = 1
    project: bool = False
    zero_init: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    expansion = 4

    def setup(self):
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(_norm, dtype=self.dtype, axis_name=self.axis_name)
        self.conv1 = conv(self.filters, 1)
        self.bn1 = norm()
        self.conv2 = conv(self.filters, 3, self.stride)
        self.bn2 = norm()
        self.conv3 = conv(self.filters * self.expansion, 1)
        self.bn3 = norm(zero=self.zero_init)
        if self.project:
            self.downsample_conv = conv(self.filters * self.expansion, 1, self.stride)
            self.downsample_bn = norm()

    def __call__(self, x, train=False):
        y = nn.relu(normalize(self.bn1, self.conv1(x), train))
        y = nn.relu(normalize(self.bn2, self.conv2(y), train))
        y = normalize(self.bn3, self.conv3(y), train)
        if self.project:
            x = normalize(self.downsample_bn, self.downsample_conv(x), train)
        return nn.relu(x + y)


class ResNet(PooledClassifier):
    """A residual network, split at the activations after its last ReLU.

    Attributes:
      stage_sizes: number of blocks in each stage.
      block: `BasicBlock` or `BottleneckBlock`.
      num_filters: width of the stem and of the first stage; it doubles every stage.
      num_classes: number of logits C.
      stem: "imagenet" (7x7 stride 2 and a 3x3 stride 2 max pool), "cifar" (3x3 stride
        1), or the (size, stride, padding) of one convolution.
      stage_strides: stride of each stage's first block; None is 1, 2, 2, ...
      zero_init: the last BatchNorm scale of each block starts at 0, so that a fresh
        network is a short one. For training from scratch.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: pmap axis over which BatchNorm averages its batch moments while
        training; None outside pmap. Not used with `train=False`.
    """

    stage_sizes: Sequence[int]
    block: type[nn.Module]
    num_filters: int = 64
    num_classes: int = 1000
    stem: str | tuple[int, int, int] = "imagenet"
    stage_strides: Sequence[int] | None = None
    zero_init: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        conv = partial(_conv, dtype=self.dtype)
        if self.stem == "imagenet":
            self.conv1 = conv(self.num_filters, 7, 2)
        elif self.stem == "cifar":
            self.conv1 = conv(self.num_filters, 3)
        elif not isinstance(self.stem, str):
            size, stride, padding = self.stem
            self.conv1 = conv(self.num_filters, size, stride, padding=padding)
        else:
            raise ValueError(
                "stem must be 'imagenet', 'cifar' or (size, stride, padding), "
                f"not {self.stem!r}"
            )
        self.bn1 = _norm(dtype=self.dtype, axis_name=self.axis_name)

        strides = self.stage_strides or (1,) + (2,) * (len(self.stage_sizes) - 1)
        blocks = []
        width_in = self.num_filters
        for i, (size, stride) in enumerate(zip(self.stage_sizes, strides, strict=True)):
            filters = self.num_filters * 2**i
            for j in range(size):
                stride_j = stride if j == 0 else 1
                width_out = filters * self.block.expansion
                block = self.block(
                    filters,
                    stride_j,
                    project=stride_j != 1 or width_in != width_out,
                    zero_init=self.zero_init,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"layer{i + 1}_{j}",
                )
                blocks.append(block)
                width_in = width_out
        self.blocks = blocks
        self.fc = nn.Dense(self.num_classes, dtype=jnp.float32)

    def features(self, images, train=False):
        """Activations after the last ReLU.

        Args:
          images: `[N, H', W', 3]`.
          train: use the batch's moments in BatchNorm (and update them: apply with
            `mutable=["batch_stats"]`).

        Returns:
          `[N, H, W, K]` in the compute dtype, non-negative.
        """
        x = nn.relu(normalize(self.bn1, self.conv1(images.astype(self.dtype)), train))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x, train)
        return x


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
ResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock)

# For 48x48 images: features [8, 8, 64], 79,000 parameters, about 27 ms for a training
# step of 64 images on two CPU cores; stage_strides=(1, 1, 1) gives [16, 16, 64].
SmallResNet = partial(
    ResNet,
    stage_sizes=(1, 1, 1),
    block=BasicBlock,
    num_filters=16,
    num_classes=10,
    stem=(5, 3, 1),
    stage_strides=(1, 2, 1),
)
