"""The tables of a sweep, in Markdown."""

import math

from train.measure.catalogue import MEASURES, METHOD_COLUMNS, format_value
from train.measure.seeds import is_certain
from train.show.markdown import markdown

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
    return markdown(
        titles,
        [
            (*labels, *(cell(key, row[key]) if key in row else "–" for key in columns))
            for labels, row in rows.items()
        ],
    )


def format_percent(value: float, margin: float) -> str:
    """+25.0 ± 3.1 %, – for what is not known."""
    if not math.isfinite(value):
        return "–"
    half = f"{margin * 100:.1f}" if math.isfinite(margin) else "–"
    return f"{value * 100:+.1f} ± {half} %"
