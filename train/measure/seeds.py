"""Scores of several seeds: means, paired differences and their t intervals."""

import math
from pathlib import Path

import numpy as np

from train.measure import scores_file
from train.measure.catalogue import METHOD_COLUMNS


def read_scores(folder: Path, seeds, split: str) -> dict:
    """dict seed -> record (``scores_file.read``), for the seeds that have one."""
    records = {seed: scores_file.read(folder / f"seed_{seed}", split) for seed in seeds}
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

    What was measured on other images than the control's is not compared with it.

    Args:
      records: dict seed -> record.
      controls: function of a phase: the one it is compared with, or None.

    Returns:
      dict phase -> {"control": name or None, "seeds": how many measured it,
      "measures": dict measure -> entry}.
    """
    seeds = {
        seed: {phase: scores_file.means(s) for phase, s in record["phases"].items()}
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
                    _base(records, phase, control, key) if control else None,
                )
                for key in keys
            },
        }
    return summary


def _base(records, phase, control, key):
    """The control's values, None where they are of other images than the phase's."""
    for record in records.values():
        (_, number), (value, other) = _pair(record, phase, control, key)
        yield value if number == other else None


def _pair(record, phase, control, key):
    """(mean, images) of both, None where it is not measured."""
    for name in (phase, control):
        scores = record["phases"].get(name, {})
        yield scores_file.measured(scores).get(key, (None, None))


def unpaired(records: dict, summary: dict) -> list[str]:
    """A line for each phase that ``summarize`` could not compare in everything."""
    lines = {}
    for record in records.values():
        for phase, row in summary.items():
            control = row["control"]
            for key in row["measures"] if control else ():
                (_, number), (_, other) = _pair(record, phase, control, key)
                if None not in (number, other) and number != other:
                    lines[phase] = (
                        f"{phase} and {control} were measured on different images and "
                        f"are not compared there: {key} on {number} and {other}"
                    )
    return list(lines.values())


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
            entry = methods.get(method, {})
            yield entry.get("means", {}).get(key), entry.get("num_images")

    for phase, methods in summary.items():
        for method, row in methods.items():
            for key in METHOD_COLUMNS:
                found = list(column(phase, method, key))
                values = [value for value, _ in found]
                if any(value is not None for value in values):
                    pairs = zip(column(ours, "hirescam", key), found, strict=True)
                    ratios = [
                        a / b
                        for (a, number), (b, other) in pairs
                        if a is not None and b and number == other
                    ]
                    row[key] = compare(values)
                    if ratios:
                        ratio = mean_and_margin(ratios)
                        row[key] |= dict(
                            zip(("ratio", "ratio_margin"), ratio, strict=True)
                        )
    return summary


def is_certain(entry: dict) -> bool:
    """Whether the interval of the paired difference excludes zero."""
    if "difference" not in entry:
        return False
    return abs(entry["difference"]) > entry["difference_margin"]
