"""Judge trained phases: an evaluation that fits into two minutes, with its report.

    python -m train.evaluate --workdir runs/quickstart [--compare runs/other ...]

writes evaluation.json, evaluation.npz, evaluation.md, pictures and report.html into the
workdir. Where all of it would take more than five minutes, fewer methods and images are
taken, and said; --full takes all. Interrupted, the same command goes on.
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt
from train import memory

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()
    memory.restart()

import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from train import command, devices, programs
from train.arguments import Parser, at_least, some
from train.data import dataset
from train.data.faults import shown
from train.errors import ConfigError, disk_errors
from train.files import write_json, write_text
from train.measure import controls, plan, splits, statistics
from train.measure.catalogue import MEASURES
from train.measure.classes import by_chance, class_rows, weak_note
from train.measure.methods import SANITY_LIMIT, evaluate_methods, random_network
from train.measure.parts import Parts, checksum, write_arrays
from train.measure.phases import Network, part_values
from train.measure.plan import Options
from train.run import saved_run
from train.show import figures, report, tables
from train.show.names import class_names

CURVES = ("fractions", "deletion_curve", "insertion_curve")


class Bar(tqdm):
    """Progress and time left; what was there already is not time's measure.

    Args:
      total: passes.
      seconds: that all of them were planned to take; None if nobody knows.
      progress: show it.
    """

    def __init__(self, total: int, *, seconds: float | None = None, progress: bool):
        self._seconds = seconds
        super().__init__(
            total=total,
            disable=not progress,
            bar_format="evaluate {percentage:3.0f}% |{bar:30}| {elapsed}, about "
            "{remaining} left{postfix}",
        )

    @property
    def format_dict(self):
        """What tqdm shows: its time left is the plan's, the later the less so.

        The first passes wait for compilations, and alone they would promise hours.
        """
        found = super().format_dict
        left, done = self.total - self.n, self.n - self.initial
        if self._seconds and left > 0 and self.total > self.initial:
            share = done / (self.total - self.initial)
            planned = self._seconds * left / self.total
            found["rate"] = left / (planned + (1 - share) * found["elapsed"])
        return found

    def advance(self, passes: int, *, new: bool = True):
        if not new and not self.disable:
            self.initial += passes
        self.update(passes)


def evaluate_run(
    run: saved_run.Run,
    source,
    *,
    compare=(),
    options=None,
    seconds=None,
    progress=True,
    kept=None,
):
    """Everything that ``python -m train.evaluate`` measures.

    Args:
      run: with its data.
      source: the examples to evaluate, as from ``open_split``.
      compare: further runs, on the same split; their phases are named RUN/PHASE.
      options: Options.
      seconds: that all of it was planned to take, for the bar.
      progress: show a bar.
      kept: parts.Parts, finished by an earlier call; none are kept if None.

    Returns:
      (results, per_example): what evaluation.json holds; dict of "phase/measure" and
      "method/model/measure" -> arrays.
    """
    start, options, kept = time.perf_counter(), options or Options(), kept or Parts()
    sources = plan.parts_of(source, options)
    networks = networks_of(run, compare)
    before, after = figures.picture_phases(run.config, run.states)
    models = {phase: run.states[phase].variables for phase in (before, after)}
    models[None] = random_network(run)
    sizes = plan.Sizes(len(source), len(networks), len(models) - 1)
    per_example, summaries, curves = {}, {}, {}
    passes = plan.total_passes(options, sizes, run.config.batch_size)
    with Bar(passes, seconds=seconds, progress=progress) as bar:
        for phase, network in networks.items():
            bar.set_postfix_str(phase)
            values = _phase_values(phase, network, sources, options, kept, bar)
            if "fractions" in values:
                curves[phase] = _mean_curves(values)
            summaries[phase] = statistics.summarize(values, intervals=True)
            per_example |= {f"{phase}/{key}": value for key, value in values.items()}
        methods, sanity, maps_values = evaluate_methods(
            run,
            models,
            sources,
            options,
            moments_of=make_moments_of(run, models, options),
            kept=kept,
            bar=bar,
        )
    names = class_names(run.data)
    results = {
        "run": run.name,
        "split": options.split or run.config.test_split,
        "num_images": len(sources["measures"]),
        **plan.numbers_of(sources, options),
        "has_boxes": "bbox" in source[0] or "mask" in source[0],
        "num_classes": run.data.num_classes,
        "class_names": names,
        "before": before,
        "after": after,
        "interval": "percentile bootstrap over examples, 1000 resamples, 95 %",
        "phases": summaries,
        "differences": controls.differences(run, per_example),
        "curves": curves,
        "classes": class_rows(per_example, list(run.states), run.data.num_classes),
        "methods": methods,
        "sanity": sanity,
        "sanity_limit": SANITY_LIMIT,
        **by_chance(per_example, before, names),
        "measures": {key: m._asdict() for key, m in MEASURES.items()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": time.perf_counter() - start,
    }
    results["notes"] = notes_of(results, [run, *compare], len(source))
    places = dataset.places(sources["measures"])
    if not np.array_equal(places, np.arange(len(places))):
        per_example["places"] = places
    return results, per_example | maps_values


def networks_of(run, compare) -> dict[str, Network]:
    """The networks to measure: the run's by phase, others by RUN/PHASE."""
    networks = {
        phase: Network(run.config, run.model, state.variables, run.data)
        for phase, state in run.states.items()
    }
    for other in compare:
        for phase, state in other.states.items():
            networks[f"{other.name}/{phase}"] = Network(
                other.config, other.model, state.variables, other.data
            )
    return networks


