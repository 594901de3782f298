"""Train one configuration for many seeds, measure every phase, and make the table.

    python -m train.sweep configs/sweeps/NAME.py                  train and measure
    python -m train.sweep configs/sweeps/NAME.py --split test     measure what is final
    python -m train.sweep configs/sweeps/NAME.py --table          print what is there

The phases of the configuration are the grid: those that start from the same phase share
its weights and batches, so they are compared pairwise, seed by seed. The folder holds
seed_K (a run each), seed_K.log and summary_SPLIT.json. Everything goes on where it was
stopped, and what is there is not made again. The runs know the validation split only;
the test split is opened by ``--split test``.

A file of ``configs/sweeps`` has ``get_config``, ``SEEDS`` and ``CONTROL``, the phase
that the others are compared with; ``CONTROLS``, a dict of phases that have another one
(None: none); and ``FINAL``, the phases that are measured on the test split (all of
them if absent).
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from ibsgl_jax.app.outputs import is_address
from train import command
from train.arguments import Parser, at_least, some
from train.configuration import config_changes, without_new_phases
from train.errors import UserError
from train.files import write_json
from train.measure import scores_file
from train.measure.catalogue import MEASURES
from train.measure.seeds import read_scores, summarize, summarize_methods, unpaired
from train.run import children
from train.show import sweep_figure, sweep_tables


def config_notes(module, folder: Path, seeds) -> list[str]:
    """One line for the trained seeds whose configuration is no longer the file's."""
    if not hasattr(module, "get_config"):
        return []
    notes = []
    for seed in seeds:
        workdir = folder / f"seed_{seed}"
        if children.is_trained(workdir):
            config = module.get_config()
            with config.unlocked():
                config.seed, config.test_split = seed, "validation"
            changes = config_changes(
                *without_new_phases(
                    json.loads((workdir / "config.json").read_text()),
                    json.loads(config.to_json()),
                )
            )
            if changes:
                more = ", ..." if len(changes) > 3 else ""
                notes.append(
                    f"seed {seed} was trained with another configuration and is taken "
                    f"as it is: {', '.join(changes[:3])}{more}"
                )
    return notes


