"""Measure the finished phases of a run on one split, without a report.

    python -m train.scores --workdir runs/quickstart --split validation

writes scores_SPLIT.json into the workdir: means over the split of every measure of
``measures.MEASURES``. What the file holds is not measured again; phases, methods and
measures that it lacks are added. May import jax, numpy and ``train``'s own modules.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from ibsgl_jax import attribution
from train import evaluate, intervals, measures, saved_run, splits, temperature
from train.measures import MEASURES
from train.workdir import ConfigError, write_text

# The parts of a phase's scores, each with its own number of images, and what one batch
# of them costs in batches of the first.
COSTS = {"measures": 1, "deletion": 6, "perturbed": 20, "methods": 3}


def path(workdir, split: str) -> Path:
    """Where the scores of a run on a split are."""
    return Path(workdir) / f"scores_{split}.json"


def read(workdir, split: str) -> dict:
    """The record: run, split, seed, jax, phases; empty if nothing is measured.

    ``phases`` is a dict phase -> {"measures": part, "deletion": part (by the mean
    colour only), "perturbed": part (all of ``measures.perturb``), "methods": dict
    method -> part}; a part is {limit, num_images, means, undefined}: how many
    images were asked for (None: all), how many there were, the mean of each measure
    over the images where it is defined, and on how many it is not.
    """
    try:
        return json.loads(path(workdir, split).read_text())
    except FileNotFoundError:
        return {"phases": {}}


def finished_phases(workdir, phases) -> tuple:
    """Those of the phases that are trained to their end, in their order."""
    models = Path(workdir) / "models"
    return tuple(p for p in phases if (models / f"{p}.npz").exists())


def to_measure(record: dict, phases, limits: dict, methods=()) -> list[tuple]:
    """What the record lacks: tuples (phase, part, method or None).

    Args:
      record: as from ``read``.
      phases: names.
      limits: dict of the number of images of each part of ``COSTS``; None is all of
        the split and 0 leaves the part out.
      methods: names of ``attribution.METHODS``.
    """
    wanted = [
        (phase, part, method)
        for phase in phases
        for part, limit in limits.items()
        for method in (methods if part == "methods" else (None,))
        if limit != 0
    ]

    def known(phase, part, method):
        entry = record["phases"].get(phase, {}).get(part, {})
        entry = entry.get(method, {}) if method else entry
        return "means" in entry and entry["limit"] == limits[part]

    return [task for task in wanted if not known(*task)]


def measure_run(workdir, split: str, *, phases, limits, methods=(), progress=True):
    """Measure what is missing and write it, phase by phase.

    Args:
      workdir: of a run.
      split: of its data set.
      phases, limits, methods: as in ``to_measure``; None for all finished phases.
      progress: show a bar.

    Returns:
      (record, notes): the notes name phases that are not finished, one line each.

    Raises:
      ConfigError, DatasetError, CheckpointError: one line that names the thing.
    """
    record = read(workdir, split)
    config = saved_run.load_config(Path(workdir))
    asked = saved_run.choose_phases(config, phases or config.phases)
    finished = finished_phases(workdir, config.phases)
    notes = [f"phase {p} is not trained to its end" for p in asked if p not in finished]
    asked = [phase for phase in asked if phase in finished]
    tasks = to_measure(record, asked, limits, methods)
    if not tasks:
        return record, notes
    run = saved_run.Run(workdir, phases={phase for phase, _, _ in tasks})
    evaluate.check_devices(run.config)
    source = evaluate.open_split(run, evaluate.Options(split=split))
    record = {
        "run": run.name,
        "split": split,
        "seed": run.config.seed,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": record["phases"],
    }
    parts = {p: splits.first_examples(source, limit) for p, limit in limits.items()}

    def cost(part):
        return COSTS[part] * -(-len(parts[part]) // run.config.batch_size)

    bar = tqdm(
        total=sum(cost(part) for _, part, _ in tasks),
        desc=f"{run.name} {split}",
        unit="batch",
        disable=not progress or jax.process_index() != 0,
    )
    with bar:
        for phase, part, method in tasks:
            bar.set_postfix_str(f"{phase} {method or ''}")
            values = _measure(
                run,
                run.states[phase].variables,
                parts[part],
                part,
                method,
                progress=lambda part=part: bar.update(COSTS[part]),
            )
            entry = {
                "limit": limits[part],
                "num_images": len(parts[part]),
                **summarize(values),
            }
            scores = record["phases"].setdefault(phase, {})
            if method:
                scores.setdefault("methods", {})[method] = entry
            else:
                scores[part] = entry
            record["phases"] = {
                p: record["phases"][p] for p in config.phases if p in record["phases"]
            }
            if jax.process_index() == 0:
                text = json.dumps(record, indent=2, allow_nan=False)
                write_text(path(workdir, split), text + "\n")
    return record, notes


def _measure(run, variables, source, part, method, *, progress):
    """Per-example arrays of one part of a phase's scores."""
    config, model = run.config, run.model
    if part == "measures":
        values = splits.measure_split(
            config, model, variables, source, progress=progress
        )
        return values | temperature.measure_split(
            config, model, variables, source, validation=run.data.validation
        )
    if part != "methods":
        less = {"substrates": ("mean",), "others": False} if part == "deletion" else {}
        step = splits.compiled(measures.perturb, config, model, **less)
        return splits.map_split(
            config, source, lambda batch: step(variables, batch), progress=progress
        )
    moments = splits.data_set_moments(config, model, variables, run.data.train)
    step = splits.compiled(
        measure_method,
        config,
        model,
        num_carried=2,
        method=method,
        matched_area=config.matched_area,
    )
    return splits.map_split(
        config, source, lambda batch: step(variables, moments, batch), progress=progress
    )


