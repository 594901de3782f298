"""The training run: phases of steps, with checkpoints, logs and a final evaluation.

``train_and_evaluate`` reads from top to bottom. It owns pmap; what a step computes is
in ``step.py``, what the folder holds in ``workdir.py``.
"""

import collections
import contextlib
import functools
import logging
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ibsgl_jax import guidance, models
from ibsgl_jax.bottleneck import BottleneckConfig
from train import baselines, checkpoint, evaluate
from train import state as states
from train import step as steps
from train.data import pipeline
from train.workdir import ConfigError, PhaseLog, claim

LOGGER = logging.getLogger("train")
AXIS = "devices"
METHODS = ("plain", "guided", *baselines.STEPS)
# A step's metrics are read this many steps later, so that the device never waits.
LAG = 2


class NonFiniteError(RuntimeError):
    """A term of the loss became NaN or infinite; one line that says which."""


class Stopped(RuntimeError):
    """The run was asked to stop (SIGTERM) and has saved its state."""


class Data(NamedTuple):
    """The splits of a data set, as sequences of examples."""

    train: Any
    validation: Any
    test: Any
    num_classes: int


def train_and_evaluate(config, workdir):
    """Train every phase of the config, going on where a killed run stopped.

    Args:
      config: ConfigDict with the fields of ``configs/default.py``.
      workdir: folder of the run, made if absent.

    Returns:
      dict phase name -> (TrainState, dict of results on the test split).

    Raises:
      ConfigError, DatasetError, CheckpointError: one line that names the thing;
        nothing is overwritten.
      NonFiniteError: a loss term broke; the message names the last good checkpoint.
      Stopped: SIGTERM came and the state is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    with claim(workdir, config), _on_sigterm() as stop:
        data = load_data(config)
        finished = {}
        for phase in config.phases:
            finished[phase] = train_phase(config, phase, finished, data, workdir, stop)
        results = evaluate.evaluate_phases(
            config, make_model(config, data.num_classes), finished, data, workdir
        )
    return {name: (finished[name], results[name]) for name in finished}


def check_config(config):
    """Raise ConfigError for values that cannot work, before anything is written."""
    num_devices = jax.device_count()
    if config.batch_size % num_devices:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by the {num_devices} "
            "devices; change --config.batch_size"
        )
    if config.model not in models.MODELS:
        raise ConfigError(
            f"model {config.model!r}: choose one of {', '.join(models.MODELS)}"
        )
    if not config.phases:
        raise ConfigError("phases is empty: there is nothing to train")
    done = []
    for name in config.phases:
        if name not in config:
            raise ConfigError(f"phase {name!r} has no section of its own in the config")
        phase = config[name]
        if phase.method not in METHODS:
            raise ConfigError(
                f"{name}.method={phase.method!r}: choose one of {METHODS}"
            )
        if phase.init != "random" and phase.init not in done:
            raise ConfigError(
                f"{name}.init={phase.init!r}: 'random', or an earlier phase of {done}"
            )
        for field in ("num_epochs", "learning_rate"):
            if not phase[field] > 0:
                raise ConfigError(f"{name}.{field}={phase[field]}: must be positive")
        if phase.method == "guided":
            if phase.mu < 0:
                raise ConfigError(f"{name}.mu={phase.mu}: must not be negative")
            try:
                guidance_config(phase)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{name}: {error}") from error
        elif phase.method in baselines.STEPS:
            try:
                baselines.options(phase)
            except ValueError as error:
                raise ConfigError(f"{name}.{error}") from error
        done.append(name)


def guidance_config(phase) -> guidance.GuidanceConfig:
    """The guidance options of a phase as the library takes them."""
    return guidance.GuidanceConfig(
        bottleneck=BottleneckConfig(**phase.bottleneck), **phase.guidance
    )


def make_model(config, num_classes: int, *, axis_name: str | None = None):
    """The config's model; with axis_name, BatchNorm averages over devices."""
    return models.create(
        config.model,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        axis_name=axis_name,
        **config.model_options,
    )


def load_data(config) -> Data:
    """Prepare and open the data set; the embedded one is generated if absent."""
    builder = pipeline.prepare(
        config.dataset, config.data_dir, **config.dataset_options
    )
    splits = (config.train_split, config.validation_split, config.test_split)
    return Data(
        *(pipeline.open_source(builder, split) for split in splits),
        num_classes=pipeline.num_classes(builder),
    )


