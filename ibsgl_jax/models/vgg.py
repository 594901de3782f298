"""VGG networks with a tap after the last ReLU of the convolutions.

Torchvision's layout without BatchNorm; imports only jax, numpy and flax.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def _bin_averages(size_in: int, size_out: int) -> np.ndarray:
    """Weights `[size_out, size_in]` of PyTorch's adaptive average pooling on one axis.

    Bin i covers the places floor(i in/out) to ceil((i + 1) in/out), so bins overlap
    where the sizes do not divide, and repeat places where there are fewer than bins.
    """
    weights = np.zeros((size_out, size_in), np.float32)
    for i in range(size_out):
        start = i * size_in // size_out
        end = -(-(i + 1) * size_in // size_out)
        weights[i, start:end] = 1 / (end - start)
    return weights


def adaptive_average_pool(features: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Averages of overlapping bins: `[N, H, W, K]` -> `[N, *size, K]`, as PyTorch's."""
    height, width = features.shape[1:3]
    if height != size[0]:
        rows = jnp.asarray(_bin_averages(height, size[0]), features.dtype)
        features = jnp.einsum("ih,nhwk->niwk", rows, features)
    if width != size[1]:
        columns = jnp.asarray(_bin_averages(width, size[1]), features.dtype)
        features = jnp.einsum("jw,nhwk->nhjk", columns, features)
    return features


def _drop(keys, x, *, layer, rate):
    """Dropout of `[N, K]`, each row with a key of its own; the rest is scaled up."""

    def kept(key):
        return jax.random.bernoulli(
            jax.random.fold_in(key, layer), 1.0 - rate, x.shape[1:]
        )

    scale = 1.0 / (1.0 - rate) if rate < 1.0 else 0.0
    return jnp.where(jax.vmap(kept)(keys), x * scale, jnp.zeros_like(x))


class VGG(nn.Module):
    """A VGG network, split at the activations after its last convolution's ReLU.

    The convolutions are called conv1_1, ..., conv5_3 and the dense layers fc6 to fc8.

    Attributes:
      stage_sizes: number of 3x3 convolutions in each stage; a 2x2 max pool follows
        each, the last one belonging to the head.
      stage_widths: number of channels of each stage.
      num_classes: number of logits C.
      dense_features: width of the two hidden dense layers.
      dropout_rate: applied after both, with `train=True` only. It needs `keys`, one for
        each image, or the "dropout" key of Flax.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: accepted as in the other models; there is no BatchNorm to use it.
    """

    stage_sizes: Sequence[int]
    stage_widths: Sequence[int] = (64, 128, 256, 512, 512)
    num_classes: int = 1000
    dense_features: int = 4096
    dropout_rate: float = 0.5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        stages = []
        for i, (size, width) in enumerate(
            zip(self.stage_sizes, self.stage_widths, strict=True)
        ):
            stages.append(
                [
                    nn.Conv(
                        width,
                        (3, 3),
                        padding=1,
                        dtype=self.dtype,
                        kernel_init=nn.initializers.he_normal(),
                        name=f"conv{i + 1}_{j + 1}",
                    )
                    for j in range(size)
                ]
            )
        self.stages = stages
        dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        self.fc6 = dense(self.dense_features, dtype=self.dtype)
        self.fc7 = dense(self.dense_features, dtype=self.dtype)
        self.fc8 = dense(self.num_classes, dtype=jnp.float32)

    def features(self, images, train=False):
        """Activations after the last ReLU, before the last max pool.

        Args:
          images: `[N, H', W', 3]`, at least 32 x 32.
          train: no effect here.

        Returns:
          `[N, H'/16, W'/16, K]` in the compute dtype, non-negative.
        """
        del train
        if min(images.shape[1:3]) < 2 ** len(self.stage_sizes):
            raise ValueError(
                f"images must be at least {2 ** len(self.stage_sizes)} pixels high "
                f"and wide, not {images.shape[1]} x {images.shape[2]}"
            )
        x = images.astype(self.dtype)
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for conv in stage:
                x = nn.relu(conv(x))
        return x

    def head(self, features, train=False, keys=None):
        """Float32 logits `[N, C]` of features `[N, H, W, K]`.

        Args:
          features: `[N, H, W, K]`.
          train: drop out.
          keys: `[N]`, for dropout: an image's draws depend on its own key alone, so
            neither on its neighbours nor on how many devices share the batch. None:
            made from the "dropout" key.
        """
        x = nn.max_pool(features.astype(self.dtype), (2, 2), (2, 2))
        x = adaptive_average_pool(x, (7, 7))
        # Channels first, the order in which PyTorch's dense weights expect them.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        if train and self.dropout_rate and keys is None:
            keys = jax.random.split(self.make_rng("dropout"), x.shape[0])
        for i, dense in enumerate((self.fc6, self.fc7)):
            x = nn.relu(dense(x))
            if train and self.dropout_rate:
                x = _drop(keys, x, layer=i, rate=self.dropout_rate)
        return self.fc8(x)

    def __call__(self, images, train=False, keys=None):
        """Float32 logits `[N, C]` of images `[N, H', W', 3]`; keys as in `head`."""
        return self.head(self.features(images, train), train, keys)


VGG16 = partial(VGG, stage_sizes=(2, 2, 3, 3, 3))
