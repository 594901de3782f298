"""The training run: phases of steps, with checkpoints, logs and a final evaluation.

``train_and_evaluate`` reads from top to bottom. What a step computes is in ``method``,
what a phase will do in ``plan``, what the folder holds in ``workdir``.
"""

import contextlib
import logging
from pathlib import Path

import jax

from ibsgl_jax import trained
from ibsgl_jax.pretrained import Preprocessing
from train import devices
from train.data import dataset
from train.data.batches import iterate, make_train_dataset
from train.errors import disk_errors
from train.measure import precision, splits, temperature
from train.method.build import (
    generation_of,
    make_base_key,
    make_eval_fn,
    make_model,
    make_step,
    model_options,
    with_model,
)
from train.run import checkpoint, choose, watch
from train.run.check import check_fields, check_run
from train.run.records import Records, validation_scores
from train.run.results import evaluate_phases
from train.run.start import choose_start, initial_state
from train.run.stop import Stopped, on_signals
from train.run.workdir import claim

LOGGER = logging.getLogger("train")
# Of the validation split, in a checkpoint; mean_ap with several labels per image.
SCORES = ("accuracy", "nll", "mean_ap")


def train_and_evaluate(
    config, workdir, *, data=None, model=None, profile=None, table=True
):
    """Train every phase of the config, going on where a killed run stopped.

    Args:
      config: ConfigDict with the fields of ``configs/default.py``; what it leaves open
        is chosen, see ``choose``.
      workdir: folder of the run, made if absent.
      data: examples in the place of what the config names: a data set of Hugging Face,
        a sequence of dicts, or a mapping from split to one; see ``data.given``.
      model: a class, or a linen module of one, in the place of what the config names;
        see ``build.with_model``. The run keeps its name, and its attributes.
      profile: (first, last) step of each phase to write a profiler trace of.
      table: measure the phases on the test split at the end; else no example of it is
        looked at.

    Returns:
      dict phase name -> (TrainState, dict of results on the test split or None).

    Raises:
      ConfigError, DatasetError, CheckpointError: one line that names the thing, or one
        for each of several (FaultsError); nothing is overwritten.
      NonFiniteError: a loss term broke; the message names the last good checkpoint.
      Stopped: SIGTERM or Ctrl-C came and the state is saved.
    """
    workdir = Path(workdir)
    check_fields(config)
    config = with_model(config, model)
    config, chosen = choose.complete(config, workdir, examples=data)
    with on_signals() as stop, disk_errors():
        data, plans = check_run(config, workdir, examples=data)
        _tell(config, plans, data, chosen)
        with claim(workdir, config):
            if data.pictures is not None and jax.process_index() == 0:
                data.pictures.write_splits(workdir / dataset.SPLITS_FILE)
            finished, scores = {}, {}
            for plan in plans:
                plan = choose_start(config, plan, scores, workdir)
                finished[plan.name], scores[plan.name] = train_phase(
                    config, plan, finished, data, workdir, stop, profile=profile
                )
                if jax.process_index() == 0:
                    _save_model(config, finished[plan.name], data, workdir, plan.name)
            results = {}
            if table:
                model = make_model(config, data.num_classes)
                results = evaluate_phases(config, model, finished, data, workdir)
    return {name: (finished[name], results.get(name)) for name in finished}


def _tell(config, plans, data, chosen):
    """What the pictures are, what was chosen, and how long it will take."""
    if jax.process_index() != 0 or data.pictures is None:
        return
    print(data.pictures.understood, data.pictures.table, sep="\n")
    for warning in (*data.pictures.warnings, dataset.tell_classes(config, data)):
        if warning:
            print(f"note: {warning}")
    if chosen:
        print(choose.describe(chosen, choose.estimate_seconds(config, plans, data)))
    print(flush=True)


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
        model_options=model_options(config),
        num_classes=data.num_classes,
        class_names=data.class_names,
        preprocessing=Preprocessing(
            size=config.image_size,
            resize=resize,
            mean=tuple(config.image_mean),
            std=tuple(config.image_std),
            fit=config.fit if data.pictures is not None else "crop",
        ),
        # Not the state's: those are the teacher's, or have seen nothing.
        stats=splits.data_set_stats(config, model, variables, data.train),
        link=config.link,
    )


