"""Judge trained phases: the run's own table, and the full evaluation with its report.

    python -m train.evaluate --workdir runs/quickstart [--compare runs/other ...]

writes evaluation.json, evaluation.npz, evaluation.md, pictures and report.html into the
workdir. What is measured is in ``measures.py``; here it is compiled once, spread over
the devices and summed up. May import jax, numpy, ``ibsgl_jax``, and ``train``'s own
modules; ``loop`` only inside functions, because it imports this one.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from ibsgl_jax import attribution, feature_stats, metrics
from train import measures
from train.data import pipeline
from train.measures import MEASURES, measure
from train.step import normalize_images
from train.workdir import ConfigError, write_text

AXIS = "devices"
# A map that ranks the pixels like this one under random weights explains no model.
SANITY_LIMIT = 0.5

# Columns of the printed table.
COLUMNS = (
    "accuracy",
    "nll",
    "box_share",
    "pointing",
    "iou",
    "overlap",
    "drop",
    "increase",
    "area",
    "matched_drop",
    "matched_increase",
)
METHOD_COLUMNS = (
    "drop",
    "increase",
    "area",
    "matched_drop",
    "matched_increase",
    "box_share",
    "pointing",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How many examples each part of the evaluation takes: the first ones of the split.

    Attributes:
      split: of the data set; the config's test split if None.
      limit: of the split at all; None for all of it.
      num_perturbed: for deletion, degradation and ROAD.
      num_sensitivity: for Sensitivity-n.
      num_method_images: for the table of methods.
      num_sanity: for the randomised weights.
    """

    split: str | None = None
    limit: int | None = None
    num_perturbed: int = 128
    num_sensitivity: int = 32
    num_method_images: int = 128
    num_sanity: int = 64


class Run:
    """A trained run: its config, model and the states of its phases.

    Attributes:
      name, workdir, config (its phases are those chosen), model, states (dict phase ->
      TrainState), notes (what is missing, one line each).
    """

    def __init__(self, workdir, num_classes: int | None = None, *, phases=None):
        self.workdir = Path(workdir)
        self.name = self.workdir.absolute().name
        self.config = load_config(self.workdir)
        if phases:
            self.config.phases = choose_phases(self.config, phases)
        self.data = None
        if num_classes is None:
            from train import loop

            self.data = loop.load_data(self.config)
            num_classes = self.data.num_classes
        self.model, self.states, self.notes = load_states(
            self.config, num_classes, self.workdir
        )


# The run's own table, at the end of training.


def evaluate_phases(config, model, states, data, workdir) -> dict:
    """Measure every phase on the test split and write what there is to see.

    Args:
      config, model: the run's; the model without an axis name.
      states: dict phase name -> TrainState.
      data: ``loop.Data``.
      workdir: gets results.json and before_after.png (from process 0).

    Returns:
      dict phase name -> dict of means (see ``measures.measure``).
    """
    results = {}
    for name, state in states.items():
        values = measure_split(config, model, state.variables, data.test)
        results[name] = {
            k: _mean(v) for k, v in values.items() if v.ndim == 1 and k != "predicted"
        }
    if jax.process_index() == 0:
        workdir = Path(workdir)
        record = {"split": config.test_split, "num_images": len(data.test)}
        text = json.dumps({**record, "phases": results}, indent=2)
        write_text(workdir / "results.json", text + "\n")
        print(table(results), flush=True)
        if config.picture_phases:
            from train import figures

            figures.write_before_after(config, model, states, data, workdir)
    return results


def table(results: dict) -> str:
    """Markdown: a row per phase, the columns that were measured."""
    known = [key for key in COLUMNS if any(key in row for row in results.values())]
    lines = [
        "| phase | " + " | ".join(MEASURES[key].title for key in known) + " |",
        "|---|" + "---|" * len(known),
    ]
    for name, row in results.items():
        cells = [format_value(key, row.get(key)) for key in known]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_value(key: str, value) -> str:
    """A number as tables show it: percents with one digit, others with three."""
    if value is None or not math.isfinite(value):
        return "–"
    percent = MEASURES[key].percent
    return f"{value * 100:.1f}" if percent else f"{value:.3f}"


# Measuring a split.


