"""The curves of the report, as places in a small picture; the template draws them.

Not matplotlib's SVG: the page's own follows its colours from light to dark and takes a
tenth of the bytes. The round numbers at the axes are matplotlib's.
"""

import contextlib
import json
import math

NUM_COLOURS = 8  # classes s0 .. s7 of the template
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 200, 46, 10, 12, 34
CURVES = (
    ("loss", "loss"),
    ("accuracy", "accuracy"),
    ("mean_ap", "mAP, validation"),
    ("nll", "NLL, validation"),
    ("box_share", "box share, validation"),
    ("kl", "KL(A || A')"),
    ("saliency_loss", "saliency loss"),
    ("prediction_kl", "KL of the predictions"),
    ("attention_separation", "attention separation"),
)


def training_charts(run) -> dict:
    """One chart per logged value; phases start where the one before them ended.

    Returns:
      {"legend": [(colour, name)], "charts": [as of ``chart``]}; none without a log.
    """
    path = run.workdir / "metrics.jsonl"
    if not path.exists():
        return {"legend": [], "charts": []}
    lines = list(_whole_lines(path.read_text(errors="replace")))
    last = {}
    for line in lines:
        last[line["phase"]] = max(last.get(line["phase"], 0), line["step"])
    phases = [name for name in run.config.phases if name in last]

    def start(phase):
        init = run.config[phase].init
        return start(init) + last.get(init, 0) if init in last else 0

    def points(phase, split, key):
        return [
            (start(phase) + line["step"], line[key])
            for line in lines
            if line["phase"] == phase and line["split"] == split and key in line
        ]

    charts = []
    for key, title in CURVES:
        series = [
            (
                number,
                f"{phase}, {split}" if split == "train" else phase,
                split != "train",
                points(phase, split, key),
            )
            for number, phase in enumerate(phases)
            for split in ("train", "validation")
        ]
        series = [entry for entry in series if entry[3]]
        if series:
            charts.append(chart(title, "step", series))
    return {"legend": _legend(phases), "charts": charts}


def _whole_lines(text):
    """What the log says; a line that a killed run left half written says nothing."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def perturbation_charts(results) -> dict:
    """Deletion and insertion, as ``training_charts``; none where nobody measured."""
    curves = results["curves"]
    charts = []
    for kind, title in (
        ("deletion_curve", "deletion: P(true class)"),
        ("insertion_curve", "insertion: P(true class)"),
    ):
        series = [
            (i, name, False, list(zip(c["fractions"], c[kind], strict=True)))
            for i, (name, c) in enumerate(curves.items())
            if kind in c
        ]
        if series:
            charts.append(chart(title, "share of the pixels", series, low=0.0))
    return {"legend": _legend(curves), "charts": charts}


def _legend(names):
    return [(i % NUM_COLOURS, name) for i, name in enumerate(names)]


def chart(title: str, x_title: str, series, *, low=None) -> dict:
    """Lines placed in a picture of WIDTH by HEIGHT.

    Args:
      title, x_title: texts.
      series: tuples (colour, name, whether its points are dots, [(x, y)]).
      low: of the y axis; the lowest value if None.

    Returns:
      {title, x_title, rows: [(y, text)], columns: [(x, text)], lines: [{colour, name,
      thin, path, dots}]}.
    """
    finite = [(x, y) for *_, points in series for x, y in points if _is_number(y)]
    xs, ys = zip(*(finite or [(0.0, 0.0)]), strict=True)
    x_low, x_high = min(0, *xs), max(xs) or 1
    y_low, y_high = min(ys) if low is None else low, max(ys)
    if y_high <= y_low:
        y_high = y_low + 1.0
    rows = ticks(y_low, y_high)
    y_low, y_high = min(y_low, rows[0]), max(y_high, rows[-1])

    def place(x, y):
        right, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return (
            round(LEFT + right * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    lines = []
    for colour, name, dots, points in series:
        placed = [place(x, y) for x, y in points if _is_number(y)]
        lines.append(
            {
                "colour": colour % NUM_COLOURS,
                "name": name,
                "thin": not dots,
                "path": "M" + "L".join(f"{x:g} {y:g}" for x, y in placed),
                "dots": placed if dots else [],
            }
        )
    return {
        "title": title,
        "x_title": x_title,
        "rows": [(place(x_low, tick)[1], f"{tick:g}") for tick in rows],
        "columns": [
            (place(tick, y_low)[0], f"{tick:g}")
            for tick in ticks(x_low, x_high)
            if tick <= x_high
        ],
        "lines": lines,
    }


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover [low, high]."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
    return [round(float(tick), 10) for tick in locator.tick_values(low, high)]


def _is_number(value):
    return value is not None and math.isfinite(value)
