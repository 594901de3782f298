"""The training run: phases of steps, with checkpoints, logs and a final evaluation.

``train_and_evaluate`` reads from top to bottom. What a step computes is in ``method``,
what the folder holds in ``workdir``.
"""

import collections
import contextlib
import logging
import time
from pathlib import Path

import jax
from tqdm import tqdm

from ibsgl_jax import trained
from ibsgl_jax.pretrained import Preprocessing
from train import devices
from train.data import dataset
from train.data.batches import iterate, make_train_dataset
from train.devices import AXIS
from train.errors import disk_errors
from train.measure import splits
from train.method.build import (
    generation_of,
    make_base_key,
    make_eval_fn,
    make_model,
    make_optimizer,
    make_schedule,
    make_step,
)
from train.method.check import check_config
from train.run import checkpoint, watch
from train.run.log import PhaseLog
from train.run.results import evaluate_phases
from train.run.start import initial_state
from train.run.stop import Stopped, on_sigterm
from train.run.workdir import claim

LOGGER = logging.getLogger("train")
# A step's metrics are read this many steps later, so that the device never waits.
LAG = 2


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
    with claim(workdir, config), on_sigterm() as stop, disk_errors():
        data = dataset.load_data(config)
        finished = {}
        for phase in config.phases:
            finished[phase] = train_phase(
                config, phase, finished, data, workdir, stop, profile=profile
            )
            if jax.process_index() == 0:
                _save_model(config, finished[phase], data, workdir, phase)
        results = {}
        if table:
            results = evaluate_phases(
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


def train_phase(config, name, finished, data, workdir, stop, *, profile=None):
    """Run one phase to its end, from its last checkpoint if there is one."""
    phase = config[name]
    source = dataset.train_source(config, phase, data)
    steps_per_epoch = len(source) // config.batch_size
    num_steps = max(1, round(phase.num_epochs * steps_per_epoch))
    save_every = max(1, round(config.save_epochs * steps_per_epoch))
    schedule = make_schedule(
        phase.learning_rate, num_steps, round(phase.warmup_epochs * steps_per_epoch)
    )
    model = make_model(config, data.num_classes, axis_name=AXIS)
    tx = make_optimizer(config.optimizer, schedule)
    state = initial_state(config, phase, finished, model, tx)

    teacher = finished.get(phase.get("teacher"))
    teachers = (devices.replicate(teacher.variables),) if teacher else ()

    # Phases that start from the same weights see the same batches: a fair control.
    generation = generation_of(config, name)
    step_fn = make_step(
        config, phase, steps_per_epoch, generation=generation, model=model, tx=tx
    )
    # An argument, not a constant: the seeds of a sweep share one compiled program.
    base_key = devices.replicate(make_base_key(config, generation))
    train_step = devices.over_devices(
        lambda state, batch, key, *teachers: step_fn(
            state, batch, *teachers, base_key=key
        ),
        in_axes=(None, 0, None) + (None,) * len(teachers),
        out_axes=None,
        donate_argnums=0,
    )
    eval_fn = make_eval_fn(config, model)
    validation = dataset.eval_batches(config, data.validation)
    batches = make_train_dataset(
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
        window, accuracy = watch.Window(), 0.0
        if restored:
            state, meta = restored
            window, accuracy = watch.Window(meta["window"]), meta["accuracy"]
            if meta["num_devices"] != jax.device_count():
                LOGGER.warning(
                    "%s: resumed on %d devices, was on %d; sums round differently",
                    name,
                    jax.device_count(),
                    meta["num_devices"],
                )
        start = saved = int(state.step)
        state = devices.replicate(state)
        if start >= num_steps:
            return state
        log = opened.enter_context(
            PhaseLog(workdir, name, start, tensorboard=config.tensorboard)
        )
        trace = opened.enter_context(watch.Trace(profile, workdir / "profile" / name))
        progress = opened.enter_context(
            tqdm(
                total=num_steps,
                initial=start,
                desc=f"{name:>8}",
                disable=not config.progress or jax.process_index() != 0,
            )
        )
        stream = iterate(
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
                except watch.NonFiniteError as error:
                    last = checkpoint.latest_path(manager) or "none yet"
                    raise watch.NonFiniteError(
                        f"{error}; last good checkpoint: {last}"
                    ) from None

        def save(step):
            log.sync()
            meta = {
                "window": watch.Window(window.sums).sums,
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
            range(start + 1, num_steps + 1),
            devices.prefetch(stream, config),
            strict=False,
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
                    "memory_bytes": watch.memory_bytes(),
                }
                log.write(step, "train", speed, file="timing")
                progress.set_postfix(_short(means, speed))
                window, last_log = watch.Window(), step
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


def _scores(eval_fn, batches, state, where) -> dict:
    """Means over a split: sums and counts added up, divided once."""
    window = watch.Window()
    for batch in iterate(batches):
        sums = jax.device_get(eval_fn(state.variables, devices.shard(batch)))
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