def measure_split(config, model, variables, source, *, progress=None) -> dict:
    """The measures of ``measures.measure`` for every example of a split.

    Args:
      config, model, variables: of one phase.
      source: sequence of examples.
      progress: called after every batch.

    Returns:
      dict of NumPy arrays [number of examples, ...] in the order of the split, NaN
      where a measure is undefined.
    """
    step = compiled(measure, config, model, matched_area=config.matched_area)
    return map_split(
        config, source, lambda batch: step(variables, batch), progress=progress
    )


def compiled(step, config, model, *, num_carried: int = 1, **options):
    """``step(variables, ..., batch)`` over all devices, compiled once per options."""
    return _compiled(
        step,
        model,
        tuple(config.image_mean),
        tuple(config.image_std),
        num_carried,
        tuple(sorted(options.items())),
    )


@functools.lru_cache(maxsize=64)
def _compiled(step, model, mean, std, num_carried, options):
    return jax.pmap(
        functools.partial(
            step, model=model, image_stats={"mean": mean, "std": std}, **dict(options)
        ),
        axis_name=AXIS,
        in_axes=(None,) * num_carried + (0,),
    )


def map_split(config, source, fn, *, progress=None) -> dict:
    """Apply ``fn(batch on devices) -> dict of [devices, n, ...]`` to a whole split.

    Batches carry ``place``, each example's index in the source.

    Returns:
      dict of NumPy arrays [number of examples, ...], in the order of the source, of
      all processes.
    """
    parts = []
    for batch in placed_batches(config, source):
        values = {**fn(shard(batch)), "place": batch["place"]}
        values = jax.device_get(values)
        real = batch["example_mask"] > 0
        parts.append({k: _unshard(v, len(real))[real] for k, v in values.items()})
        if progress:
            progress()
    values = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    if jax.process_count() > 1:
        values = _gather(values)
    order = np.argsort(values.pop("place"))
    return {k: v[order] for k, v in values.items()}


def placed_batches(config, source):
    """The evaluation batches of a source with ``place`` [B] int32."""
    size = config.batch_size // jax.process_count()
    local = np.arange(size) * jax.process_count() + jax.process_index()
    batches = pipeline.iterate(eval_batches(config, source))
    for number, batch in enumerate(batches):
        place = (number * config.batch_size + local).astype(np.int32)
        yield {**batch, "place": place}


def _unshard(values, size):
    return np.asarray(values).reshape(size, *values.shape[2:]) if size else values


class Examples:
    """Some examples of a source, by index."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"no example {index}")
        return self._source[int(self._indices[index])]


def first_examples(source, number: int | None):
    """The first examples of a source; all of it if number is None or more."""
    if number is None or number >= len(source):
        return source
    return Examples(source, range(number))


def data_set_moments(config, model, variables, source, *, num_examples=1024):
    """Feature moments of the first examples of a split, in evaluation mode."""
    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    shape = jax.eval_shape(
        lambda x: model.apply(variables, x, method="features"), images
    ).shape
    stats = feature_stats.init(shape[1:])
    num_batches = -(-min(num_examples, len(source)) // config.batch_size)
    batches = eval_batches(config, source, shard=(0, 1))[:num_batches]
    for batch in pipeline.iterate(batches):
        stats = _update_stats(
            variables,
            stats,
            batch["image"],
            batch["example_mask"],
            model=model,
            image_stats=tuple(image_stats(config).items()),
        )
    return feature_stats.moments(stats)


@functools.partial(jax.jit, static_argnames=("model", "image_stats"))
def _update_stats(variables, stats, images, mask, *, model, image_stats):
    images = normalize_images(images, **dict(image_stats))
    features = model.apply(variables, images, method="features")
    return feature_stats.update(stats, features, mask)


def eval_batches(config, source, *, shard=None):
    """The finite sequence of evaluation batches of a split, with example_mask."""
    return pipeline.make_eval_batches(
        source,
        batch_size=config.batch_size,
        transform=config.eval_transform,
        image_size=config.image_size,
        shard=shard,
    )


def image_stats(config) -> dict:
    """The mean and std of ``step.normalize_images``."""
    return {"mean": tuple(config.image_mean), "std": tuple(config.image_std)}


def shard(batch):
    """[B, ...] -> [local devices, B / devices, ...]."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)


def _gather(values):
    """Join the examples that every process measured; their number may differ."""
    from jax.experimental import multihost_utils

    size = len(next(iter(values.values())))
    sizes = multihost_utils.process_allgather(np.int32(size)).reshape(-1)
    padded = {
        k: np.pad(v, [(0, sizes.max() - size)] + [(0, 0)] * (v.ndim - 1))
        for k, v in values.items()
    }
    gathered = multihost_utils.process_allgather(padded)
    return {
        k: np.concatenate([row[:n] for row, n in zip(v, sizes, strict=True)])
        for k, v in gathered.items()
    }


