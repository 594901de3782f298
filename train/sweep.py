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
them if absent). May import numpy, scipy, ``train`` and standard modules.
"""

import argparse
import collections
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from train import scores
from train.evaluate import METHOD_COLUMNS, format_value
from train.measures import MEASURES
from train.workdir import config_changes, without_new_phases, write_text

COLUMNS = (
    "accuracy",
    "nll",
    "nll_scaled",
    "calibration_error",
    "calibration_scaled",
    "box_share",
    "pointing",
    "iou",
    "overlap",
    "cosine",
    "matched_drop",
    "matched_increase",
    "drop",
    "increase",
    "area",
    "deletion_mean",
    "insertion_mean",
)
LOG_LINES = 5  # of a failed run, shown on the terminal
GRACE = 60  # seconds that a stopped run has to save its state


# Running: one process after another for a seed, several seeds at once.


def train_command(config_path: Path, seed: int, workdir: Path, jobs: int) -> list[str]:
    """Train a seed; it is measured apart, and the test split is not even named."""
    return [
        *(sys.executable, "-m", "train"),
        f"--config={config_path}",
        f"--config.seed={seed}",
        "--config.test_split=validation",
        "--noevaluate",
        *([] if jobs == 1 else ["--config.progress=False"]),
        f"--workdir={workdir}",
    ]


def scores_command(workdir: Path, arguments, phases) -> list[str]:
    """Measure what is missing of a seed."""
    command = [*(sys.executable, "-m", "train.scores")]
    command += ["--workdir", str(workdir), "--split", arguments.split]
    command += ["--phases", *phases] if phases else []
    command += [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    command += ["--num-perturbed", str(arguments.num_perturbed)]
    command += ["--all-perturbations"] if arguments.all_perturbations else []
    if arguments.methods:
        command += ["--methods", *arguments.methods]
        command += ["--num-method-images", str(arguments.num_method_images)]
    return command + (["--no-progress"] if arguments.jobs > 1 else [])


def is_trained(workdir: Path, wanted=()) -> bool:
    """Whether the wanted phases of a run (all of its own if ()) came to their end."""
    path = workdir / "config.json"
    if not path.exists():
        return False
    phases = tuple(wanted or json.loads(path.read_text())["phases"])
    return scores.finished_phases(workdir, phases) == phases


def is_measured(workdir: Path, arguments, phases) -> bool:
    """Whether a trained seed's scores are all there."""
    phases = phases or json.loads((workdir / "config.json").read_text())["phases"]
    record = scores.read(workdir, arguments.split)
    limits = scores.limits_of(arguments)
    return not scores.to_measure(record, phases, limits, arguments.methods)


def run_seeds(
    arguments, folder: Path, seeds, phases, wanted=(), say=print
) -> list[int]:
    """Train and measure what is missing of every seed; returns the seeds that failed.

    ``wanted`` are the phases of the file, ``phases`` those to measure (None: all).

    With one job the children write to the terminal, with several to seed_K.log. An
    interrupt, also of this function by SIGTERM, stops them with their state saved.
    """
    waiting = collections.deque(seeds)
    slots = cores_of(arguments.jobs)
    running, failed, done = {}, [], 0  # running: slot -> its current process

    def next_command(seed):
        workdir = folder / f"seed_{seed}"
        if not is_trained(workdir, wanted):
            return "train", train_command(
                arguments.config, seed, workdir, arguments.jobs
            )
        if not is_measured(workdir, arguments, phases):
            return "measure", scores_command(workdir, arguments, phases)
        return None

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            for slot, cores in enumerate(slots):
                if slot not in running and waiting:
                    seed = waiting.popleft()
                    running[slot] = SimpleNamespace(
                        seed=seed, process=None, made=[], start=time.perf_counter()
                    )
                job = running.get(slot)
                if job is None or (job.process and job.process.poll() is None):
                    continue
                code = job.process.returncode if job.process else 0
                task = next_command(job.seed) if code == 0 else None
                log = folder / f"seed_{job.seed}.log"
                if code or (task and task[0] in job.made):
                    what = f"exit status {code}" if code else "it stopped by itself"
                    say(f"seed {job.seed}: failed to {job.made[-1]} ({what})")
                    if arguments.jobs > 1:
                        say(_tail(log))
                    failed.append(job.seed)
                elif task:
                    job.made.append(task[0])
                    job.process = start(
                        task[1],
                        folder,
                        log=log if arguments.jobs > 1 else None,
                        cores=cores,
                    )
                    continue
                else:
                    done += 1
                    if job.made:
                        seconds = time.perf_counter() - job.start
                        say(
                            f"seed {job.seed}: {' and '.join(job.made)} done in "
                            f"{seconds:.0f} s ({done} of {len(seeds)} seeds)"
                        )
                del running[slot]
            time.sleep(0.1 if running else 0)
    finally:
        _stop([job.process for job in running.values() if job.process])
        signal.signal(signal.SIGTERM, before)
    return failed


