"""Vision transformers with a tap at their last attention; imports only jax and flax.

ViT and DeiT, and DINOv2 with its registers and layer scales. The features are tokens
[N, T, D], the class token and the registers before the image's; ``tokens`` reads them
as a map. Where the class token alone is classified, the last thing that it learns of
the image is what its last attention reads: the features are the image's tokens behind
that block's first LayerNorm (and the prefix as the block before leaves it). Before the
LayerNorm a gradient times the features would be zero, whatever they say: the LayerNorm
does not see their scale. Where the image's tokens are averaged, the features are those
behind the last LayerNorm.

References: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Touvron et
al., "Training data-efficient image transformers", ICML 2021; Oquab et al., "DINOv2",
2023; Darcet et al., "Vision Transformers Need Registers", ICLR 2024.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ibsgl_jax.models.attention import Attention
from ibsgl_jax.models.normalize import layer_normalize
from ibsgl_jax.tokens import Layout

POOLS = ("class", "mean", "class_mean")
_init = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """Attention and two dense layers, each behind a LayerNorm and beside a shortcut."""

    width: int
    num_heads: int
    mlp_width: int
    layer_scale: bool = False
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    def setup(self):
        norm = partial(nn.LayerNorm, self.epsilon, self.dtype, use_fast_variance=False)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_init)
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(self.num_heads, self.dtype)
        self.fc1, self.fc2 = dense(self.mlp_width), dense(self.width)
        if self.layer_scale:
            start = nn.initializers.constant(1e-5)
            self.scale1 = self.param("scale1", start, (self.width,))
            self.scale2 = self.param("scale2", start, (self.width,))

    def normalized(self, x):
        """What the attention reads of tokens."""
        return layer_normalize(self.norm1, x)

    def finish(self, x, others):
        """The block's tokens x, [N, Q, D], given all that the attention reads."""
        read = others[:, : x.shape[1]]
        x = x + self._scaled(self.attention(read, others), "scale1")
        y = self.fc1(layer_normalize(self.norm2, x))
        y = self.fc2(nn.gelu(y, approximate=False))
        return x + self._scaled(y, "scale2")

    def __call__(self, x):
        return self.finish(x, self.normalized(x))

    def _scaled(self, y, name):
        if not self.layer_scale:
            return y
        return y * getattr(self, name).astype(y.dtype)[None, None]


