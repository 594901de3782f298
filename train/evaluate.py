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
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from ibsgl_jax import attribution, metrics
from train import intervals, measures, saved_run, splits, temperature
from train.measures import MEASURES
from train.workdir import ConfigError, write_text

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
        values = splits.measure_split(config, model, state.variables, data.test)
        results[name] = {
            k: intervals.finite_mean(v)
            for k, v in values.items()
            if v.ndim == 1 and k != "predicted"
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


# The full evaluation.


def evaluate_run(
    run: saved_run.Run, source, *, compare=(), options=None, progress=True
):
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
    perturbed = splits.first_examples(source, min(options.num_perturbed, num))
    probed = splits.first_examples(source, min(options.num_sensitivity, num))
    explained = splits.first_examples(source, min(options.num_method_images, num))
    random_part = splits.first_examples(source, min(options.num_sanity, len(explained)))
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
        values = splits.measure_split(
            config, owner.model, variables, source, progress=bar.update
        )
        values |= temperature.measure_split(
            config, owner.model, variables, source, validation=owner.data.validation
        )
        for step, part in (
            (measures.perturb, perturbed),
            (measures.sensitivity, probed),
        ):
            fn = splits.compiled(step, config, owner.model)
            values |= splits.map_split(
                config,
                part,
                lambda batch, fn=fn, variables=variables: fn(variables, batch),
                progress=lambda: bar.update(12),
            )
        curves[name] = {
            kind: [intervals.finite_mean(column) for column in values[kind].T]
            for kind in ("fractions", "deletion_curve", "insertion_curve")
        }
        del values["fractions"]
        summaries[name] = intervals.summarize(values)
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


def open_split(run: saved_run.Run, options: Options):
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
    return splits.first_examples(source, options.limit)


def picture_phases(run) -> tuple[str, str]:
    """The phases that stand for before and after."""
    known = [p for p in run.config.picture_phases if p in run.states]
    names = known if len(known) == 2 else list(run.states)
    return names[0], names[-1]


def _evaluate_methods(run, models, explained, random_part, bar):
    """The table of methods, the check by random weights and the per-example values."""
    from train import state as states

    config = run.config
    score_fn = splits.compiled(
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
        name: splits.data_set_moments(config, run.model, variables, run.data.train)
        for name, variables in all_models.items()
    }
    rows, sanity, per_example = [], {}, {}
    first = next(iter(models))
    for method in attribution.METHODS:
        bar.set_postfix_str(method)
        fn = splits.compiled(
            measures.method_maps, config, run.model, num_carried=2, method=method
        )
        batch = splits.shard(next(iter(splits.placed_batches(config, explained))))
        jax.block_until_ready(fn(all_models[first], moments[first], batch))  # compile
        for name in models:
            clock = _Clock()

            def score(batch, name=name, clock=clock, fn=fn):
                with clock:
                    maps = jax.block_until_ready(
                        fn(all_models[name], moments[name], batch)
                    )
                return {**score_fn(all_models[name], (batch, maps)), "maps": maps}

            values = splits.map_split(
                config, explained, score, progress=lambda: bar.update(2)
            )
            maps = values.pop("maps")
            if name == first:
                known = maps[: len(random_part)]
            summary = intervals.summarize(values)
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
        other = splits.map_split(
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
                "measures": intervals.differences(of(name), of(reference)),
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
        run = saved_run.Run(arguments.workdir, phases=arguments.phases)
        check_devices(run.config)
        others = [
            _comparable(saved_run.Run(folder, run.data.num_classes), run)
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
