"""The classifier that --model, --weights or --checkpoint name, split at a layer."""

import difflib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.tree_util import Partial

from ibsgl_jax import (
    attribution,
    feature_stats,
    imagenet_classes,
    models,
    pretrained,
    tapping,
    trained,
)
from ibsgl_jax.app import terminal
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.errors import UserError
from ibsgl_jax.targets import two_classes, two_logits


class Classifier(NamedTuple):
    """A classifier with everything that photos need.

    Attributes:
      name: for people and for the JSON.
      model: a Linen module.
      variables: its parameters and batch statistics.
      class_names: C names; two for a model with one logit.
      preprocessing: as ``pretrained.preprocessing`` returns.
      weights_path: the file the weights came from, or None.
      stats: of its last convolutional features while it was trained, or None.
      link: of its logits, of one of ``predictions.LINKS``; a single logit is made two,
        of a softmax.
    """

    name: str
    model: Any
    variables: Any
    class_names: Sequence[str]
    preprocessing: Any
    weights_path: Path | None
    stats: feature_stats.FeatureStats | None = None
    link: str = "softmax"


def load(
    model: str, *, weights: str | None = None, checkpoint: str | None = None
) -> Classifier:
    """The classifier of a name and a weights file, or of a training run.

    Args:
      model: a key of ``models.MODELS``; a checkpoint knows its own.
      weights: file; None takes those of an installed package.
      checkpoint: folder of a run of ``python -m train``, or one of its model files.

    Raises:
      UserError: in one line.
    """
    if checkpoint is not None:
        return _load_checkpoint(checkpoint)
    if model not in models.MODELS:
        near = difflib.get_close_matches(model, models.MODELS, cutoff=0.4)
        raise UserError(
            f"no model {model!r}; nearest names: {', '.join(near or models.MODELS)}"
        )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            network, variables = pretrained.load(model, weights)
        preprocessing = pretrained.preprocessing(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--weights {weights}: {reason}") from None
    for warning in told:
        if issubclass(warning.category, UserWarning):
            terminal.warn(str(warning.message))
    return Classifier(
        name=model,
        model=network,
        variables=variables,
        class_names=_two_names(_class_names(network.num_classes)),
        preprocessing=preprocessing,
        weights_path=Path(weights) if weights else None,
    )


def _load_checkpoint(run: str) -> Classifier:
    try:
        path = trained.find(run)
        found = trained.load(path)
    except ValueError as error:
        raise UserError(f"--checkpoint {error}") from None
    return Classifier(
        name=found.name,
        model=found.model,
        variables=found.variables,
        class_names=_two_names(found.class_names),
        preprocessing=found.preprocessing,
        weights_path=path,
        stats=found.stats,
        link=found.link if len(found.class_names) > 1 else "softmax",
    )


def _class_names(num_classes: int) -> list[str]:
    if num_classes == 1000:
        try:
            return imagenet_classes.names()
        except ValueError as error:
            terminal.warn(str(error))
    return [f"class {i}" for i in range(num_classes)]


def _two_names(names: Sequence[str]) -> list[str]:
    return [f"not {names[0]}", names[0]] if len(names) == 1 else list(names)


def parse_class(text: str | None, class_names: Sequence[str]) -> int | None:
    """A number, a name, or a part of exactly one name.

    Raises:
      UserError: no class, or several, with the nearest names.
    """
    if text is None:
        return None
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit():
        if text != digits or len(digits) > 9 or int(digits) >= len(class_names):
            raise UserError(
                f"--class {text}: class {text} is out of range: the model's classes "
                f"are 0 to {len(class_names) - 1}"
            )
        return int(digits)
    lowered = [name.lower() for name in class_names]
    wanted = text.lower()
    if wanted in lowered:
        return lowered.index(wanted)
    inside = [i for i, name in enumerate(lowered) if wanted in name]
    if len(inside) == 1:
        return inside[0]
    near = [class_names[i] for i in inside]
    if not near:
        close = difflib.get_close_matches(wanted, lowered, n=5, cutoff=0.4)
        near = [class_names[lowered.index(name)] for name in close]
    nearest = f"; nearest names: {', '.join(near[:8])}" if near else ""
    kind = "several classes have it in their name" if inside else "no such class"
    raise UserError(f"--class {text!r}: {kind}{nearest}")


def split(classifier: Classifier, layer: str | None) -> tuple[Callable, Callable]:
    """The features_fn and head_fn at a layer, as pytrees that carry the weights.

    Of a model with one logit the head has two: see ``two_classes``.

    Args:
      classifier: from ``load``.
      layer: a name of ``tapping.layer_names``; None for the last features.

    Raises:
      UserError: there is no such layer.
    """
    model, variables = classifier.model, classifier.variables
    if layer is None:
        features_fn = models.make_features_fn(model, variables)
        head_fn = models.make_head_fn(model, variables)
    else:
        size = classifier.preprocessing.size
        try:
            features_fn, head_fn = tapping.linen(
                model, variables, layer, image_shape=(size, size, 3)
            )
        except ValueError as error:
            raise UserError(f"--layer: {error}") from None
    return features_fn, two_classes(head_fn) if model.num_classes == 1 else head_fn


def make_tapped_fn(classifier: Classifier) -> Callable:
    """What FullGrad needs: see ``attribution.make_tapped_fn``."""
    tapped_fn = attribution.make_tapped_fn(classifier.model, classifier.variables)
    if classifier.model.num_classes != 1:
        return tapped_fn

    def two(tapped_fn, images, perturbations):
        logits, biases = tapped_fn(images, perturbations)
        return two_logits(logits), biases

    return Partial(two, tapped_fn)


def method_options(method: str, head_fn: Callable, link: str) -> dict:
    """Options of a method; at the last layer IBA's ten steps are too few for a map."""
    if method != "ib":
        return {}
    options: dict = {"loss": link}
    if isinstance(head_fn, models.PooledLinear):
        options["config"] = BottleneckConfig(num_steps=20)
    return options


def parse_methods(text: str) -> list[str]:
    """The methods of a comma-separated list, without repetition.

    Raises:
      UserError: none, or an unknown one with the nearest names.
    """
    methods = [name.strip() for name in text.split(",") if name.strip()]
    if not methods:
        raise UserError("--method: give at least one")
    for method in methods:
        if method not in attribution.METHODS:
            near = difflib.get_close_matches(method, attribution.METHODS, cutoff=0.4)
            raise UserError(
                f"no method {method!r}; nearest names: "
                f"{', '.join(near or attribution.METHODS)}"
            )
    return list(dict.fromkeys(methods))
