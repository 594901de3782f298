"""The training run: phases of steps, with checkpoints, logs and a final evaluation.

``train_and_evaluate`` reads from top to bottom. It owns pmap; what a step computes is
in ``step.py``, what the folder holds in ``workdir.py``.
"""

import collections
import contextlib
import functools
import itertools
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ibsgl_jax import trained
from ibsgl_jax.pretrained import Preprocessing
from train import baselines, checkpoint, evaluate, splits
from train import state as states
from train import step as steps
from train.check import check_config, guidance_config, make_model
from train.data import pipeline
from train.splits import AXIS
from train.watch import NonFiniteError, Trace, Window, memory_bytes
from train.workdir import ConfigError, PhaseLog, claim, disk_errors

LOGGER = logging.getLogger("train")
# A step's metrics are read this many steps later, so that the device never waits.
LAG = 2
# Batches on their way to the device ahead of the step.
AHEAD = 2


class Stopped(RuntimeError):
    """The run was asked to stop (SIGTERM) and has saved its state."""


class Data(NamedTuple):
    """The splits of a data set, as sequences of examples."""

    train: Any
    validation: Any
    test: Any
    num_classes: int


def train_and_evaluate(config, workdir, *, profile=None, table=True):
    """Train every phase of the config, going on where a killed run stopped.

    Args:
      config: ConfigDict with the fields of ``configs/default.py``.
      workdir: folder of the run, made if absent.
      profile: (first, last) step of each phase to write a profiler trace of.
      table: measure the phases on the test split at the end; else no example of it is
        looked at.

    Returns:
      dict phase name -> (TrainState, dict of results on the test split or None).

    Raises:
      ConfigError, DatasetError, CheckpointError: one line that names the thing;
        nothing is overwritten.
      NonFiniteError: a loss term broke; the message names the last good checkpoint.
      Stopped: SIGTERM came and the state is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    with claim(workdir, config), _on_sigterm() as stop, disk_errors():
        data = load_data(config)
        finished = {}
        for phase in config.phases:
            finished[phase] = train_phase(
                config, phase, finished, data, workdir, stop, profile=profile
            )
            if jax.process_index() == 0:
                _save_model(config, finished[phase], data, workdir, phase)
        results = {}
        if table:
            results = evaluate.evaluate_phases(
                config, make_model(config, data.num_classes), finished, data, workdir
            )
    return {name: (finished[name], results.get(name)) for name in finished}


def _save_model(config, state, data, workdir, phase):
    """models/PHASE.npz: what ``ibsgl explain --checkpoint`` reads."""
    variables = jax.device_get(state.variables)
    model = make_model(config, data.num_classes)
    resize = config.image_size
    if config.eval_transform == "resize_center":
        resize = round(resize / 0.875)
    trained.save(
        workdir / "models" / f"{phase}.npz",
        variables,
        model_name=config.model,
        model_options=config.model_options.to_dict(),
        num_classes=data.num_classes,
        preprocessing=Preprocessing(
            size=config.image_size,
            resize=resize,
            mean=tuple(config.image_mean),
            std=tuple(config.image_std),
        ),
        # Not the state's: those are the teacher's, or have seen nothing.
        stats=splits.data_set_stats(config, model, variables, data.train),
    )


def load_data(config) -> Data:
    """Prepare and open the data set; the embedded one is generated if absent."""
    try:
        builder = pipeline.prepare(
            config.dataset, config.data_dir, **config.dataset_options
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    splits = (config.train_split, config.validation_split, config.test_split)
    data = Data(
        *(pipeline.open_source(builder, split) for split in splits),
        num_classes=pipeline.num_classes(builder),
    )
    if data.num_classes is None:
        raise ConfigError(f"data set {config.dataset} does not say how many classes")
    for split, source in zip(splits, data[:3], strict=True):
        if not len(source):
            raise ConfigError(f"split {split!r} of {config.dataset} is empty")
    return data


def _train_source(config, phase, data):
    """The examples that a phase learns from: the run's, or its own data set's."""
    if phase.dataset in ("", config.dataset):
        return data.train
    own_config = config.copy_and_resolve_references()
    own_config.dataset = phase.dataset
    own = load_data(own_config)
    if own.num_classes != data.num_classes:
        raise ConfigError(
            f"data set {phase.dataset} of a phase has {own.num_classes} classes, "
            f"{config.dataset} {data.num_classes}: one head cannot learn both"
        )
    return own.train


def train_phase(config, name, finished, data, workdir, stop, *, profile=None):
    """Run one phase to its end, from its last checkpoint if there is one."""
    phase = config[name]
    source = _train_source(config, phase, data)
    steps_per_epoch = len(source) // config.batch_size
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    save_every = max(1, round(config.save_epochs * steps_per_epoch))
    schedule = states.make_schedule(
        phase.learning_rate, num_steps, round(phase.warmup_epochs * steps_per_epoch)
    )
    model = make_model(config, data.num_classes, axis_name=AXIS)
    tx = states.make_optimizer(config.optimizer, schedule)
    state = _initial_state(config, phase, finished, model, tx)

    teacher = finished.get(phase.get("teacher"))
    teachers = (_replicate(teacher.variables),) if teacher else ()

    # Phases that start from the same weights see the same batches: a fair control.
    generation = _generation(config, name)
    step_fn = make_step(
        config, phase, steps_per_epoch, generation=generation, model=model, tx=tx
    )
    # An argument, not a constant: the seeds of a sweep share one compiled program.
    base_key = _replicate(_base_key(config, generation))
    train_step = jax.pmap(
        lambda state, batch, key, *teachers: step_fn(
            state, batch, *teachers, base_key=key
        ),
        axis_name=AXIS,
        in_axes=(None, 0, None) + (None,) * len(teachers),
        out_axes=None,
        donate_argnums=0,
    )
    eval_fn = make_eval_fn(config, model)
    validation = splits.eval_batches(config, data.validation)
    batches = pipeline.make_train_dataset(
        source,
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
        start = saved = int(state.step)
        state = _replicate(state)
        if start >= num_steps:
            return state
        log = opened.enter_context(
            PhaseLog(workdir, name, start, tensorboard=config.tensorboard)
        )
        trace = opened.enter_context(Trace(profile, workdir / "profile" / name))
        progress = opened.enter_context(
            tqdm(
                total=num_steps,
                initial=start,
                desc=f"{name:>8}",
                disable=not config.progress or jax.process_index() != 0,
            )
        )
        stream = pipeline.iterate(
            batches,
            start_step=start,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
        )
        opened.callback(stream.close)
        pending = collections.deque()

        def read(limit):
            """Take in the metrics of steps that are done, all but the last ones."""
            while len(pending) > limit:
                step, sums = pending.popleft()
                where = f"at step {step} of phase {name}"
                try:
                    window.add(jax.device_get(sums), where=where)
                except NonFiniteError as error:
                    last = checkpoint.latest_path(manager) or "none yet"
                    raise NonFiniteError(
                        f"{error}; last good checkpoint: {last}"
                    ) from None

        def save(step):
            log.sync()
            meta = {
                "window": Window(window.sums).sums,
                "accuracy": accuracy,
                "num_devices": jax.device_count(),
            }
            checkpoint.save(manager, state, accuracy=accuracy, meta=meta)

        def must_stop(step):
            if jax.process_count() > 1:  # all of them at the same step
                return manager.reached_preemption(step)
            return stop.is_set()

        last_log, clock = start, time.perf_counter()
        for step, batch in zip(
            range(start + 1, num_steps + 1), _to_devices(stream, config), strict=False
        ):
            trace.before(step)
            state, sums = train_step(state, batch, base_key, *teachers)
            trace.after(step, state)
            pending.append((step, sums))
            read(LAG)
            progress.update()
            last = step == num_steps
            if last or step % config.log_every == 0:
                read(0)
                means = window.means()
                rate = float(schedule(step - 1))
                log.write(step, "train", {**means, "learning_rate": rate})
                seconds = (time.perf_counter() - clock) / (step - last_log)
                speed = {
                    "images_per_second": config.batch_size / seconds,
                    "step_seconds": seconds,
                    "memory_bytes": memory_bytes(),
                }
                log.write(step, "train", speed, file="timing")
                progress.set_postfix(_short(means, speed))
                window, last_log = Window(), step
                clock = time.perf_counter()
            if last or step % save_every == 0:
                read(0)
                busy = time.perf_counter()
                scores = _scores(eval_fn, validation, state, f"after step {step}")
                accuracy = scores["accuracy"]
                log.write(step, "validation", scores)
                save(step)
                saved = step
                clock += time.perf_counter() - busy  # no part of a step's time
            if must_stop(step):
                read(0)
                if saved != step:
                    save(step)
                checkpoint.wait(manager)
                raise Stopped(
                    f"stopped at step {step} of phase {name}; the same command goes on"
                )
        checkpoint.wait(manager)
    return state


def make_step(
    config, phase, steps_per_epoch, *, generation, model, tx, axis_name: str = AXIS
):
    """The phase's step of one device: a pure function of (state, batch)."""
    bound = dict(
        model=model,
        tx=tx,
        base_key=_base_key(config, generation),
        image_stats=splits.image_stats(config),
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        skip_nonfinite=config.skip_nonfinite,
        axis_name=axis_name,
    )
    if phase.method == "plain":
        return functools.partial(steps.plain_step, **bound)
    if phase.method in baselines.STEPS:
        return functools.partial(
            baselines.STEPS[phase.method], **baselines.options(phase), **bound
        )
    warmup = max(1, round(phase.mu_warmup_epochs * steps_per_epoch))
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    last = num_steps - round(phase.release * num_steps)
    when = None
    if phase.every > 1 or last < num_steps:

        def when(step):
            return (step % phase.every == 0) & (step < last)

    return functools.partial(
        steps.guided_step,
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


def _base_key(config, generation):
    """What all draws of a phase come from."""
    return jax.random.fold_in(jax.random.key(config.seed), generation + 1)


def make_eval_fn(config, model):
    """variables, sharded batch -> dict of (sum, count), over all devices."""
    step = functools.partial(
        steps.eval_step,
        model=model,
        image_stats=splits.image_stats(config),
        axis_name=AXIS,
    )
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def _initial_state(config, phase, finished, model, tx):
    options = states.options(config, phase)
    try:
        if phase.init in finished:
            before = finished[phase.init].variables
            # A copy: the step donates its state; other phases start from the same one.
            params, batch_stats = jax.tree.map(
                np.array, (before["params"], before["batch_stats"])
            )
            return states.restart(model, tx, params, batch_stats, **options)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        # Outside pmap the axis has no name; BatchNorm asks for it only in training.
        state = states.create_state(key, model, tx, **options)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model {config.model} at image_size={config.image_size}: {reason}"
        ) from error
    if phase.init == "pretrained":
        params, batch_stats = _pretrained(config, state)
        state = states.restart(model, tx, params, batch_stats, **options)
    return state


