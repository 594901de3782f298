"""A model of your own by its name, "package.module:Class", and what it must be.

The contract: a linen module, its layers made in ``setup``, all of whose attributes but
``num_classes`` have defaults, or an NNX module, made by ``Class(num_classes=...,
rngs=...)``, with

    features(images, train=False)   images [N, H', W', 3] -> [N, H, W, K], or tokens
                                    [N, T, D], and
    head(features, train=False)     features -> logits [N, C], C = num_classes,

and ``__call__(images, train=False)``, the head of the features. Features with a sign
(not behind a ReLU) are guided with ``rectify_features=False``. Its variables are params
and, of BatchNorm, batch_stats. What may stand beside:

- attributes ``dtype`` (of the computation) and ``axis_name`` (over which BatchNorm
  averages while several devices train);
- an argument ``keys`` [N] of ``head``, a key for each image, for dropout (linen);
- a class attribute ``signed_features = True``: the trainer then refuses to guide with
  ``rectify_features``, which would clip them;
- an attribute ``token_layout``, a ``tokens.Layout``, where the tokens' grid is not the
  square that their number admits;
- a method ``pooled_linear(variables)``, a `PooledLinear`, of a head that is a mean over
  space and a dense layer: a bottleneck's map then costs next to nothing.

A class without features and head, its layers made in any way, goes with ``tap``, the
layer whose output are the features; its ``__call__(images)`` gives the logits, and an
argument of it called train, training, is_training, deterministic or
use_running_average is set. An NNX module needs no such argument: it is told by its
``train()`` and ``eval()``; its variables are ``nnx.Param`` and ``nnx.BatchStat``.
"""

import importlib
import inspect

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ibsgl_jax import tapping, tokens
from ibsgl_jax.models import adapted


def is_name(name) -> bool:
    """Whether a model's name is that of a class, not a key of ``models.MODELS``."""
    return isinstance(name, str) and ":" in name


def find(name: str) -> type:
    """The class of "package.module:Class".

    Its module is imported, so it runs what the module holds; nothing else is called.

    Raises:
      ValueError: it cannot be imported, or is no class of linen or NNX modules.
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
    if not (inspect.isclass(found) and issubclass(found, nn.Module | nnx.Module)):
        raise ValueError(f"{class_name} is no class of flax.linen.Module or nnx.Module")
    for needed in ("num_classes", *(["rngs"] if issubclass(found, nnx.Module) else [])):
        if needed not in attributes(found):
            raise ValueError(f"{class_name} has no attribute {needed}")
    return found


def attributes(kind) -> frozenset[str]:
    """The names of what a class, or a function that makes a model, takes."""
    kind = getattr(kind, "func", kind)
    if inspect.isclass(kind) and issubclass(kind, nnx.Module):
        return frozenset(inspect.signature(kind.__init__).parameters) - {"self"}
    return frozenset(getattr(kind, "__dataclass_fields__", ()))


def make(name: str, *, num_classes: int, tap: str = "", **options) -> nn.Module:
    """The model of a class; arguments and Raises as of ``models.create``."""
    kind = find(name)
    if not tap:
        _check_methods(kind)
    if not tap and issubclass(kind, nn.Module):
        return kind(num_classes=num_classes, **options)
    return adapt(kind, num_classes=num_classes, tap=tap, **options)


def adapt(kind, *, num_classes: int, tap: str = "", image_size: int = 0, **options):
    """What a class makes as a model, tapped or of NNX: an `adapted.Adapted`.

    Raises:
      TypeError: options that the class does not take.
      ValueError: ``tap`` without ``image_size``.
    """
    if tap and not image_size:
        raise ValueError(f"tap={tap!r} asks for image_size, the side of the images")
    known = attributes(kind)
    options["num_classes"] = num_classes
    if "image_size" in known:
        options["image_size"] = image_size
    for option in options:
        if option not in known:
            name = getattr(kind, "func", kind).__name__
            raise TypeError(f"{name} takes no argument {option!r}")
    is_nnx = inspect.isclass(kind) and issubclass(kind, nnx.Module)
    source = (adapted.NNX if is_nnx else adapted.Linen)(kind, tuple(options.items()))
    return adapted.Adapted(num_classes, source, tap, image_size)


def _check_methods(kind):
    """That a class has features and head, each told whether it trains."""
    for method, arguments in (("features", "images"), ("head", "features")):
        if not callable(getattr(kind, method, None)):
            raise ValueError(
                f"{kind.__name__} has no method {method}({arguments}, train=False); "
                "add it, or name a layer whose output the features are in tap"
            )
        is_told = issubclass(kind, nnx.Module)  # by its train() and eval()
        names = inspect.signature(getattr(kind, method)).parameters
        if not is_told and "train" not in names:
            raise ValueError(f"{kind.__name__}.{method} takes no argument train")


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
    if tap := getattr(model, "tap", ""):  # that there is such a layer, and it cuts
        jax.eval_shape(
            lambda variables: tapping.linen(
                model, variables, tap, image_shape=images.shape[1:]
            ),
            variables,
        )

    def forward(variables, images):
        features = model.apply(variables, images, method="features")
        return features, model.apply(variables, features, method="head")

    def train(variables, images):
        told = dict(
            train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )
        features, updated = model.apply(variables, images, method="features", **told)
        return model.apply({**variables, **updated}, features, method="head", **told)

    jax.eval_shape(train, variables, images)
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
