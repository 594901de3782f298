"""Classifiers split at a tap: `features(images)` and `head(features)`.

Every model here is a linen module with the methods `features(images, train=False)` and
`head(features, train=False, keys=None)`; calling it is head after features. The keys
`[N]`, one for each image, are for a head with dropout.
"""

import difflib
from collections.abc import Callable

import jax
from flax import linen as nn
from jax.tree_util import Partial

from ibsgl_jax.models import own
from ibsgl_jax.models.convnext import ConvNeXt, ConvNeXtSmall, ConvNeXtTiny
from ibsgl_jax.models.efficientnet_lite import (
    EfficientNetLite,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
)
from ibsgl_jax.models.heads import PooledLinear
from ibsgl_jax.models.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    SmallResNet,
)
from ibsgl_jax.models.swin import Swin, SwinSmall, SwinTiny
from ibsgl_jax.models.vgg import VGG, VGG16
from ibsgl_jax.models.vit import (
    DINOv2Base14,
    DINOv2Small14,
    SmallViT,
    ViT,
    ViTBase16,
    ViTSmall16,
)
from ibsgl_jax.tokens import TokenHead

__all__ = [
    "MODELS",
    "VGG",
    "VGG16",
    "BasicBlock",
    "BottleneckBlock",
    "ConvNeXt",
    "ConvNeXtSmall",
    "ConvNeXtTiny",
    "DINOv2Base14",
    "DINOv2Small14",
    "EfficientNetLite",
    "EfficientNetLite0",
    "EfficientNetLite1",
    "EfficientNetLite2",
    "PooledLinear",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "SmallResNet",
    "SmallViT",
    "Swin",
    "SwinSmall",
    "SwinTiny",
    "ViT",
    "ViTBase16",
    "ViTSmall16",
    "attributes",
    "create",
    "make_features_fn",
    "make_head_fn",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_resnet": SmallResNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "vgg16": VGG16,
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite1": EfficientNetLite1,
    "efficientnet_lite2": EfficientNetLite2,
    "convnext_tiny": ConvNeXtTiny,
    "convnext_small": ConvNeXtSmall,
    "swin_tiny": SwinTiny,
    "swin_small": SwinSmall,
    "small_vit": SmallViT,
    "vit_small16": ViTSmall16,
    "vit_base16": ViTBase16,
    "deit_small16": ViTSmall16,
    "deit_base16": ViTBase16,
    "dinov2_small14_reg4": DINOv2Small14,
    "dinov2_base14_reg4": DINOv2Base14,
}


def create(name: str, *, num_classes: int, tap: str = "", **options) -> nn.Module:
    """The model called `name`, without its variables.

    Args:
      name: a key of `MODELS`, or "package.module:Class" of your own, see `own`.
      num_classes: number of logits C.
      tap: a layer whose output are the features, in the place of the model's own, as
        `tapping.layer_names` names it; then `image_size`, the side of the images, is
        needed among the options.
      **options: further attributes of the model (`dtype`, `axis_name`, ...).

    Returns:
      A linen module.

    Raises:
      ValueError: for an unknown name, in a message that holds the nearest ones; for a
        class of your own that is none, or not what `own` says.
    """
    if own.is_name(name):
        return own.make(name, num_classes=num_classes, tap=tap, **options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, cutoff=0.4) or MODELS
        raise ValueError(f"no model {name!r}; nearest names: {', '.join(near)}")
    if tap:
        return own.adapt(MODELS[name], num_classes=num_classes, tap=tap, **options)
    return MODELS[name](num_classes=num_classes, **options)


def attributes(name: str) -> frozenset[str]:
    """The names of the attributes that `create` takes for a model, as of `create`."""
    return own.attributes(own.find(name) if own.is_name(name) else MODELS.get(name))


def make_features_fn(model: nn.Module, variables) -> Callable[[jax.Array], jax.Array]:
    """A function images `[N, H', W', 3]` -> features `[N, H, W, K]`, in eval mode.

    Of a transformer the features are tokens `[N, T, D]`.

    A pytree that holds the variables: as an argument of a jitted function it keeps
    them out of the compiled program.
    """

    def features_fn(variables, images):
        return model.apply(variables, images, method="features")

    return Partial(features_fn, variables)


def make_head_fn(
    model: nn.Module, variables, *, train: bool = False, **arrays
) -> Callable[[jax.Array], jax.Array]:
    """A function features `[N, H, W, K]` -> float32 logits `[N, C]`.

    Args:
      model: with a method head.
      variables: its params and batch_stats.
      train: in training mode: BatchNorm by the moments of the features that it is
        given, its running statistics having no part.
      **arrays: keyword arguments of `model.apply` in training mode, of dropout (`keys`
        or `rngs`).

    Returns:
      A `PooledLinear` where the model's head is one (it has a `pooled_linear` method),
      the same in both modes, else a pytree that holds the variables, as from
      `make_features_fn`; of tokens one that knows their grid (the model's
      `token_layout`), a `tokens.TokenHead`.
    """
    if hasattr(model, "pooled_linear"):
        return model.pooled_linear(variables)

    def head_fn(variables, features, **arrays):
        if not train:
            return model.apply(variables, features, method="head")
        logits, _ = model.apply(
            variables,
            features,
            train=True,
            method="head",
            mutable=["batch_stats"],
            **arrays,
        )
        return logits

    head = Partial(head_fn, variables, **arrays)
    layout = getattr(model, "token_layout", None)
    return head if layout is None else TokenHead(head, layout)