def _pretrained(config, fresh):
    """Weights from a file; a layer for another number of classes stays random."""
    from ibsgl_jax import pretrained

    try:
        _, variables = pretrained.load(config.model, config.pretrained or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"pretrained={config.pretrained!r}: {error}") from error
    wanted = {"params": fresh.params, "batch_stats": fresh.batch_stats}
    given = dict(jax.tree_util.tree_leaves_with_path(variables))
    kept = []

    def choose(path, leaf):
        if path in given and given[path].shape == leaf.shape:
            return given[path]
        kept.append(jax.tree_util.keystr(path[1:], simple=True, separator="/"))
        return leaf

    variables = jax.tree_util.tree_map_with_path(choose, wanted)
    if len(kept) > 2:
        raise ConfigError(
            f"pretrained={config.pretrained!r}: does not fit {config.model} with these "
            f"model_options in {', '.join(kept[:3])} and others"
        )
    if kept:
        LOGGER.warning("not from the pretrained file: %s", ", ".join(kept))
    return variables["params"], variables["batch_stats"]


def _replicate(state):
    """The state as pmap gives it back, so that a step is compiled once, not twice."""
    identity = jax.pmap(
        lambda state, _: state, axis_name=AXIS, in_axes=(None, 0), out_axes=None
    )
    return identity(state, np.zeros(jax.local_device_count()))


