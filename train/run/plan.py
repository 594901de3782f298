"""What a phase will do, known and checked for all phases before anything is written."""

from typing import Any, NamedTuple

import numpy as np

from train.data import dataset, transforms
from train.devices import AXIS
from train.errors import ConfigError
from train.method.build import make_model, make_optimizer, make_schedule
from train.run.start import check_start


class Plan(NamedTuple):
    """A phase that fits its data.

    Attributes:
      name, phase: its name and its section of the configuration.
      source: the examples it learns from.
      steps_per_epoch, num_steps, save_every: in steps.
      schedule: step -> learning rate.
      model: its BatchNorm averages over the devices.
      tx: optax transformation.
      class_weights: tuple of a float per class, or None.
    """

    name: str
    phase: Any
    source: Any
    steps_per_epoch: int
    num_steps: int
    save_every: int
    schedule: Any
    model: Any
    tx: Any
    class_weights: tuple[float, ...] | None = None


def plan_phases(config, data) -> list[Plan]:
    """A plan for every phase of a run.

    Raises:
      ConfigError: a phase that its data, or the weights it starts from, do not fit.
    """
    _check_transforms(config, data)
    weights = dataset.class_weights(config, data)
    return [
        _plan(config, name, data)._replace(class_weights=weights)
        for name in config.phases
    ]


def _check_transforms(config, data):
    """That an example comes out of them as large as the model wants it.

    Raises:
      ConfigError, DatasetError: it does not, or a transform lacks something.
    """
    for source, table, name in (
        (data.train, transforms.AUGMENTATIONS, config.augment),
        (data.test, transforms.EVAL_TRANSFORMS, config.eval_transform),
    ):
        transform = transforms.choose(table, name, config.image_size)
        transform(source[0], np.random.default_rng(0))


def _plan(config, name, data):
    phase = config[name]
    source = dataset.train_source(config, phase, data)
    if phase.method != "plain" and data.num_classes < 2:
        raise ConfigError(
            f"{name}.method={phase.method!r} needs two classes or more, to have a "
            f"wrong one; the data has {data.num_classes}"
        )
    if phase.get("teacher") == "mask" and "mask" not in source[0]:
        raise ConfigError(
            f"{name}.teacher='mask': the data has no masks; choose another teacher"
        )
    steps_per_epoch = len(source) // config.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {len(source)} examples "
            f"that {name} learns from; lower --config.batch_size"
        )
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    warmup_steps = round(phase.warmup_epochs * steps_per_epoch)
    if warmup_steps >= num_steps:
        raise ConfigError(
            f"{name}.warmup_epochs={phase.warmup_epochs} is all of its {num_steps} "
            "steps; lower it"
        )
    schedule = make_schedule(phase.learning_rate, num_steps, warmup_steps)
    plan = Plan(
        name=name,
        phase=phase,
        source=source,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        save_every=max(1, round(config.save_epochs * steps_per_epoch)),
        schedule=schedule,
        model=make_model(config, data.num_classes, axis_name=AXIS),
        tx=make_optimizer(config.optimizer, schedule),
    )
    check_start(config, phase, plan.model, plan.tx)
    return plan
