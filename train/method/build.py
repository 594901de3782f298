"""What is made of a configuration: model, optimizer and the steps of its phases."""

import dataclasses
import functools
import inspect
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from ibsgl_jax import models, tapping
from train.data import dataset
from train.devices import AXIS, over_devices
from train.errors import ConfigError
from train.method import (
    energy,
    guided,
    icasc,
    masktune,
    rand_r4,
    rrr,
    saliency_guided,
    teacher,
)
from train.method.state import layer_name
from train.method.step import eval_step, train_step

# A method is a penalty: ``(model, phase, context) -> penalty_fn``, or None for none.
METHODS = {
    "plain": lambda model, phase, context: None,
    "guided": guided.from_phase,
    "saliency_guided": saliency_guided.from_phase,
    "icasc": icasc.from_phase,
    "rrr": rrr.from_phase,
    "energy": energy.from_phase,
    "rand_r4": rand_r4.from_phase,
    "masktune": masktune.from_phase,
}
# Those that know several labels per image; and those that read the objects' masks.
OF_SEVERAL_LABELS = ("plain", "guided")
MASKED = ("rrr", "energy", "rand_r4")


def mask_readers(phase) -> list[str]:
    """The fields by which a phase reads the objects' masks; none if it reads none."""
    found = {
        "teacher": phase.get("teacher") == "mask",
        "mask_first": phase.get("mask_first", False),
        "method": phase.method in MASKED,
    }
    return [field for field, reads in found.items() if reads]


def make_model(config, num_classes: int, *, axis_name: str | None = None):
    """The config's model; with axis_name, BatchNorm averages over devices.

    Raises:
      ConfigError: there is no such model, or it has no such options.
    """
    options = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    try:
        # A model of one's own need not have both.
        there = models.attributes(config.model)
        options = {name: v for name, v in options.items() if name in there}
        return models.create(
            config.model, num_classes=num_classes, **options, **model_options(config)
        )
    except TypeError as error:
        raise ConfigError(f"model_options of {config.model}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"model={config.model!r}: {error}") from error


def with_model(config, model):
    """The config with a model from Python in its fields model and model_options.

    Args:
      config: ConfigDict; it is not changed.
      model: a class, as ``ibsgl_jax.models.own`` says, or a linen module of one, whose
        number of classes, ``dtype`` and ``axis_name`` are those of the run; None for
        the config's own.

    Raises:
      ConfigError: a class that no other process could find by its name, or an
        attribute that no file can hold.
    """
    if model is None:
        return config
    kind = model if inspect.isclass(model) else type(model)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if "." in kind.__qualname__:
        raise ConfigError(
            f"model {kind.__qualname__} is made inside another name: move its class to "
            "the top of its module, where the run can be read back"
        )
    config = ConfigDict(config.to_dict())
    config.model = name
    if kind is not model and isinstance(model, nn.Module):
        config.model_options = ConfigDict(_options_of(model))
    elif kind is not model:
        raise ConfigError(f"model of {name}: give its class, which the run makes")
    return config


def _options_of(model: nn.Module) -> dict:
    """The attributes of a linen module that are not its defaults."""
    taken = ("parent", "name", "num_classes", "dtype", "axis_name")
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in taken and getattr(model, field.name) != field.default
    }
    for name, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"model: its {name} is a {type(value).__name__}, which no config.json "
                "holds; give a class that has it as its default"
            ) from None
    return options


def model_options(config) -> dict:
    """The model's options: the config's, its tap, and its image size where it asks."""
    options = config.model_options.to_dict()
    tap = config.get("tap", "")  # runs of an earlier version have none
    if tap:
        options["tap"] = tap
    if tap or "image_size" in models.attributes(config.model):
        options.setdefault("image_size", config.image_size)
    return options


def make_schedule(learning_rate: float, num_steps: int, warmup_steps: int):
    """Linear warm-up from zero, then a cosine down to zero at num_steps."""
    cosine = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(optimizer, schedule) -> optax.GradientTransformation:
    """The optimizer that ``config.optimizer`` describes.

    Weight decay leaves out every parameter of rank below two: biases, and the scales
    and offsets of normalisation.

    Args:
      optimizer: fields name ("adam" or "sgd"), weight_decay, momentum (sgd), and
        max_grad_norm (0 for no clipping).
      schedule: step -> learning rate.
    """
    chain = []
    if optimizer.max_grad_norm:
        chain.append(optax.clip_by_global_norm(optimizer.max_grad_norm))
    decay = optax.add_decayed_weights(
        optimizer.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    if optimizer.name == "adam":
        chain += [optax.scale_by_adam(), decay]
    elif optimizer.name == "sgd":
        # Decay before momentum: the usual L2 penalty of the ResNet recipes.
        chain += [decay, optax.trace(optimizer.momentum, nesterov=True)]
    else:
        raise ValueError(f"optimizer {optimizer.name!r}: choose 'adam' or 'sgd'")
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))


