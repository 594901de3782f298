"""Judge trained phases: the full evaluation with its report.

    python -m train.evaluate --workdir runs/quickstart [--compare runs/other ...]

writes evaluation.json, evaluation.npz, evaluation.md, pictures and report.html into the
workdir.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from ibsgl_jax import attribution
from train import command, devices
from train.data import dataset
from train.errors import ConfigError
from train.files import write_json, write_text
from train.measure import splits, statistics, temperature
from train.measure.batch import perturb, sensitivity
from train.measure.catalogue import MEASURES
from train.measure.methods import SANITY_LIMIT, evaluate_methods
from train.run import saved_run
from train.show import report, tables


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
    perturbed = dataset.first_examples(source, min(options.num_perturbed, num))
    probed = dataset.first_examples(source, min(options.num_sensitivity, num))
    explained = dataset.first_examples(source, min(options.num_method_images, num))
    random_part = dataset.first_examples(
        source, min(options.num_sanity, len(explained))
    )
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
            config, owner.model, variables, source, validation=run.data.validation
        )
        for step, part in (
            (perturb, perturbed),
            (sensitivity, probed),
        ):
            fn = devices.compiled(step, config, owner.model)
            values |= splits.map_split(
                config,
                part,
                lambda batch, fn=fn, variables=variables: fn(variables, batch),
                progress=lambda: bar.update(12),
            )
        curves[name] = {
            kind: [statistics.finite_mean(column) for column in values[kind].T]
            for kind in ("fractions", "deletion_curve", "insertion_curve")
        }
        del values["fractions"]
        summaries[name] = statistics.summarize(values)
        per_example |= {f"{name}/{key}": value for key, value in values.items()}

    methods, sanity, maps_values = evaluate_methods(
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


def picture_phases(run) -> tuple[str, str]:
    """The phases that stand for before and after."""
    known = [p for p in run.config.picture_phases if p in run.states]
    names = known if len(known) == 2 else list(run.states)
    return names[0], names[-1]


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
                "measures": statistics.differences(of(name), of(reference)),
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
    write_json(workdir / "evaluation.json", results, indent=1)
    with open(workdir / "evaluation.npz", "wb") as file:
        np.savez_compressed(file, **per_example)
    write_text(workdir / "evaluation.md", tables.evaluation_markdown(results))


@command.run
def main(argv=None) -> int:
    """The command."""
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
    run = saved_run.Run(arguments.workdir, phases=arguments.phases)
    devices.check_devices(run.config)
    others = [
        _comparable(saved_run.Run(folder, run.data.num_classes), run)
        for folder in arguments.compare
    ]
    source = saved_run.open_split(run, options.split, options.limit)
    results, per_example = evaluate_run(
        run,
        source,
        compare=others,
        options=options,
        progress=not arguments.no_progress,
    )
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if jax.process_index() == 0:
        write_evaluation(results, per_example, run.workdir)
        page = report.write_report(run, source, results, per_example)
        print((run.workdir / "evaluation.md").read_text())
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return 0


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
    sys.exit(main())