def measure_method(variables, moments, batch, *, method, matched_area, **bound):
    """``measures.measure_maps`` of the maps of one method, in one program."""
    maps = measures.method_maps(variables, moments, batch, method=method, **bound)
    return measures.measure_maps(
        variables, batch, maps, matched_area=matched_area, **bound
    )


def summarize(values: dict) -> dict:
    """Means of what ``MEASURES`` names, over the examples where it is defined.

    Args:
      values: dict of per-example arrays.

    Returns:
      {means, undefined}: dict measure -> mean (None where no example defines it), and
      dict measure -> number of examples that do not, where there are any.
    """
    values = dict(values)
    if "iou_curve" in values:
        curve = values.pop("iou_curve")
        means = np.array([intervals.finite_mean(column) for column in curve.T])
        values["iou_best"] = curve[:, np.argmax(np.nan_to_num(means, nan=-1.0))]
    known = {key: values[key] for key in MEASURES if key in values}
    means = {key: intervals.finite_mean(value) for key, value in known.items()}
    for key, confidence in intervals.CALIBRATIONS.items():
        if confidence in values:
            means[key] = measures.calibration_error(
                values[confidence], values["accuracy"]
            )
    counts = {key: int((~np.isfinite(value)).sum()) for key, value in known.items()}
    return {
        "means": {k: v if np.isfinite(v) else None for k, v in means.items()},
        "undefined": {key: count for key, count in counts.items() if count},
    }


def add_options(parser):
    """The options that say what is measured; ``train.sweep`` has the same ones."""
    parser.add_argument("--limit", type=int, help="images of the split at most")
    parser.add_argument(
        "--num-perturbed",
        type=int,
        default=512,
        help="images for deletion and insertion by the mean colour; 0 leaves them out",
    )
    parser.add_argument(
        "--all-perturbations",
        action="store_true",
        help="of them also by black and blur, degradation and ROAD: four times as long",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        choices=attribution.METHODS,
        metavar="METHOD",
        help="also the maps of these: " + ", ".join(attribution.METHODS),
    )
    parser.add_argument(
        "--num-method-images", type=int, default=512, help="images for the methods"
    )


def limits_of(arguments) -> dict:
    """The limits of ``to_measure`` that the options of ``add_options`` ask for."""
    return {
        "measures": arguments.limit,
        "deletion": 0 if arguments.all_perturbations else arguments.num_perturbed,
        "perturbed": arguments.num_perturbed if arguments.all_perturbations else 0,
        "methods": arguments.num_method_images,
    }


def main(argv=None) -> int:
    """The command; a mistake of the caller's is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m train.scores", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--split", required=True, help="of the data set")
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="all finished ones if absent"
    )
    add_options(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    arguments = parser.parse_args(argv)
    # Orbax and tfds tell much that no reader of a table needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    limits = limits_of(arguments)
    try:
        if any(limit is not None and limit < 0 for limit in limits.values()):
            raise ConfigError("a number of images is below 0")
        record, notes = measure_run(
            arguments.workdir,
            arguments.split,
            phases=arguments.phases,
            limits=limits,
            methods=arguments.methods,
            progress=not arguments.no_progress,
        )
    except ValueError as error:
        # ConfigError, DatasetError and CheckpointError say one line each.
        if type(error) is ValueError:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if jax.process_index() == 0:
        print(evaluate.table({p: means(s) for p, s in record["phases"].items()}))
    return 0


def means(scores: dict) -> dict:
    """The means of a phase's own map, of all its parts."""
    means = {}
    for part in ("measures", "deletion", "perturbed"):
        means |= scores.get(part, {}).get("means", {})
    return means


if __name__ == "__main__":
    # Read when jax loads XLA: its C++ warnings are of no use to the reader of a table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