def _to_devices(stream, config):
    """The batches, with the places of their examples, on the devices ahead of use."""
    count = jax.process_count()
    place = np.arange(config.batch_size // count, dtype=np.int32) * count
    place += jax.process_index()
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    sharding = jax.NamedSharding(mesh, jax.P(AXIS))
    queue = collections.deque()
    for batch in itertools.chain(stream, [None] * AHEAD):
        if batch is not None:
            batch = splits.shard({**batch, "place": place})
            queue.append(jax.device_put(batch, sharding))
        if len(queue) > AHEAD or batch is None:
            if not queue:
                return
            yield queue.popleft()


def _generation(config, name) -> int:
    """How many phases stand between this one and random or pretrained weights."""
    init = config[name].init
    return 0 if init not in config.phases else 1 + _generation(config, init)


def _scores(eval_fn, batches, state, where) -> dict:
    """Means over a split: sums and counts added up, divided once."""
    window = Window()
    for batch in pipeline.iterate(batches):
        sums = jax.device_get(eval_fn(state.variables, splits.shard(batch)))
        window.add(sums, where=f"in the evaluation {where}")
    return window.means()


def _short(means, speed) -> dict:
    """What fits beside the progress bar."""
    known = {k: means[k] for k in ("loss", "accuracy", "skipped") if k in means}
    text = {name: f"{value:.3f}" for name, value in known.items()}
    return {
        **text,
        "images/s": f"{speed['images_per_second']:.0f}",
        "GB": f"{speed['memory_bytes'] / 1e9:.1f}",
    }


@contextlib.contextmanager
def _on_sigterm():
    """An event that SIGTERM sets, where this is the main thread and the only process.

    Several processes agree on a step through jax.distributed, whose handler must stay.
    """
    event = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or jax.process_count() > 1:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