def cores_of(jobs: int) -> list:
    """The cores of each job, a share of those that this process may use.

    None where the platform does not bind processes, or there is one job.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def start(command: list[str], folder: Path, *, log: Path | None, cores):
    """Start a child in a session of its own: an interrupt reaches it through us."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    # The seeds run the same programs, so only the first one compiles them.
    environment.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((folder / ".jax_cache").absolute())
    )
    if log is None:
        print(" ".join(command[1:]), flush=True)
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    else:
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with open(log, "a") as file:
            print(" ".join(command[1:]), file=file, flush=True)
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    if cores:
        try:
            # Its threads, which come later, inherit this.
            os.sched_setaffinity(process.pid, cores)
        except ProcessLookupError:  # it has ended already
            pass
    return process


def _interrupt(*_):
    raise KeyboardInterrupt


def _stop(processes):
    """``train`` saves its state when it is asked to end."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    shown = "\n".join(f"    {line[:200]}" for line in lines[-LOG_LINES:])
    return f"  {log} ends with\n{shown}"


# Summing up.


def read_scores(folder: Path, seeds, split: str) -> dict:
    """dict seed -> record (``scores.read``), for the seeds that have one."""
    records = {seed: scores.read(folder / f"seed_{seed}", split) for seed in seeds}
    return {seed: record for seed, record in records.items() if record["phases"]}


def mean_and_margin(values) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % t interval (nan for one seed)."""
    from scipy.special import stdtrit

    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return (float(values.mean()) if n else math.nan), math.nan
    quantile = stdtrit(n - 1, 0.975)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(n))


def compare(values, base=None) -> dict:
    """A row's entry: mean over seeds, and the paired difference from its control.

    Args:
      values: one per seed, None where undefined; base: the control's, or None.

    Returns:
      {n, mean, margin}, with a control also {difference, difference_margin, relative,
      relative_margin}: the last two are the ones before them over the control's mean,
      of the seeds that have both. Margins are half a 95 % t interval.
    """
    known = [value for value in values if value is not None]
    mean, margin = mean_and_margin(known)
    entry = {"n": len(known), "mean": mean, "margin": margin}
    if base is None:
        return entry
    pairs = [p for p in zip(values, base, strict=True) if None not in p]
    if not pairs:
        return entry
    values, base = np.array(pairs, float).T
    difference, half = mean_and_margin(values - base)
    scale = abs(base.mean())
    return entry | {
        "difference": difference,
        "difference_margin": half,
        "relative": float(difference / scale) if scale else math.nan,
        "relative_margin": float(half / scale) if scale else math.nan,
    }


def summarize(records: dict, controls) -> dict:
    """Per phase its control and, per measure, ``compare``'s entry.

    Args:
      records: dict seed -> record.
      controls: function of a phase: the one it is compared with, or None.

    Returns:
      dict phase -> {"control": name or None, "seeds": how many measured it,
      "measures": dict measure -> entry}.
    """
    seeds = {
        seed: {phase: scores.means(s) for phase, s in record["phases"].items()}
        for seed, record in records.items()
    }
    phases = dict.fromkeys(phase for means in seeds.values() for phase in means)
    summary = {}
    for phase in phases:
        control = controls(phase)
        if control == phase or control not in phases:
            control = None
        keys = dict.fromkeys(k for m in seeds.values() for k in m.get(phase, ()))
        summary[phase] = {
            "control": control,
            "seeds": sum(phase in means for means in seeds.values()),
            "measures": {
                key: compare(
                    _column(seeds, phase, key),
                    _column(seeds, control, key) if control else None,
                )
                for key in keys
            },
        }
    return summary


