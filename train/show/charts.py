"""The curves of the report: inline SVG, no script."""

import html
import json
import math

from train.show import tables

NUM_COLOURS = 8  # classes s0 .. s7 of the frame
CURVES = (
    ("loss", "loss"),
    ("accuracy", "accuracy"),
    ("nll", "NLL, validation"),
    ("box_share", "box share, validation"),
    ("kl", "KL(A || A')"),
    ("saliency_loss", "saliency loss"),
    ("prediction_kl", "KL of the predictions"),
    ("attention_separation", "attention separation"),
)


def training_charts(run):
    """One chart per logged value; phases start where the one before them ended."""
    path = run.workdir / "metrics.jsonl"
    if not path.exists():
        return "<p>There is no metrics.jsonl in the run's folder.</p>"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = {}
    for line in lines:
        last[line["phase"]] = max(last.get(line["phase"], 0), line["step"])
    phases = [name for name in run.config.phases if name in last]

    def start(phase):
        init = run.config[phase].init
        return 0 if init not in last else start(init) + last.get(init, 0)

    charts = []
    for key, title in CURVES:
        series = [
            (
                phases.index(phase),
                f"{phase}, {split}" if split == "train" else phase,
                split != "train",
                [
                    (start(phase) + line["step"], line[key])
                    for line in lines
                    if line["phase"] == phase and line["split"] == split and key in line
                ],
            )
            for phase in phases
            for split in ("train", "validation")
        ]
        series = [entry for entry in series if entry[3]]
        if series:
            charts.append(_chart(title, "step", series))
    legend = "".join(
        f'<span class="key s{i % NUM_COLOURS}">{html.escape(name)}</span>'
        for i, name in enumerate(phases)
    )
    return (
        f'<p class="legend">{legend}<span>thin: training, dots: validation</span></p>'
        f'<div class="charts">{"".join(charts)}</div>'
    )


def perturbation_charts(results):
    names = list(results["curves"])
    charts = []
    for kind, title in (
        ("deletion_curve", "deletion: P(true class)"),
        ("insertion_curve", "insertion: P(true class)"),
    ):
        series = [
            (
                i,
                name,
                False,
                list(
                    zip(
                        results["curves"][name]["fractions"],
                        results["curves"][name][kind],
                        strict=True,
                    )
                ),
            )
            for i, name in enumerate(names)
        ]
        charts.append(_chart(title, "share of the pixels", series, low=0.0))
    legend = "".join(
        f'<span class="key s{i % NUM_COLOURS}">{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{legend}</p><div class="charts">{"".join(charts)}</div>'


def _chart(title, x_title, series, *, low=None):
    """An inline SVG of [(colour, name, dots, [(x, y)])]."""
    width, height, left, right, top, bottom = 320, 200, 46, 10, 12, 34
    finite = [
        (x, y) for *_, points in series for x, y in points if tables.is_number(y)
    ] or [(0.0, 0.0)]
    xs, ys = zip(*finite, strict=True)
    x_low, x_high = min(0, *xs), max(xs) or 1
    y_low, y_high = min(ys) if low is None else low, max(ys)
    if y_high <= y_low:
        y_high = y_low + 1.0
    ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, ticks[0]), max(y_high, ticks[-1])

    def place(x, y):
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom),
        )

    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        parts.append(
            f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>'
            f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(x_low, x_high):
        if tick <= x_high:
            x = place(tick, y_low)[0]
            parts.append(
                f'<text x="{x:.1f}" y="{height - bottom + 14}" '
                f'text-anchor="middle">{tick:g}</text>'
            )
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 4}" '
        f'text-anchor="middle">{html.escape(x_title)}</text>'
    )
    for colour, name, dots, points in series:
        placed = [place(x, y) for x, y in points if tables.is_number(y)]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        label = f"<title>{html.escape(name)}</title>"
        kind, thin = f"s{colour % NUM_COLOURS}", "" if dots else " thin"
        if placed:
            parts.append(f'<path class="{kind}{thin}" d="{line}">{label}</path>')
        if dots:
            parts += [
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                f"{label}</circle>"
                for x, y in placed
            ]
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low, high):
    """About five round numbers that cover [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= min(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    first = math.floor(low / step + 1e-9)
    return [
        round(i * step, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)
    ]
