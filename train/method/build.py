"""What is made of a configuration: model, optimizer and the steps of its phases."""

import functools

import jax
import jax.numpy as jnp
import optax

from ibsgl_jax import guidance, models
from ibsgl_jax.bottleneck import BottleneckConfig
from train.data import dataset
from train.devices import AXIS, over_devices
from train.errors import ConfigError
from train.method import rivals
from train.method.guided import guided_step
from train.method.step import eval_step, plain_step


def guidance_config(phase) -> guidance.GuidanceConfig:
    """The guidance options of a phase as the library takes them."""
    return guidance.GuidanceConfig(
        bottleneck=BottleneckConfig(**phase.bottleneck), **phase.guidance
    )


def make_model(config, num_classes: int, *, axis_name: str | None = None):
    """The config's model; with axis_name, BatchNorm averages over devices."""
    try:
        return models.create(
            config.model,
            num_classes=num_classes,
            dtype=jnp.dtype(config.dtype),
            axis_name=axis_name,
            **config.model_options,
        )
    except TypeError as error:
        raise ConfigError(f"model_options of {config.model}: {error}") from error


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


def make_step(
    config, phase, steps_per_epoch, *, generation, model, tx, axis_name: str = AXIS
):
    """The phase's step of one device: a pure function of (state, batch)."""
    bound = dict(
        model=model,
        tx=tx,
        base_key=make_base_key(config, generation),
        image_stats=dataset.image_stats(config),
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        skip_nonfinite=config.skip_nonfinite,
        axis_name=axis_name,
    )
    if phase.method == "plain":
        return functools.partial(plain_step, **bound)
    if phase.method in rivals.STEPS:
        return functools.partial(
            rivals.STEPS[phase.method], **rivals.options(phase), **bound
        )
    warmup = max(1, round(phase.mu_warmup_epochs * steps_per_epoch))
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    last = num_steps - round(phase.release * num_steps)
    when = None
    if phase.every > 1 or last < num_steps:

        def when(step):
            return (step % phase.every == 0) & (step < last)

    return functools.partial(
        guided_step,
        config=guidance_config(phase),
        mu=lambda step: phase.mu * jnp.minimum(1.0, (step + 1) / warmup),
        # Per part of a batch, so that a step forgets as much as in one piece.
        decay=phase.stats_decay ** (1.0 / config.accumulate_steps),
        teacher="frozen" if phase.teacher in config.phases else phase.teacher,
        teacher_layer=phase.teacher_layer,
        route=phase.route,
        when=when,
        only_right=phase.only_right,
        **bound,
    )


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


def generation_of(config, name) -> int:
    """How many phases stand between this one and random or pretrained weights."""
    init = config[name].init
    return 0 if init not in config.phases else 1 + generation_of(config, init)
