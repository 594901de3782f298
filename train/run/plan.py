"""What a phase will do, known and checked for all phases before anything is written."""

from typing import Any, NamedTuple

import numpy as np

from train.data import dataset, transforms
from train.devices import AXIS
from train.errors import Faults
from train.method.build import (
    make_model,
    make_optimizer,
    make_schedule,
    mask_readers,
)


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


def plan_phases(config, data, faults: Faults | None = None) -> list[Plan]:
    """A plan for every phase of a run.

    Args:
      config: its fields may have faults, which are known then.
      data: ``dataset.Data``.
      faults: what is known to be wrong, added to; then there are no plans. None: what
        is wrong is raised.

    Raises:
      ConfigError: phases that their data do not fit.
    """
    found = Faults() if faults is None else faults
    with found.gather():
        _check_transforms(config, data, found)
    sources = {}
    for name in config.phases:
        with found.gather():
            sources[name] = _fitting_source(config, name, data, found)
    if faults is None:
        found.stop()
    if found:
        return []
    weights = dataset.class_weights(config, data)
    return [
        _plan(config, name, sources[name], data.num_classes)._replace(
            class_weights=weights
        )
        for name in config.phases
    ]


def _check_transforms(config, data, faults):
    """That an example comes out of them as large as the model wants it.

    Raises:
      DatasetError: an example cannot be read.
    """
    for source, table, field in (
        (data.train, transforms.AUGMENTATIONS, "augment"),
        (data.test, transforms.EVAL_TRANSFORMS, "eval_transform"),
    ):
        if faults.has(field, "image_size", "fit"):
            continue
        transform = transforms.choose(table, config[field], config.image_size)
        with faults.gather():
            transform(source[0], np.random.default_rng(0))


def _fitting_source(config, name, data, faults):
    """The examples that a phase learns from, which are checked to be enough for it."""
    phase = config[name]
    if faults and phase.dataset not in ("", config.dataset):
        return None  # opening it may write
    source = dataset.train_source(config, phase, data)
    if phase.method != "plain" and data.num_classes < 2:
        faults.add(
            f"{name}.method",
            f"={phase.method!r} needs two classes or more, to have a wrong one; the "
            f"data has {data.num_classes}",
        )
    _check_masks(phase, name, source, faults)
    if faults.has("batch_size"):
        return source
    if len(source) < config.batch_size:
        faults.add(
            "batch_size",
            f"={config.batch_size} is more than the {len(source)} examples that {name} "
            "learns from; lower --config.batch_size",
        )
    elif not faults.has(f"{name}.num_epochs", f"{name}.warmup_epochs"):
        _, num_steps, warmup_steps = _steps(config, phase, source)
        if warmup_steps >= num_steps:
            faults.add(
                f"{name}.warmup_epochs",
                f"={phase.warmup_epochs} is all of its {num_steps} steps; lower it",
            )
    return source


def _check_masks(phase, name, source, faults):
    """That a phase which reads masks learns from data that has them."""
    if "mask" in source[0]:
        return
    mends = {
        "teacher": "; choose another teacher",
        "mask_first": "; leave it out",
        "method": ", which it needs",
    }
    for field in mask_readers(phase):
        faults.add(
            f"{name}.{field}",
            f"={phase[field]!r}: the data has no masks{mends[field]}",
        )


def _steps(config, phase, source):
    """(steps of an epoch, of the phase, of its warm-up)."""
    steps_per_epoch = len(source) // config.batch_size
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    return steps_per_epoch, num_steps, round(phase.warmup_epochs * steps_per_epoch)


def _plan(config, name, source, num_classes):
    phase = config[name]
    steps_per_epoch, num_steps, warmup_steps = _steps(config, phase, source)
    schedule = make_schedule(phase.learning_rate, num_steps, warmup_steps)
    return Plan(
        name=name,
        phase=phase,
        source=source,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        save_every=max(1, round(config.save_epochs * steps_per_epoch)),
        schedule=schedule,
        model=make_model(config, num_classes, axis_name=AXIS),
        tx=make_optimizer(config.optimizer, schedule),
    )