def _column(seeds, phase, key):
    return [means.get(phase, {}).get(key) for means in seeds.values()]


def summarize_methods(records: dict, ours: str) -> dict:
    """The maps of other methods against the map L^c of the phase ``ours``.

    L^c is ``hirescam``, measured on the same images as the others.

    Returns:
      dict phase -> dict method -> dict measure -> {n, mean, margin, ratio,
      ratio_margin}: the ratio is ours over this one, per seed. The last two are left
      out where ours is not known.
    """
    summary = {}
    for record in records.values():
        for phase, score in record["phases"].items():
            for method in score.get("methods", {}):
                summary.setdefault(phase, {})[method] = {}

    def column(phase, method, key):
        for record in records.values():
            methods = record["phases"].get(phase, {}).get("methods", {})
            yield methods.get(method, {}).get("means", {}).get(key)

    for phase, methods in summary.items():
        for method, row in methods.items():
            for key in METHOD_COLUMNS:
                values = list(column(phase, method, key))
                if any(value is not None for value in values):
                    pairs = zip(column(ours, "hirescam", key), values, strict=True)
                    ratios = [a / b for a, b in pairs if a is not None and b]
                    row[key] = compare(values)
                    if ratios:
                        ratio = mean_and_margin(ratios)
                        row[key] |= dict(
                            zip(("ratio", "ratio_margin"), ratio, strict=True)
                        )
    return summary


# Showing.


def is_certain(entry: dict) -> bool:
    """Whether the interval of the paired difference excludes zero."""
    if "difference" not in entry:
        return False
    return abs(entry["difference"]) > entry["difference_margin"]


def table(summary: dict, columns=COLUMNS) -> str:
    """Markdown: mean ± margin; bold where the paired difference excludes zero."""

    def cell(key, entry):
        text = format_value(key, entry["mean"])
        text += f" ± {format_value(key, entry['margin'])}"
        return f"**{text}**" if is_certain(entry) else text

    rows = {phase: row["measures"] for phase, row in summary.items()}
    return _markdown(("phase",), {(p,): row for p, row in rows.items()}, columns, cell)


def relative_table(summary: dict, columns=COLUMNS) -> str:
    """Markdown: the paired differences in per cent of the control's mean."""

    def cell(_, entry):
        if "relative" not in entry:
            return "–"
        text = format_percent(entry["relative"], entry["relative_margin"])
        return f"**{text}**" if is_certain(entry) else text

    rows = {
        (phase, row["control"]): row["measures"]
        for phase, row in summary.items()
        if row["control"]
    }
    return _markdown(("phase", "against"), rows, columns, cell)


def method_table(summary: dict, ours: str) -> str:
    """Markdown: the methods' means and, in brackets, ours over theirs."""

    def cell(key, entry):
        text = format_value(key, entry["mean"])
        text += f" ± {format_value(key, entry['margin'])}"
        if "ratio" in entry:
            text += f" ({entry['ratio']:.2f} ± {entry['ratio_margin']:.2f})"
        return text.replace("nan", "–")

    rows = {
        (method, phase): row
        for phase, methods in summary.items()
        for method, row in methods.items()
    }
    return _markdown(("map", "network"), rows, METHOD_COLUMNS, cell)


def _markdown(names, rows, columns, cell):
    columns = [key for key in columns if any(key in row for row in rows.values())]
    titles = [*names, *(MEASURES[key].title for key in columns)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for labels, row in rows.items():
        cells = [cell(key, row[key]) if key in row else "–" for key in columns]
        lines.append("| " + " | ".join([*labels, *cells]) + " |")
    return "\n".join(lines)


def format_percent(value: float, margin: float) -> str:
    """+25.0 ± 3.1 %, – for what is not known."""
    if not math.isfinite(value):
        return "–"
    half = f"{margin * 100:.1f}" if math.isfinite(margin) else "–"
    return f"{value * 100:+.1f} ± {half} %"


def config_notes(module, folder: Path, seeds) -> list[str]:
    """One line for the trained seeds whose configuration is no longer the file's."""
    if not hasattr(module, "get_config"):
        return []
    notes = []
    for seed in seeds:
        workdir = folder / f"seed_{seed}"
        if is_trained(workdir):
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
    """A file of ``configs/sweeps``, with what may be absent filled in."""
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("CONTROLS", {}), ("FINAL", None)):
        if not hasattr(module, name):
            setattr(module, name, value)
    return module


