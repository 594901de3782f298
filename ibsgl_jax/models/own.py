"""A model of your own by its name, "package.module:Class", and what it must be.

The contract: a linen module, its layers made in ``setup``, all of whose attributes but
``num_classes`` have defaults, with

    features(images, train=False)   images [N, H', W', 3] -> [N, H, W, K], or tokens
                                    [N, T, D], and
    head(features, train=False)     features -> logits [N, C], C = num_classes,

and ``__call__(images, train=False)``, the head of the features. Features with a sign
(not behind a ReLU) are guided with ``rectify_features=False``. Its variables are params
and, of BatchNorm, batch_stats. What may stand beside:

- attributes ``dtype`` (of the computation) and ``axis_name`` (over which BatchNorm
  averages while several devices train);
- an argument ``keys`` [N] of ``head``, a key for each image, for dropout;
- a class attribute ``signed_features = True``: the trainer then refuses to guide with
  ``rectify_features``, which would clip them;
- an attribute ``token_layout``, a ``tokens.Layout``, where the tokens' grid is not the
  square that their number admits;
- a method ``pooled_linear(variables)``, a `PooledLinear`, of a head that is a mean over
  space and a dense layer: a bottleneck's map then costs next to nothing.
"""

import dataclasses
import importlib
import inspect

import jax
import jax.numpy as jnp
from flax import linen as nn

from ibsgl_jax import tokens


def is_name(name) -> bool:
    """Whether a model's name is that of a class, not a key of ``models.MODELS``."""
    return isinstance(name, str) and ":" in name


def find(name: str) -> type[nn.Module]:
    """The class of "package.module:Class".

    Its module is imported, so it runs what the module holds; nothing else is called.

    Raises:
      ValueError: it cannot be imported, or is no linen module with features and head.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot import {module_name!r} ({type(error).__name__}: {reason})"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"module {module_name!r} has no {class_name!r}")
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"{class_name} is no class of flax.linen.Module")
    if "num_classes" not in (field.name for field in dataclasses.fields(found)):
        raise ValueError(f"{class_name} has no attribute num_classes")
    for method, arguments in (("features", "images"), ("head", "features")):
        if not callable(getattr(found, method, None)):
            raise ValueError(
                f"{class_name} has no method {method}({arguments}, train=False)"
            )
        if "train" not in inspect.signature(getattr(found, method)).parameters:
            raise ValueError(f"{class_name}.{method} takes no argument train")
    return found


def check(model: nn.Module, image_size: int) -> None:
    """That a model gives what the contract says; no array is made.

    Args:
      model: linen module with a ``num_classes``.
      image_size: side of its square images, in pixels.

    Raises:
      ValueError: what it gives instead. Whatever it raises itself passes through.
    """
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    others = sorted(set(variables) - {"params", "batch_stats"})
    if others:
        raise ValueError(f"has variables in {others[0]!r}; params and batch_stats go")

    def forward(variables, images):
        features = model.apply(variables, images, method="features")
        return features, model.apply(variables, features, method="head")

    features, logits = jax.eval_shape(forward, variables, images)
    if len(features.shape) not in (3, 4) or features.shape[0] != 2:
        raise ValueError(f"features gives {list(features.shape)}, not [N, H, W, K]")
    layout = getattr(model, "token_layout", None)
    if len(features.shape) == 3:
        given = {} if layout is None else layout._asdict()
        tokens.find(features.shape[1], (image_size, image_size), **given)
    if logits.shape != (2, model.num_classes):
        raise ValueError(
            f"head gives {list(logits.shape)}, not [N, C] of "
            f"num_classes={model.num_classes}"
        )
    whole = jax.eval_shape(model.apply, variables, images)
    if whole.shape != logits.shape:
        raise ValueError(f"calling it gives {list(whole.shape)}, not what head gives")