def train_phase(config, name, finished, data, workdir, stop):
    """Run one phase to its end, from its last checkpoint if there is one."""
    phase = config[name]
    steps_per_epoch = len(data.train) // config.batch_size
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    schedule = states.make_schedule(
        phase.learning_rate, num_steps, round(phase.warmup_epochs * steps_per_epoch)
    )
    model = make_model(config, data.num_classes, axis_name=AXIS)
    tx = states.make_optimizer(config.optimizer, schedule)
    state = _initial_state(config, phase, finished, model, tx)

    # Phases that start from the same weights see the same batches: a fair control.
    generation = _generation(config, name)
    train_step = _make_train_step(
        config, phase, steps_per_epoch, model=model, tx=tx, generation=generation
    )
    eval_fn = make_eval_fn(config, model)
    validation = evaluate.eval_batches(config, data.validation)
    batches = pipeline.make_train_dataset(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed + 1_000_003 * generation,
        augment=config.augment,
        image_size=config.image_size,
    )

    with contextlib.ExitStack() as opened:
        manager = opened.enter_context(
            checkpoint.open_manager(workdir / "checkpoints" / name)
        )
        restored = checkpoint.restore(manager, state)
        window, accuracy = Window(), 0.0
        if restored:
            state, meta = restored
            window, accuracy = Window(meta["window"]), meta["accuracy"]
            if meta["num_devices"] != jax.device_count():
                LOGGER.warning(
                    "%s: resumed on %d devices, was on %d; sums round differently",
                    name,
                    jax.device_count(),
                    meta["num_devices"],
                )
        start = int(state.step)
        state = _replicate(state)
        if start == num_steps:
            return state
        log = opened.enter_context(
            PhaseLog(workdir, name, start, tensorboard=config.tensorboard)
        )
        place = np.arange(config.batch_size // jax.process_count())
        place = place * jax.process_count() + jax.process_index()
        pending = collections.deque()
        saved = start
        clock = time.perf_counter()
        progress = opened.enter_context(
            tqdm(
                total=num_steps,
                initial=start,
                desc=f"{name:>8}",
                disable=not config.progress or jax.process_index() != 0,
            )
        )

        def save(step):
            log.sync()
            meta = {
                "window": Window(window.sums).sums,
                "accuracy": accuracy,
                "num_devices": jax.device_count(),
            }
            checkpoint.save(manager, state, accuracy=accuracy, meta=meta)

        def read(limit):
            """Take in the metrics of steps that are done, all but the last ones."""
            while len(pending) > limit:
                step, sums = pending.popleft()
                window.add(jax.device_get(sums), step, name, manager.directory)

        stream = pipeline.iterate(
            batches,
            start_step=start,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
        )
        for step, batch in zip(range(start + 1, num_steps + 1), stream, strict=False):
            state, sums = train_step(state, evaluate.shard({**batch, "place": place}))
            pending.append((step, sums))
            read(LAG)
            progress.update()
            if step % config.log_every == 0 or step == num_steps:
                read(0)
                means = window.means()
                rate = float(schedule(step - 1))
                log.write(step, "train", {**means, "learning_rate": rate})
                seconds = time.perf_counter() - clock
                since = min(config.log_every, step - start)
                speed = {
                    "images_per_second": since * config.batch_size / seconds,
                    "step_seconds": seconds / since,
                }
                log.write(step, "train", speed, file="timing")
                progress.set_postfix(
                    loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.3f}"
                )
                window = Window()
                clock = time.perf_counter()
            last = step == num_steps
            if last or step % max(1, round(config.save_epochs * steps_per_epoch)) == 0:
                read(0)
                scores = _sums_over(eval_fn, validation, state.variables)
                accuracy = scores["accuracy"]
                log.write(step, "validation", scores)
                save(step)
                saved = step
                clock = time.perf_counter()
            if stop.is_set():
                read(0)
                if saved != step:
                    save(step)
                manager.wait_until_finished()
                raise Stopped(
                    f"stopped at step {step} of phase {name}; the same command goes on"
                )
        manager.wait_until_finished()
    return state


class Window:
    """Sums and counts of the metrics since the last log line."""

    def __init__(self, sums=None):
        self.sums = {k: list(v) for k, v in (sums or {}).items()}

    def add(self, metrics, step, phase, checkpoints):
        for name, (total, count) in metrics.items():
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"{name} is {total} at step {step} of phase {phase}; "
                    f"checkpoints before it: {checkpoints}"
                )
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(count)

    def means(self):
        return {name: total / count for name, (total, count) in self.sums.items()}


def make_eval_fn(config, model):
    """variables, sharded batch -> dict of (sum, count), over all devices."""
    step = functools.partial(
        steps.eval_step,
        model=model,
        image_stats=evaluate.image_stats(config),
        axis_name=AXIS,
    )
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def _make_train_step(config, phase, steps_per_epoch, *, generation, **bound):
    bound |= dict(
        base_key=jax.random.fold_in(jax.random.key(config.seed), generation + 1),
        image_stats=evaluate.image_stats(config),
        label_smoothing=config.label_smoothing,
        axis_name=AXIS,
    )
    if phase.method == "plain":
        step = functools.partial(steps.plain_step, **bound)
    elif phase.method in baselines.STEPS:
        step = functools.partial(
            baselines.STEPS[phase.method], **baselines.options(phase), **bound
        )
    else:
        warmup = max(1, round(phase.mu_warmup_epochs * steps_per_epoch))
        step = functools.partial(
            steps.guided_step,
            config=guidance_config(phase),
            mu=lambda step: phase.mu * jnp.minimum(1.0, (step + 1) / warmup),
            decay=phase.stats_decay,
            teacher=phase.teacher,
            **bound,
        )
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
    )


def _initial_state(config, phase, finished, model, tx):
    if phase.init == "random":
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        # Outside pmap the axis has no name; BatchNorm asks for it only in training.
        return states.create_state(key, model, tx, config.image_size)
    before = finished[phase.init]
    # A copy: the step donates its state, and other phases start from the same one.
    params, batch_stats = jax.tree.map(np.array, (before.params, before.batch_stats))
    return states.restart(model, tx, params, batch_stats, config.image_size)


def _replicate(state):
    """The state as pmap gives it back, so that a step is compiled once, not twice."""
    identity = jax.pmap(
        lambda state, _: state, axis_name=AXIS, in_axes=(None, 0), out_axes=None
    )
    return identity(state, np.zeros(jax.local_device_count()))


def _generation(config, name) -> int:
    """How many phases stand between this one and random weights."""
    init = config[name].init
    return 0 if init == "random" else 1 + _generation(config, init)


def _sums_over(eval_fn, batches, variables) -> dict:
    """Means over a split: sums and counts added up, divided once."""
    window = Window()
    for batch in pipeline.iterate(batches):
        sums = jax.device_get(eval_fn(variables, evaluate.shard(batch)))
        window.add(sums, "evaluation", "", "")
    return window.means()


@contextlib.contextmanager
def _on_sigterm():
    """An event that SIGTERM sets, where this is the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
