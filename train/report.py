"""The report of an evaluation: Markdown tables and one self-contained web page.

May import numpy, matplotlib, PIL, and ``train``'s own modules except ``loop``. The page
(``report.html`` beside this file is its frame) needs no network: pictures are inlined,
curves are SVG, and without JavaScript everything but the gallery is still there.
"""

import base64
import html
import importlib
import io
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np

from train import evaluate, figures, measures, splits
from train.measures import MEASURES
from train.workdir import FREE_FIELDS, write_text

FRAME = Path(__file__).with_name("report.html")
NUM_COLOURS = 8  # classes s0 .. s7 of the frame
MAX_GALLERY_BYTES = 4_000_000
# How many images of each kind the gallery takes, in this order.
GALLERY = {"first": 48, "fixed": 36, "broken": 16, "moved": 36}
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
HEADLINE = (
    "accuracy",
    "box_share",
    "pointing",
    "overlap",
    "drop",
    "increase",
    "matched_drop",
    "matched_increase",
)
# Where the command that reproduces a run looks for the nearest configuration.
CONFIG_FILES = (
    "quickstart",
    "smoke",
    "poster",
    "baselines/all",
    "baselines/saliency_guided",
    "baselines/icasc",
)


# Markdown.


def markdown(results: dict) -> str:
    """The tables of evaluation.md."""
    blocks = [
        f"# Evaluation of {results['run']}",
        f"Split {results['split']}, {results['num_images']} images; in brackets the "
        f"95 % interval ({results['interval']}).",
        "## Phases",
        _phase_markdown(results),
        "## Methods",
        f"The first {results['num_method_images']} images. ms: per image, without "
        f"compilation, on {results['device']}.",
        _method_markdown(results),
        "## Randomised weights",
        f"Rank correlation of the maps of {results['before']} and of a network with "
        f"random weights, {results['num_sanity']} images; a method fails from "
        f"{results['sanity_limit']} on: its maps do not follow the weights.",
        _sanity_markdown(results),
    ]
    if results["notes"]:
        blocks += ["## Notes", "\n".join(f"- {note}" for note in results["notes"])]
    shown = [k for k in MEASURES if any(k in r for r in results["phases"].values())]
    blocks += [
        "## Definitions",
        "\n".join(
            f"- **{MEASURES[key].title}**: {MEASURES[key].definition}" for key in shown
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _phase_markdown(results):
    names = list(results["phases"])
    lines = [
        "| measure | n | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for key, measure in MEASURES.items():
        entries = [results["phases"][name].get(key) for name in names]
        if any(entries):
            number = max(entry["n"] for entry in entries if entry)
            cells = " | ".join(_with_interval(key, entry) for entry in entries)
            lines.append(f"| {measure.title}{_arrow(measure)} | {number} | {cells} |")
    return "\n".join(lines)


def _method_markdown(results):
    columns = _method_columns(results)
    lines = [
        "| method | model | "
        + " | ".join(MEASURES[key].title + _arrow(MEASURES[key]) for key in columns)
        + " | ms |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for row in results["methods"]:
        name = method_title(row)
        cells = [_with_interval(key, row["measures"].get(key)) for key in columns]
        lines.append(
            f"| {f'**{name}**' if row['ours'] else name} | {row['model']} | "
            + " | ".join(cells)
            + f" | {row['ms_per_image']:.2f} |"
        )
    return "\n".join(lines)


def _sanity_markdown(results):
    lines = ["| method | rank correlation | verdict |", "|---|---|---|"]
    for method, row in results["sanity"].items():
        verdict = "passes" if row["passed"] else "**fails**"
        lines.append(
            f"| {TITLES.get(method, method)} | {_number(row['mean'])} "
            f"[{_number(row['low'])}, {_number(row['high'])}] | {verdict} |"
        )
    return "\n".join(lines)


TITLES = {
    "ib": "Information bottleneck",
    "hirescam": "HiResCAM (L^c)",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "random": "random map",
    "gradient": "gradient",
    "input_x_gradient": "input x gradient",
    "smooth_grad": "SmoothGrad",
    "integrated_gradients": "Integrated Gradients",
    "full_grad": "FullGrad",
}


def method_title(row) -> str:
    """The name of a row of the table of methods."""
    if row["ours"]:
        return "ours: L^c of the guided model"
    return TITLES.get(row["method"], row["method"])


def _method_columns(results):
    return [
        key
        for key in evaluate.METHOD_COLUMNS
        if any(key in row["measures"] for row in results["methods"])
    ]


def _arrow(measure):
    return {"higher": " ↑", "lower": " ↓", "": ""}[measure.better]


def _with_interval(key, entry):
    if not entry:
        return "–"
    ends = [evaluate.format_value(key, entry[end]) for end in ("low", "high")]
    return f"{evaluate.format_value(key, entry['mean'])} [{ends[0]}, {ends[1]}]"


def _number(value):
    return f"{value:.3f}" if _is_number(value) else "–"


# The page.


def write_report(run, source, results, per_example) -> Path:
    """Draw the pictures and write report.html into the run's folder.

    Args:
      run: saved_run.Run with its data.
      source: the examples that were evaluated.
      results, per_example: of ``evaluate.evaluate_run``.

    Returns:
      The path of the page.
    """
    before, after = results["before"], results["after"]
    parts = {
        "title": html.escape(run.name),
        "subtitle": html.escape(
            f"{results['num_images']} images of split {results['split']} of "
            f"{run.config.dataset}; model {run.config.model}; evaluated in "
            f"{results['seconds']:.0f} s on {results['device']}."
        ),
        "notes": "".join(
            f'<p class="note">{html.escape(note)}</p>' for note in results["notes"]
        ),
        "headline": _headline(results),
        "phases": _phase_table(results),
        "methods": _method_table(results),
        "num_method_images": str(results["num_method_images"]),
        "device": html.escape(results["device"]),
        "sanity": _sanity_table(results),
        "figures": _draw_figures(run, source, results),
        "training": _training_charts(run),
        "perturbation": _perturbation_charts(results),
        "before": html.escape(before),
        "after": html.escape(after),
        "gallery": json.dumps(gallery(run, source, results, per_example)),
        "definitions": _definitions(results),
        "command": html.escape(reproducing_command(run.config, run.workdir)),
        "config": html.escape(
            json.dumps(json.loads(run.config.to_json()), indent=2, sort_keys=True)
        ),
    }
    # "</" inside the data would end the script that holds it.
    parts["gallery"] = parts["gallery"].replace("</", "<\\/")
    page = FRAME.read_text()
    page = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], page)
    path = run.workdir / "report.html"
    write_text(path, page)
    return path


def _headline(results):
    """Tiles: what the phase after changed against its control, or against before."""
    before, after = results["before"], results["after"]
    difference = results["differences"].get(after)
    tiles = []
    for key in HEADLINE:
        old = results["phases"][before].get(key)
        new = results["phases"][after].get(key)
        if not old or not new:
            continue
        change = ""
        if difference and key in difference["measures"]:
            entry = difference["measures"][key]
            change = (
                f"<small>{_signed(key, entry['mean'])} against "
                f"{html.escape(difference['reference'])} "
                f"[{_signed(key, entry['low'])}, {_signed(key, entry['high'])}]</small>"
            )
        measure = MEASURES[key]
        tiles.append(
            f'<div class="tile" title="{html.escape(measure.definition)}">'
            f"<span>{html.escape(measure.title)}{_arrow(measure)}</span>"
            f"<b>{evaluate.format_value(key, old['mean'])} → "
            f"{evaluate.format_value(key, new['mean'])}</b>{change}</div>"
        )
    return "".join(tiles)


def _signed(key, value):
    text = evaluate.format_value(key, value)
    return text if value is None or value < 0 or text == "–" else "+" + text


def _phase_table(results):
    names = list(results["phases"])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows, group = [], None
    for key, measure in MEASURES.items():
        entries = [results["phases"][name].get(key) for name in names]
        if not any(entries):
            continue
        if measure.group != group:
            group = measure.group
            rows.append(
                f'<tr class="group"><th colspan="{len(names) + 2}">{group}</th></tr>'
            )
        number = max(entry["n"] for entry in entries if entry)
        cells = "".join(_cell(key, entry) for entry in entries)
        rows.append(
            f'<tr><th title="{html.escape(measure.definition)}">'
            f"{html.escape(measure.title)}{_arrow(measure)}</th>"
            f'<td class="n">{number}</td>{cells}</tr>'
        )
    return (
        f"<table><thead><tr><th>measure</th><th>n</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _method_table(results):
    columns = _method_columns(results)
    head = "".join(
        f'<th><button title="{html.escape(MEASURES[key].definition)}">'
        f"{html.escape(MEASURES[key].title)}{_arrow(MEASURES[key])}</button></th>"
        for key in columns
    )
    rows = []
    for row in results["methods"]:
        cells = "".join(_cell(key, row["measures"].get(key)) for key in columns)
        milliseconds = row["ms_per_image"]
        rows.append(
            f"<tr{' class=ours' if row['ours'] else ''}>"
            f"<th>{html.escape(method_title(row))}</th>"
            f"<td>{html.escape(row['model'])}</td>{cells}"
            f'<td data-value="{milliseconds}">{milliseconds:.2f}</td></tr>'
        )
    return (
        '<table class="sortable"><thead><tr><th><button>method</button></th>'
        f"<th><button>model</button></th>{head}"
        "<th><button>ms ↓</button></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(key, entry):
    if not entry:
        return '<td data-value="">–</td>'
    low, high = (evaluate.format_value(key, entry[end]) for end in ("low", "high"))
    value = entry["mean"] if _is_number(entry["mean"]) else ""
    return (
        f'<td data-value="{value}">{evaluate.format_value(key, entry["mean"])}'
        f"<small>{low} … {high}</small></td>"
    )


def _sanity_table(results):
    rows = "".join(
        f"<tr><th>{html.escape(TITLES.get(method, method))}</th>"
        f"<td>{_number(row['mean'])}<small>{_number(row['low'])} … "
        f"{_number(row['high'])}</small></td>"
        f'<td class="{"pass" if row["passed"] else "fail"}">'
        f"{'passes' if row['passed'] else 'fails'}</td></tr>"
        for method, row in results["sanity"].items()
    )
    return (
        "<table><thead><tr><th>method</th><th>rank correlation</th><th>verdict</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _definitions(results):
    rows = []
    for key, measure in MEASURES.items():
        if any(key in row for row in results["phases"].values()):
            rows.append(
                f"<dt>{html.escape(measure.title)}</dt>"
                f"<dd>{html.escape(measure.definition)}</dd>"
            )
    return f"<dl>{''.join(rows)}</dl>"


def _draw_figures(run, source, results):
    """The three pictures of the source, as files and inlined."""
    before, after = results["before"], results["after"]
    phases = (before, after)
    data = run.data._replace(test=source)
    arguments = (run.config, run.model, run.states, data, run.workdir)
    drawn = [
        (
            figures.write_before_after(*arguments, phases=phases),
            "Guided localisation: before and after",
            "The first images of the split, unselected. White: the true box. L^c is "
            "the map of the true class, L^p that of the runner-up on the same scale, "
            f"L^ib the information bottleneck's. Model {before}, then {after}.",
        )
    ]
    if results["num_classes"] > 1:
        drawn.append(
            (
                figures.write_suppression(*arguments, phases),
                "Suppression of the runner-up",
                "L^c, L^p and their overlap min(L^c, L^p). The four scores under the "
                "input are the probabilities of the true class c and of the runner-up "
                "p, before → after. The source prints four numbers there without "
                "saying what they are; this is how we read them.",
            )
        )
    drawn.append(
        (
            figures.write_deletion(*arguments, phases),
            "Deletion",
            "The most salient 30, 60 and 90 % of the pixels become black. P is the "
            "probability of the true class: with a good map it falls at once.",
        )
    )
    return "".join(
        f"<figure><h3>{html.escape(title)}</h3>"
        f'<div class="scroll"><img alt="{html.escape(title)}" src="{_inline(path)}">'
        f"</div><figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, title, caption in drawn
    )


def _inline(path):
    """A picture's file as a data URI, as JPEG, which is a quarter of its PNG."""
    from PIL import Image

    with Image.open(path) as image:
        return _data_uri(image.convert("RGB"), quality=88)


def _data_uri(image, *, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# Curves.


def _training_charts(run):
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
        return 0 if init == "random" else start(init) + last.get(init, 0)

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


def _perturbation_charts(results):
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
    finite = [(x, y) for *_, points in series for x, y in points if _is_number(y)] or [
        (0.0, 0.0)
    ]
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
        placed = [place(x, y) for x, y in points if _is_number(y)]
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


def _is_number(value):
    return value is not None and math.isfinite(value)


def _ticks(low, high):
    """About five round numbers that cover [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= min(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    first = math.floor(low / step + 1e-9)
    return [
        round(i * step, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)
    ]


# Gallery.


def gallery(run, source, results, per_example) -> list:
    """The entries of the gallery: pictures, predictions and what changed.

    The first images of the split, images that the second model put right or got wrong,
    and those whose share of saliency in the box moved most, as far as they fit.
    """
    before, after = results["before"], results["after"]

    def value(phase, key):
        return per_example.get(f"{phase}/{key}")

    right = [value(phase, "accuracy") > 0 for phase in (before, after)]
    shares = [value(phase, "box_share") for phase in (before, after)]
    moved = None if shares[0] is None else np.nan_to_num(shares[1] - shares[0])
    candidates = {
        "first": np.arange(len(source)),
        "fixed": np.flatnonzero(~right[0] & right[1]),
        "broken": np.flatnonzero(right[0] & ~right[1]),
        "moved": [] if moved is None else np.argsort(-np.abs(moved), kind="stable"),
    }
    chosen = list(
        dict.fromkeys(
            int(index)
            for kind, number in GALLERY.items()
            for index in candidates[kind][:number]
        )
    )
    maps = [_class_maps(run, phase, source, chosen) for phase in (before, after)]
    entries, size = [], 0
    batches = splits.placed_batches(run.config, splits.Examples(source, chosen))
    for batch in batches:
        for row in np.flatnonzero(batch["example_mask"] > 0):
            place = batch["place"][row]
            index = chosen[place]
            entry = {
                "index": index,
                "label": int(batch["label"][row]),
                "first": index < GALLERY["first"],
                "right": [bool(r[index]) for r in right],
                "says": [int(value(p, "predicted")[index]) for p in (before, after)],
                "p": [
                    round(float(value(p, "probability")[index]), 3)
                    for p in (before, after)
                ],
            }
            if moved is not None and all(np.isfinite(s[index]) for s in shares):
                entry["share"] = [round(float(s[index]), 3) for s in shares]
            bbox = batch["bbox"][row] if "bbox" in batch else None
            heats = (None, maps[0][place], maps[1][place])
            entry["pictures"] = [
                _thumbnail(batch["image"][row], heat, bbox) for heat in heats
            ]
            size += sum(map(len, entry["pictures"]))
            if size > MAX_GALLERY_BYTES:
                return entries
            entries.append(entry)
    return entries


def _class_maps(run, phase, source, indices):
    """L^c / max L^c of some images, [n, H, W]; 0 where a map is not finite."""
    variables = run.states[phase].variables
    step = splits.compiled(_maps_step, run.config, run.model)
    maps = splits.map_split(
        run.config,
        splits.Examples(source, indices),
        lambda batch: step(variables, batch),
    )["maps"]
    maps = np.nan_to_num(maps, posinf=0.0, neginf=0.0)
    peaks = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(peaks > 0, peaks, 1.0)


def _maps_step(variables, batch, *, model, image_stats):
    return {
        "maps": measures.class_maps(
            variables, batch, model=model, image_stats=image_stats
        )
    }


def _thumbnail(image, heat, bbox):
    from PIL import Image

    picture = figures.overlay(image, heat, bbox=bbox)
    return _data_uri(Image.fromarray(picture), quality=82)


# The command.


def reproducing_command(config, workdir) -> str:
    """The command that trains this configuration, from the nearest file in configs/."""
    wanted = _flat(json.loads(config.to_json()))
    nearest = None
    for name in CONFIG_FILES:
        try:
            module = importlib.import_module("configs." + name.replace("/", "."))
        except ModuleNotFoundError:
            continue
        known = _flat(json.loads(module.get_config().to_json()))
        changed = {
            field: value
            for field, value in wanted.items()
            if known.get(field, ...) != value and field not in FREE_FIELDS
        }
        unknown = [field for field in changed if field not in known]
        cost = len(changed) + 100 * len(unknown)
        if nearest is None or cost < nearest[0]:
            nearest = cost, name, changed
    if nearest is None:
        return f"python -m train --workdir={workdir}"
    _, name, changed = nearest
    options = "".join(
        f" \\\n    --config.{field}={shlex.quote(_literal(value))}"
        for field, value in sorted(changed.items())
    )
    return (
        f"python -m train --config=configs/{name}.py --workdir={workdir}{options}\n"
        f"python -m train.evaluate --workdir {workdir}"
    )


def _literal(value):
    if isinstance(value, list):
        return "(" + "".join(json.dumps(item) + "," for item in value) + ")"
    return str(value)


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, name + ".")
        else:
            flat[name] = value
    return flat