class ViT(nn.Module):
    """A vision transformer, split at its last attention or before its pooling.

    Attributes:
      depth: number of blocks.
      width: D.
      num_heads: of the attention.
      patch_size: side of a patch in pixels.
      image_size: of the images, in pixels: a side or (height, width). What does not
        fill a patch is left out.
      num_classes: number of logits C.
      mlp_ratio: width of the blocks' inner layer, in widths.
      num_registers: tokens beside the class token, without a place.
      layer_scale: a learnt factor for each channel of a block's branches.
      pool: what the classifier sees behind the last LayerNorm: "class", the class
        token, and the features are what the last attention reads; "mean", that of the
        image's tokens, or "class_mean", both side by side, and the features are behind
        the last LayerNorm.
      epsilon: of the LayerNorms.
      dtype: compute dtype; parameters and logits are float32.
      axis_name: accepted as in the other models; there is no BatchNorm to use it.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    num_classes: int = 1000
    mlp_ratio: int = 4
    num_registers: int = 0
    layer_scale: bool = False
    pool: str = "class"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    axis_name: str | None = None

    # Features may be negative: guide with rectify_features=False.
    signed_features = True

    @property
    def token_layout(self) -> Layout:
        """Grid and prefix of the features' tokens."""
        height, width = self._image_sides()
        grid = height // self.patch_size, width // self.patch_size
        return Layout(grid, 1 + self.num_registers)

    def _image_sides(self):
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def setup(self):
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r}: choose one of {POOLS}")
        if min(self.token_layout.grid) < 1:
            raise ValueError(
                f"image_size={self.image_size}: smaller than a patch of "
                f"{self.patch_size}"
            )
        patch = (self.patch_size,) * 2
        self.patch_embed = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_init,
        )
        num_cells = self.token_layout.grid[0] * self.token_layout.grid[1]
        self.class_token = self.param("class_token", _init, (1, 1, self.width))
        self.class_position = self.param("class_position", _init, (1, 1, self.width))
        self.position = self.param("position", _init, (1, num_cells, self.width))
        if self.num_registers:
            self.registers = self.param(
                "registers", _init, (1, self.num_registers, self.width)
            )
        self.blocks = [
            Block(
                self.width,
                self.num_heads,
                self.mlp_ratio * self.width,
                self.layer_scale,
                self.epsilon,
                self.dtype,
                name=f"block{i}",
            )
            for i in range(self.depth)
        ]
        self.norm = nn.LayerNorm(self.epsilon, self.dtype, use_fast_variance=False)
        self.fc = nn.Dense(self.num_classes, dtype=jnp.float32)

    def features(self, images, train=False):
        """The tokens that the last attention, or the pooling, reads.

        Args:
          images: `[N, H', W', 3]` of `image_size`.
          train: no effect here.

        Returns:
          `[N, T, D]` in the compute dtype, T as `token_layout` says; signed.

        Raises:
          ValueError: images of another size.
        """
        del train
        size, sides = self._image_sides(), tuple(images.shape[1:3])
        if sides != size:
            raise ValueError(
                f"images are {sides[0]} x {sides[1]}, the model takes {size[0]} x "
                f"{size[1]}: build it with image_size={sides}"
            )
        x = self.patch_embed(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.width) + self.position.astype(self.dtype)
        before = [self.class_token + self.class_position]
        if self.num_registers:
            before.append(self.registers)
        prefix = jnp.concatenate(before, axis=1).astype(self.dtype)
        prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
        x = jnp.concatenate([prefix, x], axis=1)
        for block in self.blocks[:-1]:
            x = block(x)
        if self.pool != "class":
            return layer_normalize(self.norm, self.blocks[-1](x))
        read = self.blocks[-1].normalized(x)
        first = self.token_layout.prefix
        return jnp.concatenate([x[:, :first], read[:, first:]], axis=1)

    def head(self, features, train=False, keys=None):
        """Float32 logits `[N, C]` of tokens `[N, T, D]`; keys are not used."""
        del train, keys
        x = features.astype(self.dtype)
        first = self.token_layout.prefix
        if self.pool == "class":
            last, before = self.blocks[-1], x[:, :first]
            read = jnp.concatenate([last.normalized(before), x[:, first:]], axis=1)
            x = layer_normalize(self.norm, last.finish(before, read))
        x = x.astype(jnp.float32)
        pooled = []
        if self.pool != "mean":
            pooled.append(x[:, 0])
        if self.pool != "class":
            pooled.append(jnp.mean(x[:, first:], axis=1))
        return self.fc(jnp.concatenate(pooled, axis=-1))

    def __call__(self, images, train=False, keys=None):
        """Float32 logits `[N, C]` of images `[N, H', W', 3]`."""
        return self.head(self.features(images, train), train, keys)


_small = partial(ViT, depth=12, width=384, num_heads=6)
_base = partial(ViT, depth=12, width=768, num_heads=12)
_dino: dict[str, Any] = {"patch_size": 14, "num_registers": 4, "layer_scale": True}
_dino |= {"pool": "class_mean"}

ViTSmall16 = _small
ViTBase16 = _base
DINOv2Small14 = partial(_small, **_dino)
DINOv2Base14 = partial(_base, **_dino)

# For 48x48 images: 12 x 12 patches of 4 pixels, 4 blocks, 213,000 parameters.
SmallViT = partial(
    ViT, depth=4, width=64, num_heads=4, patch_size=4, image_size=48, mlp_ratio=4
)
