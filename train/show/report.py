"""The report of an evaluation: one self-contained web page.

The page needs no network: pictures are inlined, curves are SVG, and without JavaScript
everything but the gallery is still there. What it looks like is in its template; here
is what it says.
"""

import json
from pathlib import Path

import numpy as np

from train.configuration import reproducing_command
from train.files import write_text
from train.measure.catalogue import MEASURES, format_value
from train.measure.classes import confusion
from train.show import charts, figures, tables
from train.show.gallery import data_uri, gallery
from train.show.names import class_names, data_name

TEMPLATES = Path(__file__).with_name("templates")
HEADLINE = (
    "mean_ap",
    "accuracy",
    "box_share",
    "pointing",
    "overlap",
    "drop",
    "increase",
    "matched_drop",
    "matched_increase",
)
# Of more classes the page has no matrix, and not the rows of all.
MOST_IN_MATRIX, MOST_ROWS = 20, 40


def write_report(run, source, results, per_example) -> Path:
    """Draw the pictures and write report.html into the run's folder.

    Args:
      run: saved_run.Run with its data.
      source: the examples that were evaluated.
      results, per_example: of ``evaluate.evaluate_run``.

    Returns:
      The path of the page.
    """
    names = class_names(run.data)
    places = per_example.get("places", np.arange(len(source)))
    page = render(
        results=results,
        dataset=data_name(run.config),
        model=run.config.model,
        names=names,
        headline=_headline(results),
        phases=_phase_table(results),
        methods=_method_table(results),
        sanity=_sanity_table(results),
        classes=_class_table(results, names),
        confusions=_confusions(results, per_example, names),
        figures=_draw_figures(run, source, results),
        training=charts.training_charts(run),
        perturbation=charts.perturbation_charts(results),
        gallery=gallery(run, source, results, per_example, places),
        definitions=[m for key, m in MEASURES.items() if _is_known(results, key)],
        command=reproducing_command(run.config, run.workdir),
        config=json.dumps(json.loads(run.config.to_json()), indent=2, sort_keys=True),
    )
    path = run.workdir / "report.html"
    write_text(path, page)
    return path