def load_module(path: Path):
    """A file of ``configs/sweeps``, with what may be absent filled in.

    Raises:
      UserError: no such file, or none of a sweep.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    for name, value in (("CONTROLS", {}), ("FINAL", None)):
        if not hasattr(module, name):
            setattr(module, name, value)
    missing = [name for name in ("SEEDS", "CONTROL") if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"{path} is no sweep: it has no {' and no '.join(missing)}; see "
            "configs/sweeps"
        )
    return module


def wanted_phases(module) -> tuple:
    """The phases of the file; a file of tests without a configuration has none."""
    return tuple(module.get_config().phases) if hasattr(module, "get_config") else ()


def controls_of(module):
    """The function of a phase that ``summarize`` wants; a control has none."""
    own = {name: None for name in (module.CONTROL, *module.CONTROLS.values())}
    return lambda phase: (own | module.CONTROLS).get(phase, module.CONTROL)


def make_parser():
    parser = Parser(
        prog="python -m train.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/sweeps")
    parser.add_argument("--folder", type=Path, help="runs/sweeps/NAME if absent")
    parser.add_argument(
        "--split",
        type=some,
        default="validation",
        help="what is measured; 'test' once, for the phases that are final",
    )
    parser.add_argument("--seeds", type=at_least(1), help="only the first so many")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="seeds at once")
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="only these are measured and shown"
    )
    scores_file.add_options(parser, at_least)
    parser.add_argument("--table", action="store_true", help="print what is there only")
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=list(MEASURES),
        metavar="MEASURE",
        help="of tables and figure, which else have some: " + ", ".join(MEASURES),
    )
    parser.add_argument(
        "--ours",
        default="guided",
        metavar="PHASE",
        help="whose map the methods are compared with",
    )
    parser.add_argument(
        "--against",
        metavar="PHASE",
        help="what all are compared with, in the place of their controls",
    )
    parser.add_argument("--figure", type=Path, help="also draw a dot plot, FILE.png")
    return parser


def check(arguments, module, folder: Path):
    """UserError before anything is trained or written."""
    known = wanted_phases(module)
    asked = {
        "phases": arguments.phases or (),
        "against": filter(None, [arguments.against]),
        "ours": [arguments.ours],
    }
    for flag, names in asked.items():
        unknown = [name for name in names if known and name not in known]
        # The default of --ours matters only where other methods are measured.
        if unknown and (flag != "ours" or arguments.methods):
            raise UserError(
                f"--{flag} {unknown[0]}: no phase of {arguments.config}; it has "
                f"{', '.join(known)}"
            )
    if is_address(folder) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--folder {folder} is no folder on this machine")
    figure = arguments.figure
    if figure and not (figure.parent.is_dir() and figure.suffix == ".png"):
        raise UserError(f"--figure {figure}: give FILE.png in a folder that is there")


@command.run
def main(argv=None) -> int:
    """The command."""
    arguments = make_parser().parse_args(argv)
    if arguments.methods and "hirescam" not in arguments.methods:
        arguments.methods = ["hirescam", *arguments.methods]  # our map L^c
    module = load_module(arguments.config)
    seeds = module.SEEDS[: arguments.seeds]
    folder = arguments.folder or Path("runs/sweeps") / arguments.config.stem
    phases = arguments.phases or (module.FINAL if arguments.split == "test" else None)
    check(arguments, module, folder)
    for note in config_notes(module, folder, seeds):
        print(f"note: {note}", file=sys.stderr)
    failed = []
    if not arguments.table:
        failed = children.run_seeds(
            arguments, folder, seeds, phases, wanted_phases(module)
        )
    records = read_scores(folder, seeds, arguments.split)
    if not records:
        mistake = f"no seed in {folder} is measured on {arguments.split}"
        if not failed:
            raise UserError(mistake)
        print(f"error: {mistake}", file=sys.stderr)
        return 1
    show(module, records, folder, arguments)
    return 1 if failed else 0


def check_measured(arguments, summary):
    """UserError for a phase or columns that no seed has on the split."""
    base = [arguments.against] if arguments.against else []
    for flag, names in (("phases", arguments.phases or ()), ("against", base)):
        if names and not set(names).intersection(summary):
            raise UserError(
                f"--{flag} {' '.join(names)}: not measured on {arguments.split}; what "
                f"is: {', '.join(summary)}"
            )
    known = [k for k in MEASURES if any(k in r["measures"] for r in summary.values())]
    if arguments.columns and not set(known).intersection(arguments.columns):
        raise UserError(
            f"--columns {' '.join(arguments.columns)}: not measured on "
            f"{arguments.split}; what is: {', '.join(known)}"
        )


def show(module, records, folder: Path, arguments):
    """Write the summary, against the controls, and the figure, print the tables."""
    summary = summarize(records, controls_of(module))
    methods = summarize_methods(records, arguments.ours)
    split, seeds = arguments.split, list(records)
    write_json(
        folder / f"summary_{split}.json",
        {"split": split, "seeds": seeds, "phases": summary, "methods": methods},
    )
    base = arguments.against
    check_measured(arguments, summary)
    if base:
        summary = summarize(records, lambda phase: None if phase == base else base)
    if arguments.phases:
        summary = {p: row for p, row in summary.items() if p in arguments.phases}
    for line in unpaired(records, summary):
        print(f"note: {line}", file=sys.stderr)
    fewer = [
        f"{phase} {row['seeds']}"
        for phase, row in summary.items()
        if row["seeds"] < len(seeds)
    ]
    print(
        f"{len(seeds)} seeds, {split} split; mean ± half of the 95 % t interval; bold: "
        f"the paired difference from {base or 'the control'} excludes zero"
        + (f"; fewer seeds: {', '.join(fewer)}" if fewer else "")
    )
    columns = arguments.columns or sweep_tables.COLUMNS
    print("\n" + sweep_tables.table(summary, columns))
    print(f"\nPaired differences, in per cent of {base or 'the control'}'s mean:\n")
    print(sweep_tables.relative_table(summary, columns))
    if methods:
        print(
            f"\nMaps of other methods; in brackets: L^c of {arguments.ours} over it:\n"
        )
        print(sweep_tables.method_table(methods, arguments.ours))
    if arguments.figure:
        panels = arguments.columns or sweep_figure.PANELS
        path = sweep_figure.write_dots(summary, records, arguments.figure, panels)
        print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