# Loading a run.


def load_config(workdir: Path):
    """The configuration of a run.

    Raises:
      ConfigError: there is no run in the folder.
    """
    from ml_collections import ConfigDict

    try:
        return ConfigDict(_tuples(json.loads((workdir / "config.json").read_text())))
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir} holds no run (no config.json); "
            f"train one first: python -m train --workdir={workdir}"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{workdir}/config.json is not valid: {error}") from None


def choose_phases(config, names) -> tuple:
    """The phases of these names, in the order of the run.

    Raises:
      ConfigError: one of them is none of the run's.
    """
    unknown = sorted(set(names) - set(config.phases))
    if unknown:
        raise ConfigError(
            f"the run has no phase {unknown[0]!r}; it has {', '.join(config.phases)}"
        )
    return tuple(name for name in config.phases if name in names)


def _tuples(tree):
    """Lists become the tuples that they were before JSON; models must be hashable."""
    if isinstance(tree, dict):
        return {key: _tuples(branch) for key, branch in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def load_states(config, num_classes: int, workdir: Path):
    """The model and the newest checkpoint of every phase.

    Returns:
      (model, dict phase -> TrainState, notes): the notes name phases without one.

    Raises:
      ConfigError: no phase has a checkpoint, or one is of another model.
      CheckpointError: a checkpoint cannot be read.
    """
    from train import checkpoint, loop
    from train import state as states

    model = loop.make_model(config, num_classes)
    tx = states.make_optimizer(config.optimizer, states.make_schedule(1.0, 2, 0))
    like = jax.eval_shape(
        lambda: states.create_state(
            jax.random.key(0),
            model,
            tx,
            config.image_size,
            ema=config.get("ema_decay", 0) > 0,
        )
    )
    loaded, notes = {}, []
    for phase in config.phases:
        folder = workdir / "checkpoints" / phase
        restored = None
        if folder.is_dir():
            with checkpoint.open_manager(folder) as manager:
                _check_same_model(manager, like, workdir)
                restored = checkpoint.restore(manager, like)
        if restored is None:
            notes.append(f"phase {phase} has no checkpoint yet and is left out")
        else:
            loaded[phase] = jax.tree.map(jnp.asarray, restored[0])
    if not loaded:
        raise ConfigError(
            f"no checkpoint in {workdir}/checkpoints; "
            f"train first: python -m train --workdir={workdir}"
        )
    return model, loaded, notes


def _check_same_model(manager, like, workdir):
    """ConfigError if the newest checkpoint holds arrays of other names or shapes."""
    import orbax.checkpoint as ocp

    step = manager.latest_step()
    if step is None:
        return
    folder = Path(manager.directory) / str(step)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder / "state")
        saved = _shapes(metadata.item_metadata.tree)
    except Exception:  # noqa: BLE001
        return  # restoring will say what is damaged
    wanted = _shapes(like)
    different = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name.startswith(("params", "batch_stats"))
        and saved.get(name) != wanted.get(name)
    )
    if different:
        name = different[0]
        raise ConfigError(
            f"checkpoint {folder} is of another model than {workdir}/config.json "
            f"describes: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} here"
        )


