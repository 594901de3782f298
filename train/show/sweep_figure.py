"""The picture of a sweep: every measure a panel, every phase a row."""

from pathlib import Path

import numpy as np

from train.errors import UserError
from train.measure import scores_file
from train.measure.catalogue import MEASURES

PANELS = (
    "box_share",
    "pointing",
    "overlap",
    "matched_drop",
    "matched_increase",
    "accuracy",
    "nll",
)
BETTER = {"higher": " →", "lower": " ←", "": ""}
# Of a difference whose interval excludes zero: in the better direction, in the other,
# and where neither is better; then of those that are unsure.
COLOURS = {True: "#1b5e9c", False: "#b3312c", None: "#3a3a3a"}
UNSURE, SEED, LINE = "#8a8a8a", "#c9c9c9", "#d9822b"


def write_dots(summary: dict, records: dict, path: Path, panels=PANELS) -> Path:
    """Mean and 95 % interval over seeds of every phase, a faint dot for each seed.

    Blue is better and red worse, by a paired difference from the control whose interval
    excludes zero; grey is unsure. The dashed line stands at the control's mean; phases
    with another control are set apart.

    Args:
      summary: as from ``seeds.summarize``.
      records: dict seed -> record, as from ``scores_file.read``.
      path: PNG to write.
      panels: measures; those that nobody measured are left out.

    Raises:
      UserError: nobody measured one of them.
    """
    from matplotlib.figure import Figure

    panels = [
        key for key in panels if any(key in r["measures"] for r in summary.values())
    ]
    if not panels:
        raise UserError(f"{path}: none of its panels is measured; name --columns")
    phases = _grouped(summary)
    heights = np.cumsum([1.0 + 0.6 * starts for _, starts in phases])
    figure = Figure(
        figsize=(1.6 + 1.75 * len(panels), 0.9 + 0.24 * heights[-1]),
        layout="constrained",
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, panels, strict=True):
        measure = MEASURES[key]
        scale = 100 if measure.percent else 1
        for (phase, _), y in zip(phases, heights, strict=True):
            entry = summary[phase]["measures"].get(key)
            if entry is None or not entry["n"]:
                continue
            dots = [
                scores_file.means(record["phases"].get(phase, {})).get(key)
                for record in records.values()
            ]
            dots = [scale * dot for dot in dots if dot is not None]
            axis.plot(dots, [y + 0.24] * len(dots), "o", color=SEED, ms=3, mew=0)
            axis.errorbar(
                scale * entry["mean"],
                y,
                xerr=scale * np.nan_to_num(entry["margin"]),
                fmt="o",
                color=_colour(entry, measure.better),
                ms=4.5,
                elinewidth=1.4,
                zorder=3,
            )
        for control, span in _spans(summary, phases, heights).items():
            entry = summary[control]["measures"].get(key)
            if entry is not None:
                axis.vlines(
                    scale * entry["mean"], *span, color=LINE, lw=1, ls="--", zorder=1
                )
        axis.set_title(measure.title + BETTER[measure.better], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="y", color="#eeeeee", lw=0.8, zorder=0)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(heights, [phase for phase, _ in phases])
    axes[0].set_ylim(heights[-1] + 0.7, heights[0] - 0.7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _colour(entry, better):
    certain = abs(entry.get("difference", 0.0)) > entry.get("difference_margin", 0.0)
    if not certain:
        return UNSURE
    if not better:
        return COLOURS[None]
    return COLOURS[(entry["difference"] > 0) == (better == "higher")]


def _grouped(summary):
    """(phase, starts a group): each control with what is compared with it."""
    groups = {}
    for phase, row in summary.items():
        groups.setdefault(row["control"] or phase, []).append(phase)
    # Those without companions first: what the others start from.
    order = sorted(groups, key=lambda name: len(groups[name]) > 1)
    return [
        (phase, place == 0 and name != order[0])
        for name in order
        for place, phase in enumerate(groups[name])
    ]


def _spans(summary, phases, heights):
    """Control -> from where to where its line goes."""
    spans = {}
    for (phase, _), y in zip(phases, heights, strict=True):
        control = summary[phase]["control"] or phase
        if control in summary:
            low, high = spans.get(control, (y, y))
            spans[control] = (min(low, y - 0.5), max(high, y + 0.5))
    return spans
