"""The report of an evaluation: one self-contained web page.

The page (``report.html`` beside this file is its frame) needs no network: pictures are
inlined, curves are SVG, and without JavaScript everything but the gallery is still
there.
"""

import html
import json
import re
from pathlib import Path

from train.configuration import reproducing_command
from train.files import write_text
from train.measure.catalogue import MEASURES, format_value
from train.show import charts, figures, tables
from train.show.gallery import data_uri, gallery

FRAME = Path(__file__).with_name("report.html")
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
        "training": charts.training_charts(run),
        "perturbation": charts.perturbation_charts(results),
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
            f"<span>{html.escape(measure.title)}{tables.arrow(measure)}</span>"
            f"<b>{format_value(key, old['mean'])} → "
            f"{format_value(key, new['mean'])}</b>{change}</div>"
        )
    return "".join(tiles)


def _signed(key, value):
    text = format_value(key, value)
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
            f"{html.escape(measure.title)}{tables.arrow(measure)}</th>"
            f'<td class="n">{number}</td>{cells}</tr>'
        )
    return (
        f"<table><thead><tr><th>measure</th><th>n</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _method_table(results):
    columns = tables.method_columns(results)
    head = "".join(
        f'<th><button title="{html.escape(MEASURES[key].definition)}">'
        f"{html.escape(MEASURES[key].title)}{tables.arrow(MEASURES[key])}</button></th>"
        for key in columns
    )
    rows = []
    for row in results["methods"]:
        cells = "".join(_cell(key, row["measures"].get(key)) for key in columns)
        milliseconds = row["ms_per_image"]
        rows.append(
            f"<tr{' class=ours' if row['ours'] else ''}>"
            f"<th>{html.escape(tables.method_title(row))}</th>"
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
    low, high = (format_value(key, entry[end]) for end in ("low", "high"))
    value = entry["mean"] if tables.is_number(entry["mean"]) else ""
    return (
        f'<td data-value="{value}">{format_value(key, entry["mean"])}'
        f"<small>{low} … {high}</small></td>"
    )


def _sanity_table(results):
    rows = "".join(
        f"<tr><th>{html.escape(tables.TITLES.get(method, method))}</th>"
        f"<td>{tables.number(row['mean'])}<small>{tables.number(row['low'])} … "
        f"{tables.number(row['high'])}</small></td>"
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
        return data_uri(image.convert("RGB"), quality=88)
