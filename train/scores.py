"""Measure the finished phases of a run on one split, without a report.

    python -m train.scores --workdir runs/quickstart --split validation

writes scores_SPLIT.json into the workdir: means over the split of every measure of
``catalogue.MEASURES``. What the file holds is not measured again; phases, methods and
measures that it lacks are added.
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt
from train import memory

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()
    memory.restart()

import sys
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from train import command, devices, programs
from train.arguments import Parser, at_least, some
from train.data import dataset
from train.errors import disk_errors
from train.files import write_json
from train.measure import scores_file, splits, statistics
from train.measure.phases import Network, method_values, part_values
from train.run import saved_run
from train.show import tables


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
    record = scores_file.read(workdir, split)
    config = saved_run.load_config(Path(workdir))
    asked = saved_run.choose_phases(config, phases or config.phases)
    finished = scores_file.finished_phases(workdir, config.phases)
    notes = [f"phase {p} is not trained to its end" for p in asked if p not in finished]
    asked = [phase for phase in asked if phase in finished]
    tasks = scores_file.to_measure(record, asked, limits, methods)
    if not tasks:
        return record, notes
    run = saved_run.Run(workdir, phases={phase for phase, _, _ in tasks})
    devices.check_devices(run.config)
    notes += run.notes
    tasks = [task for task in tasks if task[0] in run.states]
    source = saved_run.open_split(run, split)
    record = {
        "run": run.name,
        "split": split,
        "seed": run.config.seed,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": record["phases"],
    }
    parts = {p: dataset.first_examples(source, limit) for p, limit in limits.items()}

    def cost(part):
        return scores_file.COSTS[part] * -(-len(parts[part]) // run.config.batch_size)

    bar = tqdm(
        total=sum(cost(part) for _, part, _ in tasks),
        desc=f"{run.name} {split}",
        unit="batch",
        disable=not progress or jax.process_index() != 0,
    )
    with bar:
        for phase, part, method in tasks:
            bar.set_postfix_str(f"{phase} {method or ''}")
            values = _values(
                run,
                *(phase, part, method),
                parts[part],
                progress=lambda part=part: bar.update(scores_file.COSTS[part]),
            )
            entry = {
                "limit": limits[part],
                "num_images": len(parts[part]),
                **means_of(values),
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
                write_json(scores_file.path(workdir, split), record)
    return record, notes


def _values(run, phase, part, method, source, *, progress):
    """Per-example arrays of one part of a phase's scores."""
    network = Network(run.config, run.model, run.states[phase].variables, run.data)
    if not method:
        return part_values(network, part, source, progress=progress)
    moments = splits.data_set_moments(*network[:3], run.data.train)
    return method_values(network, method, source, moments, progress=progress)


def means_of(values):
    """{means, undefined}: None where no example defines a measure."""
    summary = statistics.summarize(values)
    return {
        "means": {
            key: entry["mean"] if np.isfinite(entry["mean"]) else None
            for key, entry in summary.items()
        },
        "undefined": {
            key: entry["undefined"]
            for key, entry in summary.items()
            if entry["undefined"] and key not in statistics.WHOLE
        },
    }


@command.run
@programs.kept()
def main(argv=None) -> int:
    """The command."""
    parser = Parser(prog="python -m train.scores", description=__doc__)
    parser.add_argument("--workdir", required=True, type=some, help="folder of the run")
    parser.add_argument("--split", required=True, type=some, help="of the data set")
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="all finished ones if absent"
    )
    scores_file.add_options(parser, at_least)
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    arguments = parser.parse_args(argv)
    # Orbax and tfds tell much that no reader of a table needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    limits = scores_file.limits_of(arguments)
    with disk_errors():
        record, notes = measure_run(
            arguments.workdir,
            arguments.split,
            phases=arguments.phases,
            limits=limits,
            methods=arguments.methods,
            progress=not arguments.no_progress,
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if jax.process_index() == 0:
        rows = {p: scores_file.means(s) for p, s in record["phases"].items()}
        print(tables.phase_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