def wanted_phases(module) -> tuple:
    """The phases of the file; a file of tests without a configuration has none."""
    return tuple(module.get_config().phases) if hasattr(module, "get_config") else ()


def controls_of(module):
    """The function of a phase that ``summarize`` wants; a control has none."""
    own = {name: None for name in (module.CONTROL, *module.CONTROLS.values())}
    return lambda phase: (own | module.CONTROLS).get(phase, module.CONTROL)


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/sweeps")
    parser.add_argument("--folder", type=Path, help="runs/sweeps/NAME if absent")
    parser.add_argument(
        "--split",
        default="validation",
        help="what is measured; 'test' once, for the phases that are final",
    )
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    parser.add_argument(
        "--phases", nargs="+", metavar="PHASE", help="only these are measured and shown"
    )
    scores.add_options(parser)
    parser.add_argument("--table", action="store_true", help="print what is there only")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=COLUMNS,
        choices=list(MEASURES),
        metavar="MEASURE",
        help="of the table: " + ", ".join(MEASURES),
    )
    parser.add_argument(
        "--ours",
        default="guided",
        metavar="PHASE",
        help="whose map the methods are compared with",
    )
    parser.add_argument("--figure", type=Path, help="also draw a dot plot, FILE.png")
    return parser


def main(argv=None) -> int:
    """The command; a mistake of the caller's is one line and exit status 2."""
    arguments = make_parser().parse_args(argv)
    mistake = None
    if not arguments.config.exists():
        mistake = f"no file {arguments.config}"
    elif arguments.jobs < 1:
        mistake = f"--jobs={arguments.jobs} is below 1"
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    if arguments.methods and "hirescam" not in arguments.methods:
        arguments.methods = ["hirescam", *arguments.methods]  # our map L^c
    module = load_module(arguments.config)
    seeds = module.SEEDS[: arguments.seeds]
    folder = arguments.folder or Path("runs/sweeps") / arguments.config.stem
    phases = arguments.phases or (module.FINAL if arguments.split == "test" else None)
    for note in config_notes(module, folder, seeds):
        print(f"note: {note}", file=sys.stderr)
    failed = []
    if not arguments.table:
        try:
            failed = run_seeds(arguments, folder, seeds, phases, wanted_phases(module))
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    records = read_scores(folder, seeds, arguments.split)
    if not records:
        print(
            f"error: no seed in {folder} is measured on {arguments.split}",
            file=sys.stderr,
        )
        return 1 if failed else 2
    show(module, records, folder, arguments)
    return 1 if failed else 0


def show(module, records, folder: Path, arguments):
    """Write the summary and the figure, print the tables."""
    summary = summarize(records, controls_of(module))
    methods = summarize_methods(records, arguments.ours)
    split, seeds = arguments.split, list(records)
    text = json.dumps(
        {"split": split, "seeds": seeds, "phases": summary, "methods": methods}
    )
    # JSON knows no NaN.
    text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2)
    write_text(folder / f"summary_{split}.json", text + "\n")
    if arguments.phases:
        summary = {p: row for p, row in summary.items() if p in arguments.phases}
    fewer = [
        f"{phase} {row['seeds']}"
        for phase, row in summary.items()
        if row["seeds"] < len(seeds)
    ]
    print(
        f"{len(seeds)} seeds, {split} split; mean ± half of the 95 % t interval; bold: "
        "the paired difference from the control excludes zero"
        + (f"; fewer seeds: {', '.join(fewer)}" if fewer else "")
    )
    print("\n" + table(summary, arguments.columns))
    print("\nPaired differences, in per cent of the control's mean:\n")
    print(relative_table(summary, arguments.columns))
    if methods:
        print(
            f"\nMaps of other methods; in brackets: L^c of {arguments.ours} over it:\n"
        )
        print(method_table(methods, arguments.ours))
    if arguments.figure:
        from train import sweep_figures

        path = sweep_figures.write_dots(summary, records, arguments.figure)
        print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