def _phase_values(phase, network, sources, options, kept, bar):
    """All parts of one network, per example."""
    values, batch = {}, network.config.batch_size
    for part, source in sources.items():
        if part not in plan.PASSES or not len(source):
            continue
        name, one_batch = f"phase {phase} {part}", plan.cost(part, batch, batch)
        if kept.has(name):
            bar.advance(plan.cost(part, len(source), batch), new=False)
        values |= kept.get(
            name,
            functools.partial(
                part_values,
                network,
                part,
                source,
                validation=plan.drawn(network.data.validation, options.num_images),
                progress=lambda passes=one_batch: bar.advance(passes),
            ),
        )
    return values


def _mean_curves(values):
    """Deletion, insertion and the shares of pixels, which leave the values: lists."""
    found = {
        kind: [statistics.finite_mean(column) for column in values[kind].T]
        for kind in CURVES
    }
    del values["fractions"]
    return found


def make_moments_of(run, models, options):
    """Function of a key of models: the moments of its features in training images."""

    @functools.cache
    def moments_of(name):
        return splits.data_set_moments(
            run.config,
            run.model,
            models[name],
            run.data.train,
            num_examples=options.num_statistics,
        )

    return moments_of


def notes_of(results, runs, num_split: int) -> list[str]:
    """What a reader must know about the numbers, one line each."""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [
        f"{other.name} learned from other data than {runs[0].name}: what is measured "
        "here may be among it"
        for other in runs[1:]
        if dataset.which(other.config) != dataset.which(runs[0].config)
    ]
    split = results["split"]
    if results["num_images"] < num_split:
        notes.append(
            f"measured on {results['num_images']} of {num_split} images, drawn at "
            f"random, and with {len(results['sanity'])} methods of explanation, to fit "
            "into two minutes; --full takes all"
        )
    elif results["reduced"]:
        notes.append(
            f"{len(results['sanity'])} methods of explanation, on fewer images, to fit "
            "into two minutes; --full takes all"
        )
    if split == runs[0].config.validation_split:
        notes.append(
            f"the temperature is fitted on split {split} itself: its scaled measures "
            "are a little too good here"
        )
    notes += weak_note(results)
    if results["unlabelled"]:
        notes.append(
            f"{results['unlabelled']} of {results['num_images']} images have no label: "
            "what is measured of a map is of the others"
        )
    notes += [
        f"{phase} has no control: no plain phase with the same init, data and number "
        "of epochs"
        for phase in controls.without_control(runs[0])
    ]
    if not results["has_boxes"]:
        notes.append(
            f"split {split} has neither boxes nor masks: localisation is left out"
        )
    if results["num_images"] == 1:
        notes.append("there is one image: the intervals say nothing")
    if results["num_classes"] == 1:
        notes.append("there is one class: no runner-up, so its map is left out")
    for name, row in results["phases"].items():
        undefined = row["area"]["undefined"] - results["unlabelled"]
        if undefined:
            notes.append(
                f"{undefined} of {results['num_images']} maps L^c of "
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
    with disk_errors():
        write_json(workdir / "evaluation.json", results, indent=1)
        write_arrays(workdir / "evaluation.npz", per_example)
        write_text(workdir / "evaluation.md", tables.evaluation_markdown(results))


def make_parser():
    parser = Parser(
        prog="python -m train.evaluate", description="Evaluate a run; write its report."
    )
    parser.add_argument("--workdir", required=True, type=some, help="folder of the run")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="WORKDIR", help="further runs"
    )
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="of the run; all of them if absent"
    )
    parser.add_argument(
        "--split", type=some, help="of the data set; the config's test split"
    )
    parser.add_argument("--limit", type=at_least(1), help="images of the split at most")
    parser.add_argument(
        "--full",
        action="store_true",
        help="all methods and images, however long that takes",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    return parser


@command.run
@programs.kept()
def main(argv=None) -> int:
    """The command."""
    arguments = make_parser().parse_args(argv)
    asked = Options(split=arguments.split, limit=arguments.limit)
    # Orbax and tfds tell much that no reader of a table needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    run = saved_run.Run(arguments.workdir, phases=arguments.phases)
    devices.check_devices(run.config)
    others = comparable([saved_run.Run(folder) for folder in arguments.compare], run)
    source = saved_run.open_split(run, asked.split, asked.limit)
    with disk_errors():
        kept, options, seconds = start(run, others, source, asked, full=arguments.full)
        results, per_example = evaluate_run(
            run,
            source,
            compare=others,
            options=options,
            seconds=seconds,
            progress=not arguments.no_progress,
            kept=kept,
        )
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if jax.process_index() == 0:
        write_evaluation(results, per_example, run.workdir)
        part = plan.parts_of(source, options)["measures"]
        page = report.write_report(run, part, results, per_example)
        kept.clear()
        print((run.workdir / "evaluation.md").read_text(encoding="utf-8"))
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return 0


def start(run, others, source, asked, *, full):
    """What is there of the same evaluation, and the options: as before, or chosen now.

    Returns:
      (parts.Parts, Options, planned seconds or None).
    """
    networks = networks_of(run, others)
    weights = {
        phase: checksum(network.variables) for phase, network in networks.items()
    }
    about = {
        "format": 3,
        "asked": dataclasses.asdict(asked),
        "full": full,
        "images": len(source),
        "data": [dataset.which(r.config) for r in (run, *others)],
        "weights": weights,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }
    kept = Parts(run.workdir / "evaluation.parts", about)
    if kept.plan is not None:
        known = kept.plan["options"]
        options = Options(**known | {"methods": tuple(known["methods"])})
        print("going on with an evaluation that was interrupted", file=sys.stderr)
        return kept, options, kept.plan["seconds"]
    options, seconds = asked, None
    if not full:
        first = next(iter(networks.values()))
        sizes = plan.Sizes(
            len(source),
            len(networks),
            len(set(figures.picture_phases(run.config, run.states))),
        )
        speed = plan.time_first_batch(
            first.config, first.model, first.variables, source
        )
        options = plan.choose(asked, sizes, speed)
        seconds = plan.total_seconds(options, sizes, speed)
        whole = plan.total_seconds(asked, sizes, speed)
        if options != asked:
            print(
                f"all of it would take about {whole / 60:.0f} minutes: fewer methods "
                "and images are taken; --full takes all",
                file=sys.stderr,
            )
    kept.start({"options": dataclasses.asdict(options), "seconds": seconds})
    return kept, options, seconds


def comparable(others, run):
    """Further runs that can be measured on the data of the first, with names apart.

    Raises:
      ConfigError: another link, images of another size, or other classes.
    """
    taken = {run.name}
    for other in others:
        for field, theirs, ours in (
            ("link=N", *(getattr(r.config, "link", "softmax") for r in (other, run))),
            ("images of N pixels", other.config.image_size, run.config.image_size),
            ("N classes", other.data.num_classes, run.data.num_classes),
        ):
            if theirs != ours:
                raise ConfigError(
                    f"{other.workdir} has {field.replace('N', str(theirs))} and "
                    f"{run.workdir} {field.replace('N', str(ours))}: they cannot be "
                    "compared"
                )
        names = other.data.class_names or (), run.data.class_names or ()
        for number, (theirs, ours) in enumerate(zip(*names, strict=False)):
            if theirs != ours:
                raise ConfigError(
                    f"class {number} is {shown(theirs)} in {other.workdir} and "
                    f"{shown(ours)} in {run.workdir}: they cannot be compared"
                )
        if other.config.batch_size != run.config.batch_size:
            other.config.batch_size = run.config.batch_size
        if other.name in taken:
            other.name = str(other.workdir)
        if other.name in taken:
            raise ConfigError(f"{other.workdir} is to be compared twice")
        taken.add(other.name)
    return others


if __name__ == "__main__":
    sys.exit(main())
