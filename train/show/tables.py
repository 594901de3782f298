"""The tables of a run and of its evaluation, in Markdown."""

import math

from ibsgl_jax.app.titles import METHOD_TITLES
from train.measure.catalogue import MEASURES, METHOD_COLUMNS, format_value
from train.show.markdown import markdown

# Columns of the printed table.
COLUMNS = (
    "mean_ap",
    "top_label",
    "label_accuracy",
    "accuracy",
    "nll",
    "box_share",
    "pointing",
    "iou",
    "overlap",
    "drop",
    "increase",
    "area",
    "matched_drop",
    "matched_increase",
)


def phase_table(results: dict) -> str:
    """A row per phase, the columns that were measured."""
    known = [key for key in COLUMNS if any(key in row for row in results.values())]
    return markdown(
        ("phase", *(MEASURES[key].title for key in known)),
        [
            (name, *(format_value(key, row.get(key)) for key in known))
            for name, row in results.items()
        ],
    )


def evaluation_markdown(results: dict) -> str:
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
    blocks += ["## Classes", _class_markdown(results)]
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
    names, rows = list(results["phases"]), []
    for key, measure in MEASURES.items():
        entries = [results["phases"][name].get(key) for name in names]
        if any(entries):
            count = max(entry["n"] for entry in entries if entry)
            cells = (with_interval(key, entry) for entry in entries)
            rows.append((measure.title + arrow(measure), str(count), *cells))
    return markdown(("measure", "n", *names), rows)


def _method_markdown(results):
    columns = method_columns(results)
    titles = (MEASURES[key].title + arrow(MEASURES[key]) for key in columns)
    rows = []
    for row in results["methods"]:
        name = method_title(row)
        name = f"**{name}**" if row["ours"] else name
        cells = (with_interval(key, row["measures"].get(key)) for key in columns)
        rows.append((name, row["model"], *cells, f"{row['ms_per_image']:.2f}"))
    return markdown(("method", "model", *titles, "ms"), rows)


def _class_markdown(results):
    """A row per class, the accuracy of each phase of the run.

    Of several labels per image the average precision, beside chance.
    """
    key = class_score(results)
    phases = list(results["classes"][0][key])
    chance = "frequency" in results["classes"][0]
    rows = [
        (
            results["class_names"][row["class"]],
            str(row["n"]),
            *([number(row["frequency"])] if chance else []),
            *(number(row[key][p]) for p in phases),
        )
        for row in results["classes"]
    ]
    head = ("class", "n", *(["frequency (chance)"] if chance else []))
    return markdown((*head, *phases), rows)


def class_score(results) -> str:
    """What the rows of the classes are judged by."""
    keys = ("average_precision", "accuracy")
    return next(key for key in keys if key in results["classes"][0])


def _sanity_markdown(results):
    rows = [
        (
            TITLES.get(method, method),
            f"{number(row['mean'])} [{number(row['low'])}, {number(row['high'])}]",
            "passes" if row["passed"] else "**fails**",
        )
        for method, row in results["sanity"].items()
    ]
    return markdown(("method", "rank correlation", "verdict"), rows)


TITLES = METHOD_TITLES | {"hirescam": "HiResCAM (L^c)"}


def method_title(row) -> str:
    """The name of a row of the table of methods."""
    if row["ours"]:
        return "ours: L^c of the guided model"
    return TITLES.get(row["method"], row["method"])


def method_columns(results):
    """The measures that the table of methods has values of."""
    return [
        key
        for key in METHOD_COLUMNS
        if any(key in row["measures"] for row in results["methods"])
    ]


def arrow(measure):
    """Which way is better."""
    return {"higher": " ↑", "lower": " ↓", "": ""}[measure.better]


def with_interval(key, entry):
    """The mean and, in brackets, the ends of its interval."""
    if not entry:
        return "–"
    ends = [format_value(key, entry[end]) for end in ("low", "high")]
    return f"{format_value(key, entry['mean'])} [{ends[0]}, {ends[1]}]"


def number(value):
    """Three digits, or a dash."""
    return f"{value:.3f}" if is_number(value) else "–"


def is_number(value):
    """Neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)