class Context(NamedTuple):
    """What a method may ask beside its phase.

    Attributes:
      steps_per_epoch, num_steps: of the phase.
      phases: names of the run's phases.
      accumulate_steps: parts that a device takes its batch in.
      axis_name: of the devices, or None.
      link: of the data, of ``predictions.LINKS``.
      platform: of the devices ("cpu", "tpu", ...); None for any.
    """

    steps_per_epoch: int
    num_steps: int
    phases: tuple[str, ...]
    accumulate_steps: int
    axis_name: str | None
    link: str = "softmax"
    platform: str | None = None


def make_penalty(
    config, phase, steps_per_epoch, model, axis_name=AXIS, *, platform=None
):
    """The penalty of the phase's method, ``Forward -> (penalty, statistics, sums)``.

    Raises:
      ValueError: a field of the phase that cannot be.
    """
    context = Context(
        steps_per_epoch=steps_per_epoch,
        num_steps=max(1, round(phase.num_epochs * steps_per_epoch)),
        phases=tuple(config.phases),
        accumulate_steps=config.accumulate_steps,
        axis_name=axis_name,
        link=config.get("link", "softmax"),
        platform=platform,
    )
    return METHODS[phase.method](model, phase, context)


def make_step(
    config,
    phase,
    steps_per_epoch,
    *,
    generation,
    model,
    tx,
    class_weights=None,
    axis_name: str = AXIS,
    platform: str | None = None,
):
    """The phase's step of one device: a pure function of (state, batch)."""
    penalty_fn = make_penalty(
        config, phase, steps_per_epoch, model, axis_name, platform=platform
    )
    return functools.partial(
        train_step,
        penalty_fn=penalty_fn,
        layer=taught_layer(phase, model, config.image_size),
        model=model,
        tx=tx,
        base_key=make_base_key(config, generation),
        image_stats=dataset.image_stats(config),
        class_weights=class_weights,
        learning=learning_layers(config, phase, model),
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        skip_nonfinite=config.skip_nonfinite,
        axis_name=axis_name,
    )


def taught_layer(phase, model, image_size: int) -> str:
    """The inner layer that the network teaches itself at; "" for none."""
    if phase.get("teacher") not in teacher.METHODS:
        return ""
    return layer_name(model, phase.teacher_layer, (image_size, image_size, 3))


def make_base_key(config, generation):
    """What all draws of a phase come from."""
    return jax.random.fold_in(jax.random.key(config.seed), generation + 1)


def make_eval_fn(config, model):
    """variables, sharded batch -> dict of (sum, count), over all devices."""
    step = functools.partial(
        eval_step,
        model=model,
        image_stats=dataset.image_stats(config),
        axis_name=AXIS,
    )
    return over_devices(step, in_axes=(None, 0), out_axes=None)


LAYERS = ("all", "head")


def learning_layers(config, phase, model) -> tuple[str, ...] | None:
    """Names in ``params`` of the layers that learn in a phase; None for all."""
    if phase.get("layers", "all") == "all":
        return None
    side = config.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = jax.eval_shape(
        lambda *inputs: model.apply(*inputs, method="features"), variables, images
    )
    return tuple(tapping.used(functools.partial(_head, model), variables, features))


def _head(model, params, others, features):
    return model.apply({**others, "params": params}, features, method="head")


def candidates(config, name) -> list[str]:
    """The phases that ``init = "best"`` chooses from: earlier, plain, on their own."""
    earlier = config.phases[: config.phases.index(name)]
    return [
        other
        for other in earlier
        if config[other].method == "plain" and config[other].init != "best"
    ]


def generation_of(config, name) -> int:
    """How many phases stand between this one and random or pretrained weights."""
    init = config[name].init
    before = candidates(config, name) if init == "best" else [init]
    return max(
        (
            1 + generation_of(config, other)
            for other in before
            if other in config.phases
        ),
        default=0,
    )
