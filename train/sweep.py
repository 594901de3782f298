"""python -m train.sweep configs/sweeps/NAME.py: one configuration, many seeds, a table.

The phases of the configuration are the grid: those that start from the same phase share
its weights and batches, so they are compared pairwise, seed by seed. A sweep resumes
like a run does. May import ``train`` and standard modules.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from train.evaluate import COLUMNS, format_value
from train.measures import MEASURES
from train.workdir import write_text

# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def run(config_path: Path, seeds, folder: Path, split: str) -> list[dict]:
    """Train every seed with ``python -m train``; results [seed] of dict phase -> means.

    Raises:
      RuntimeError: a run failed; the others stay as they are.
    """
    results = []
    for seed in seeds:
        workdir = folder / f"seed_{seed}"
        command = [
            sys.executable,
            "-m",
            "train",
            f"--config={config_path}",
            f"--config.seed={seed}",
            f"--config.test_split={split}",
            f"--workdir={workdir}",
        ]
        if not (workdir / "results.json").exists():
            print(f"seed {seed}: {' '.join(command[1:])}", flush=True)
            code = subprocess.run(command).returncode
            if code:
                raise RuntimeError(f"seed {seed} ended with exit status {code}")
        results.append(json.loads((workdir / "results.json").read_text())["phases"])
    return results


def mean_and_margin(values) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % t interval (nan for one seed)."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float(values.mean()), math.nan
    t = T_95[min(n - 2, len(T_95) - 1)]
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(n))


def summarize(results: list[dict], control: str) -> dict:
    """Per phase and measure: mean, margin, and the paired difference from control."""
    summary = {}
    for phase in results[0]:
        summary[phase] = {}
        for key in results[0][phase]:
            values = np.array([seed[phase][key] for seed in results], float)
            base = np.array([seed[control][key] for seed in results], float)
            mean, margin = mean_and_margin(values)
            difference, half = mean_and_margin(values - base)
            summary[phase][key] = {
                "mean": mean,
                "margin": margin,
                "difference": difference,
                "difference_margin": half,
            }
    return summary


def table(summary: dict, control: str) -> str:
    """Markdown: mean +- margin; bold where the paired difference excludes zero."""
    columns = [key for key in COLUMNS if key in next(iter(summary.values()))]
    lines = [
        "| phase | " + " | ".join(MEASURES[key].title for key in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for phase, row in summary.items():
        cells = []
        for key in columns:
            text = (
                f"{format_value(key, row[key]['mean'])}"
                f" ± {format_value(key, row[key]['margin'])}"
            )
            certain = abs(row[key]["difference"]) > row[key]["difference_margin"]
            cells.append(f"**{text}**" if phase != control and certain else text)
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.sweep", description=__doc__)
    parser.add_argument("config", type=Path, help="a file of configs/sweeps")
    parser.add_argument("--folder", type=Path, help="runs/sweeps/NAME if absent")
    parser.add_argument(
        "--split",
        default="validation",
        help="what is measured; 'test' once, for the rows that are final",
    )
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--table", action="store_true", help="print, train nothing")
    args = parser.parse_args(argv)
    if not args.config.exists():
        print(f"error: no file {args.config}", file=sys.stderr)
        return 2
    spec = importlib.util.spec_from_file_location("sweep_config", args.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seeds = module.SEEDS[: args.seeds]
    folder = args.folder or Path("runs/sweeps") / args.config.stem / args.split
    if args.table:
        seeds = [s for s in seeds if (folder / f"seed_{s}" / "results.json").exists()]
        if not seeds:
            print(f"error: no finished seed in {folder}", file=sys.stderr)
            return 2
    try:
        results = run(args.config, seeds, folder, args.split)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = summarize(results, module.CONTROL)
    text = json.dumps({"seeds": list(seeds), "split": args.split, "phases": summary})
    write_text(folder / "summary.json", text + "\n")
    print(
        f"{len(seeds)} seeds, {args.split} split; mean ± half of the 95 % interval; "
        f"bold: the paired difference from {module.CONTROL} excludes zero\n"
    )
    print(table(summary, module.CONTROL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