def _shapes(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): tuple(
            leaf.shape
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


# Means and intervals.


def summarize(values: dict) -> dict:
    """Per measure: the mean, its bootstrap 95 % interval, n and what is undefined.

    Args:
      values: dict of per-example arrays, as from ``measure_split``.

    Returns:
      dict measure -> {mean, low, high, n, undefined}, for the keys of ``MEASURES``.
    """
    values = dict(values)
    summary = {}
    if "iou_curve" in values:
        curve = values.pop("iou_curve")
        means = np.array([_mean(column) for column in curve.T])
        best = 0 if np.isnan(means).all() else int(np.nanargmax(means))
        values["iou_best"] = curve[:, best]
    for key in MEASURES:
        if key in values:
            known = np.isfinite(values[key])
            interval = metrics.mean_and_interval(values[key], known)
            summary[key] = {
                **interval._asdict(),
                "n": int(known.sum()),
                "undefined": int((~known).sum()),
            }
    if "iou_best" in summary:
        summary["iou_best"]["threshold"] = best / measures.NUM_THRESHOLDS
    if "confidence" in values:
        summary["calibration_error"] = _calibration(values)
    return summary


def _calibration(values, num_resamples=200):
    confidence, correct = values["confidence"], values["accuracy"]
    known = np.isfinite(confidence)
    confidence, correct = confidence[known], correct[known]
    n = len(confidence)
    generator = np.random.default_rng(0)
    resampled = [
        measures.calibration_error(confidence[i], correct[i])
        for i in (
            generator.integers(n, size=n) for _ in range(num_resamples if n else 0)
        )
    ]
    low, high = np.quantile(resampled, [0.025, 0.975]) if n else (math.nan, math.nan)
    mean = measures.calibration_error(confidence, correct) if n else math.nan
    return {
        "mean": mean,
        "low": float(low),
        "high": float(high),
        "n": n,
        "undefined": int((~known).sum()),
    }


def differences(values: dict, reference: dict) -> dict:
    """Paired: the mean of value - reference per example, with its interval."""
    rows = {}
    for key in MEASURES:
        if key in values and key in reference:
            gap = values[key] - reference[key]
            known = np.isfinite(gap)
            interval = metrics.mean_and_interval(gap, known)
            rows[key] = {**interval._asdict(), "n": int(known.sum())}
    return rows


def _mean(values) -> float:
    """The mean of what is defined, NaN for nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


# The full evaluation.


def evaluate_run(run: Run, source, *, compare=(), options=None, progress=True):
    """Everything that ``python -m train.evaluate`` measures.

    Args:
      run: with its data.
      source: the examples to evaluate, as from ``open_split``.
      compare: further runs, measured on the same split; their phases are named
        RUN/PHASE.
      options: Options.
      progress: show a bar.

    Returns:
      (results, per_example): results is what evaluation.json holds; per_example is a
      dict of "phase/measure" and "method/model/measure" -> arrays.
    """
    options = options or Options()
    start = time.perf_counter()
    num = len(source)
    perturbed = first_examples(source, min(options.num_perturbed, num))
    probed = first_examples(source, min(options.num_sensitivity, num))
    explained = first_examples(source, min(options.num_method_images, num))
    random_part = first_examples(source, min(options.num_sanity, len(explained)))
    before, after = picture_phases(run)

    phases = {name: (run, state) for name, state in run.states.items()}
    for other in compare:
        for name, state in other.states.items():
            phases[f"{other.name}/{name}"] = (other, state)
    models = {name: run.states[name] for name in dict.fromkeys((before, after))}

    def num_batches(part):
        return -(-len(part) // run.config.batch_size)

    # Weighted by rough cost, in batches of the cheap measures.
    total = len(phases) * (
        num_batches(source) + 12 * num_batches(perturbed) + 12 * num_batches(probed)
    ) + len(attribution.METHODS) * 2 * (
        len(models) * num_batches(explained) + num_batches(random_part)
    )
    bar = tqdm(total=total, desc="evaluate", disable=not progress, unit="batch")

    per_example, summaries, curves = {}, {}, {}
    for name, (owner, state) in phases.items():
        bar.set_postfix_str(name)
        config, variables = owner.config, state.variables
        values = measure_split(
            config, owner.model, variables, source, progress=bar.update
        )
        for step, part in (
            (measures.perturb, perturbed),
            (measures.sensitivity, probed),
        ):
            fn = compiled(step, config, owner.model)
            values |= map_split(
                config,
                part,
                lambda batch, fn=fn, variables=variables: fn(variables, batch),
                progress=lambda: bar.update(12),
            )
        curves[name] = {
            kind: [_mean(column) for column in values[kind].T]
            for kind in ("fractions", "deletion_curve", "insertion_curve")
        }
        del values["fractions"]
        summaries[name] = summarize(values)
        per_example |= {f"{name}/{key}": value for key, value in values.items()}

    methods, sanity, maps_values = _evaluate_methods(
        run, models, explained, random_part, bar
    )
    per_example |= maps_values
    bar.close()

    results = {
        "run": run.name,
        "split": options.split or run.config.test_split,
        "num_images": num,
        "num_perturbed": len(perturbed),
        "num_sensitivity": len(probed),
        "num_method_images": len(explained),
        "num_sanity": len(random_part),
        "has_boxes": "bbox" in source[0] or "mask" in source[0],
        "num_classes": run.data.num_classes,
        "before": before,
        "after": after,
        "interval": "percentile bootstrap over examples, 1000 resamples, 95 %",
        "phases": summaries,
        "differences": _phase_differences(run, per_example),
        "curves": curves,
        "methods": methods,
        "sanity": sanity,
        "sanity_limit": SANITY_LIMIT,
        "measures": {key: m._asdict() for key, m in MEASURES.items()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": time.perf_counter() - start,
    }
    results["notes"] = _notes(results, [run, *compare])
    return results, per_example


def open_split(run: Run, options: Options):
    """The examples of the split that the options name.

    Raises:
      ConfigError, DatasetError: no such split, or nothing in it.
    """
    from train import loop

    if options.split is None or options.split == run.config.test_split:
        source = run.data.test
    else:
        config = run.config.copy_and_resolve_references()
        config.test_split = options.split
        source = loop.load_data(config).test
    if len(source) == 0 or (options.limit is not None and options.limit < 1):
        raise ConfigError("there is no image to evaluate; raise --limit")
    return first_examples(source, options.limit)


def picture_phases(run) -> tuple[str, str]:
    """The phases that stand for before and after."""
    known = [p for p in run.config.picture_phases if p in run.states]
    names = known if len(known) == 2 else list(run.states)
    return names[0], names[-1]


def _evaluate_methods(run, models, explained, random_part, bar):
    """The table of methods, the check by random weights and the per-example values."""
    from train import state as states

    config = run.config
    score_fn = compiled(
        _score_maps,
        config,
        run.model,
        num_carried=1,
        matched_area=config.matched_area,
    )
    tx = states.make_optimizer(config.optimizer, states.make_schedule(1.0, 2, 0))
    fresh = states.create_state(
        jax.random.key(config.seed + 1), run.model, tx, config.image_size
    )
    all_models = {**{name: s.variables for name, s in models.items()}}
    all_models[None] = fresh.variables
    moments = {
        name: data_set_moments(config, run.model, variables, run.data.train)
        for name, variables in all_models.items()
    }
    rows, sanity, per_example = [], {}, {}
    first = next(iter(models))
    for method in attribution.METHODS:
        bar.set_postfix_str(method)
        fn = compiled(
            measures.method_maps, config, run.model, num_carried=2, method=method
        )
        batch = shard(next(iter(placed_batches(config, explained))))
        jax.block_until_ready(fn(all_models[first], moments[first], batch))  # compile
        for name in models:
            clock = _Clock()

            def score(batch, name=name, clock=clock, fn=fn):
                with clock:
                    maps = jax.block_until_ready(
                        fn(all_models[name], moments[name], batch)
                    )
                return {**score_fn(all_models[name], (batch, maps)), "maps": maps}

            values = map_split(config, explained, score, progress=lambda: bar.update(2))
            maps = values.pop("maps")
            if name == first:
                known = maps[: len(random_part)]
            summary = summarize(values)
            rows.append(
                {
                    "method": method,
                    "model": name,
                    "ours": method == "hirescam" and config[name].method == "guided",
                    "ms_per_image": 1e3 * clock.seconds / len(explained),
                    "undefined_maps": int((~np.isfinite(maps).all(axis=(1, 2))).sum()),
                    "measures": summary,
                }
            )
            per_example |= {
                f"{method}/{name}/{key}": value for key, value in values.items()
            }
        other = map_split(
            config,
            random_part,
            lambda batch, fn=fn: {"maps": fn(all_models[None], moments[None], batch)},
            progress=lambda: bar.update(2),
        )
        change = measures.map_change(known, other["maps"])
        sanity[method] = sanity_verdict(change)
        per_example[f"{method}/sanity"] = change
    return rows, sanity, per_example


def sanity_verdict(correlations) -> dict:
    """Whether maps follow the weights: they fail if random weights leave them alike.

    Args:
      correlations: ``measures.map_change`` [N] of a trained and a random network.

    Returns:
      {mean, low, high, n, passed}; passed if the mean is below ``SANITY_LIMIT``.
    """
    known = np.isfinite(correlations)
    interval = metrics.mean_and_interval(correlations, known)
    return {
        **interval._asdict(),
        "n": int(known.sum()),
        "passed": bool(interval.mean < SANITY_LIMIT),
    }


def _score_maps(variables, batch_and_maps, *, model, image_stats, matched_area):
    batch, maps = batch_and_maps
    return measures.measure_maps(
        variables,
        batch,
        maps,
        model=model,
        image_stats=image_stats,
        matched_area=matched_area,
    )


class _Clock(contextlib.AbstractContextManager):
    """Adds up the seconds spent inside."""

    seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._start


def _phase_differences(run, per_example):
    """Each later phase against its control: the plain phase from the same weights."""
    config, rows = run.config, {}

    def of(phase):
        prefix = f"{phase}/"
        return {
            key.removeprefix(prefix): value
            for key, value in per_example.items()
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
        }

    for name in run.states:
        controls = [
            other
            for other in run.states
            if config[other].method == "plain"
            and config[other].init == config[name].init
        ]
        if config[name].method != "plain" and controls:
            reference = controls[0]
            rows[name] = {
                "reference": reference,
                "measures": differences(of(name), of(reference)),
            }
    return rows


def _notes(results, runs):
    """What a reader must know about the numbers, one line each."""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if not results["has_boxes"]:
        notes.append(
            f"split {results['split']} has neither boxes nor masks: localisation is "
            "left out"
        )
    if results["num_images"] == 1:
        notes.append("there is one image: the intervals say nothing")
    if results["num_classes"] == 1:
        notes.append("there is one class: no runner-up, so its map is left out")
    for name, row in results["phases"].items():
        if row["area"]["undefined"]:
            notes.append(
                f"{row['area']['undefined']} of {results['num_images']} maps L^c of "
                f"{name} are not finite and are left out"
            )
    for row in results["methods"]:
        if row["undefined_maps"]:
            notes.append(
                f"{row['undefined_maps']} of {results['num_method_images']} maps of "
                f"{row['method']} on {row['model']} are not finite and are left out"
            )
    return notes


def write_evaluation(results, per_example, workdir: Path):
    """evaluation.json, evaluation.npz and evaluation.md."""
    from train import report

    text = json.dumps(_plain(results), indent=1, allow_nan=False)
    write_text(workdir / "evaluation.json", text + "\n")
    with open(workdir / "evaluation.npz", "wb") as file:
        np.savez_compressed(file, **per_example)
    write_text(workdir / "evaluation.md", report.markdown(results))


def _plain(tree: Any):
    """NaN and infinity become None, which JSON can say."""
    if isinstance(tree, dict):
        return {key: _plain(branch) for key, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(branch) for branch in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def main(argv=None) -> int:
    """The command; a mistake of the caller's is one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Evaluate a run; write its report."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="WORKDIR", help="further runs"
    )
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="of the run; all of them if absent"
    )
    parser.add_argument("--split", help="of the data set; the config's test split")
    parser.add_argument("--limit", type=int, help="images of the split at most")
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    arguments = parser.parse_args(argv)
    options = Options(split=arguments.split, limit=arguments.limit)
    # Orbax and tfds tell much that no reader of a table needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        run = Run(arguments.workdir, phases=arguments.phases)
        check_devices(run.config)
        others = [
            _comparable(Run(folder, run.data.num_classes), run)
            for folder in arguments.compare
        ]
        source = open_split(run, options)
        results, per_example = evaluate_run(
            run,
            source,
            compare=others,
            options=options,
            progress=not arguments.no_progress,
        )
    except ValueError as error:
        # ConfigError, DatasetError and CheckpointError say one line each.
        if type(error) is ValueError:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if jax.process_index() == 0:
        from train import report

        write_evaluation(results, per_example, run.workdir)
        page = report.write_report(run, source, results, per_example)
        print((run.workdir / "evaluation.md").read_text())
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return 0


def check_devices(config):
    """ConfigError unless a batch can be shared among the devices."""
    if config.batch_size % jax.device_count():
        raise ConfigError(
            f"batch_size={config.batch_size} of the run is not divisible by the "
            f"{jax.device_count()} devices; evaluate it on a number that divides it"
        )


def _comparable(other, run):
    if other.config.image_size != run.config.image_size:
        raise ConfigError(
            f"{other.workdir} has images of {other.config.image_size} pixels and "
            f"{run.workdir} of {run.config.image_size}: they cannot be compared"
        )
    if other.config.batch_size != run.config.batch_size:
        other.config.batch_size = run.config.batch_size
    return other


if __name__ == "__main__":
    # Read when jax loads XLA: its C++ warnings are of no use to the reader of a table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