def render(**context) -> str:
    """The page; whatever text the context holds is shown as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        arrow=tables.arrow, chart_size=(charts.WIDTH, charts.HEIGHT), **context
    )


def _is_known(results, key):
    return any(key in row for row in results["phases"].values())


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
        change = None
        if difference and key in difference["measures"]:
            entry = difference["measures"][key]
            mean, low, high = (_signed(key, entry[k]) for k in ("mean", "low", "high"))
            change = f"{mean} against {difference['reference']} [{low}, {high}]"
        values = (format_value(key, entry["mean"]) for entry in (old, new))
        tiles.append((MEASURES[key], *values, change))
    return tiles


def _signed(key, value):
    text = format_value(key, value)
    return text if value is None or value < 0 or text == "–" else "+" + text


def _phase_table(results):
    """[(group, [(measure, n, cells)])] of what was measured."""
    groups = {}
    for key, measure in MEASURES.items():
        entries = [row.get(key) for row in results["phases"].values()]
        if any(entries):
            number = max(entry["n"] for entry in entries if entry)
            cells = [_cell(key, entry) for entry in entries]
            groups.setdefault(measure.group, []).append((measure, number, cells))
    return list(groups.items())


def _method_table(results):
    columns = tables.method_columns(results)
    return {
        "columns": [MEASURES[key] for key in columns],
        "rows": [
            {
                "title": tables.method_title(row),
                "ours": row["ours"],
                "model": row["model"],
                "cells": [_cell(key, row["measures"].get(key)) for key in columns],
                "ms": row["ms_per_image"],
            }
            for row in results["methods"]
        ],
    }


def _cell(key, entry):
    """{value, text, low, high}; value is "" where it is not known."""
    if not entry:
        return {"value": "", "text": "–"}
    low, high = (format_value(key, entry[end]) for end in ("low", "high"))
    value = entry["mean"] if tables.is_number(entry["mean"]) else ""
    text = format_value(key, entry["mean"])
    return {"value": value, "text": text, "low": low, "high": high}


def _sanity_table(results):
    return [
        {
            "title": tables.TITLES.get(method, method),
            "passed": row["passed"],
            **{key: tables.number(row[key]) for key in ("mean", "low", "high")},
        }
        for method, row in results["sanity"].items()
    ]


def _class_table(results, names):
    """The rows of the classes, the least accurate after first.

    Of several labels per image each has its average precision and its frequency.
    """
    before, after = results["before"], results["after"]
    score = tables.class_score(results)
    rows = sorted(results["classes"], key=lambda row: row[score][after])
    return {
        "score": score.replace("_", " "),
        "last": "taken for" if score == "accuracy" else "frequency",
        "boxes": any(row.get("box_share") for row in rows),
        "left_out": max(0, len(rows) - MOST_ROWS),
        "rows": [
            {
                "name": names[row["class"]],
                "n": row["n"],
                "values": [
                    (value, tables.number(value))
                    for key in (score, "box_share")
                    for value in (row.get(key, {}).get(p) for p in (before, after))
                    if row.get(key)
                ],
                "taken_for": _taken_for(row, after, names),
            }
            for row in rows[:MOST_ROWS]
        ],
    }


def _taken_for(row, after, names):
    """The most frequent wrong answer, "" for none; of several labels the frequency."""
    if "frequency" in row:
        return tables.number(row["frequency"])
    taken = row["taken_for"][after]
    return "" if taken is None else names[taken]


def _confusions(results, per_example, names):
    """Per phase shown: the matrix where there are few classes, and the worst pairs.

    None of several labels per image: no class is taken for another.
    """
    found = []
    if results["majority"] is None:
        return found
    for phase in dict.fromkeys((results["before"], results["after"])):
        labels, says = (per_example[f"{phase}/{k}"] for k in ("label", "predicted"))
        counts = confusion(labels, says, len(names))
        wrong = counts * (1 - np.eye(len(names), dtype=int))
        worst = np.argsort(-wrong, axis=None, kind="stable")[:MOST_IN_MATRIX]
        pairs = zip(*np.unravel_index(worst, wrong.shape), strict=True)
        rows = []
        if len(names) <= MOST_IN_MATRIX:
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            rows = [
                (
                    names[i],
                    list(zip(counts[i].tolist(), shares[i].round(3), strict=True)),
                )
                for i in range(len(names))
            ]
        found.append(
            {
                "phase": phase,
                "rows": rows,
                "pairs": [
                    (names[i], names[j], int(wrong[i, j]))
                    for i, j in pairs
                    if wrong[i, j]
                ],
            }
        )
    return found


def _draw_figures(run, source, results):
    """The pictures of the paper, as files and inlined: (title, caption, picture)."""
    before, after = results["before"], results["after"]
    phases = (before, after)
    data = run.data._replace(test=source)
    arguments = (run.config, run.model, run.states, data, run.workdir)
    number = results["num_statistics"]
    drawn = [
        (
            figures.write_before_after(
                *arguments, phases=phases, num_statistics=number
            ),
            "Guided localisation: before and after",
            "The first images, unselected. White: the true box, where there is one. "
            "L^c is the map of the true class, L^p that of the runner-up on the same "
            f"scale, L^ib the information bottleneck's. Model {before}, then {after}. "
            "A map that says next to nothing is drawn faint, with its bits below.",
        )
    ]
    if results["num_classes"] > 1 and results["pictures"]:
        drawn.append(
            (
                figures.write_suppression(*arguments, phases, num_statistics=number),
                "Suppression of the runner-up",
                "L^c, L^p and their overlap min(L^c, L^p). The four scores under the "
                "input are the probabilities of the true class c and of the runner-up "
                "p, before → after. The paper prints four numbers there without "
                "saying what they are; this is how we read them.",
            )
        )
    if results["pictures"]:
        drawn.append(
            (
                figures.write_deletion(*arguments, phases),
                "Deletion",
                "The most salient 30, 60 and 90 % of the pixels become black. P is the "
                "probability of the true class: with a good map it falls at once.",
            )
        )
    return [(title, caption, _inline(path)) for path, title, caption in drawn]


def _inline(path):
    """A picture's file as a data URI, as JPEG, which is a quarter of its PNG."""
    from PIL import Image

    with Image.open(path) as image:
        return data_uri(image.convert("RGB"), quality=88)