def train_phase(config, plan, finished, data, workdir, stop, *, profile=None):
    """Run one phase to its end, from its last checkpoint if there is one.

    Returns:
      (TrainState, its scores on the validation split: accuracy, nll and, of several
      labels per image, their mean average precision).
    """
    name, num_steps = plan.name, plan.num_steps
    state = initial_state(config, plan.phase, finished, plan.model, plan.tx)
    train_step, constants = _compiled_step(config, plan, finished)
    eval_fn = make_eval_fn(config, plan.model)

    with contextlib.ExitStack() as opened:
        manager = opened.enter_context(
            checkpoint.open_manager(workdir / "checkpoints" / name)
        )
        state, window, scores = _restore(manager, state, name)
        start = saved = int(state.step)
        state = devices.replicate(state)
        if start >= num_steps:
            return state, scores
        records = opened.enter_context(
            Records(
                workdir,
                config,
                plan,
                start=start,
                window=window,
                last_checkpoint=lambda: checkpoint.latest_path(manager),
            )
        )
        trace = opened.enter_context(watch.Trace(profile, workdir / "profile" / name))
        stream = _open_stream(config, plan, start)
        opened.callback(stream.close)
        opened.enter_context(stop.deferred())
        for step, batch in zip(
            range(start + 1, num_steps + 1),
            devices.prefetch(stream, config),
            strict=False,
        ):
            trace.before(step)
            state, sums = train_step(state, batch, *constants)
            trace.after(step, state)
            records.add(step, sums)
            last = step == num_steps
            if last or step % config.log_every == 0:
                records.write(step)
            if last or step % plan.save_every == 0:
                scores = records.write_validation(
                    step,
                    lambda state=state, step=step: _validate(
                        config, plan, data, eval_fn, state.variables, step
                    ),
                )
                _save(manager, state, records, scores)
                saved = step
            if _must_stop(manager, stop, step):
                if saved != step:
                    _save(manager, state, records, scores)
                checkpoint.wait(manager)
                raise Stopped(
                    f"stopped at step {step} of phase {name}; the same command goes on",
                    stop.number,
                )
        checkpoint.wait(manager)
    return state, scores


def _validate(config, plan, data, eval_fn, variables, step) -> dict:
    """The scores of the validation split."""
    batches = dataset.eval_batches(config, data.validation)
    scores = validation_scores(eval_fn, batches, variables, f"after step {step}")
    if config.link == "sigmoid":
        found = temperature.split_logits(config, plan.model, variables, data.validation)
        scores["mean_ap"] = precision.mean_average_precision(*found)
    return scores


def _compiled_step(config, plan, finished):
    """The step over all devices, and what it takes beside state and batch."""
    teacher = finished.get(plan.phase.get("teacher"))
    teachers = (devices.replicate(teacher.variables),) if teacher else ()
    # Phases that start from the same weights see the same batches: a fair control.
    generation = generation_of(config, plan.name)
    step_fn = make_step(
        config,
        plan.phase,
        plan.steps_per_epoch,
        generation=generation,
        model=plan.model,
        tx=plan.tx,
        class_weights=plan.class_weights,
        platform=jax.default_backend(),
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
    return train_step, (base_key, *teachers)


def _restore(manager, state, name):
    """The state to go on from, its metrics window and validation scores."""
    restored = checkpoint.restore(manager, state)
    if not restored:
        return state, watch.Window(), {"accuracy": 0.0}
    state, meta = restored
    if meta["num_devices"] != jax.device_count():
        LOGGER.warning(
            "%s: resumed on %d devices, was on %d; sums round differently",
            name,
            jax.device_count(),
            meta["num_devices"],
        )
    # Runs of an earlier version kept the accuracy alone.
    scores = {name: meta[name] for name in SCORES if name in meta}
    return state, watch.Window(meta["window"]), scores


def _open_stream(config, plan, start):
    batches = make_train_dataset(
        plan.source,
        batch_size=config.batch_size,
        seed=config.seed + 1_000_003 * generation_of(config, plan.name),
        augment=config.augment,
        image_size=config.image_size,
    )
    return iterate(
        batches,
        start_step=start,
        num_threads=config.num_threads,
        num_workers=config.num_workers,
    )


def _save(manager, state, records, scores):
    known = {name: scores[name] for name in SCORES if name in scores}
    meta = {"window": records.sync(), **known, "num_devices": jax.device_count()}
    best = scores.get("mean_ap", scores["accuracy"])
    checkpoint.save(manager, state, accuracy=best, meta=meta)


def _must_stop(manager, stop, step) -> bool:
    if jax.process_count() > 1:  # all of them at the same step
        return manager.reached_preemption(step)
    return stop.number is not None
