"""Whether a classifier is good enough for its maps to be worth looking at.

Accuracy beside chance and the majority class, per class, which class is taken for
which, and of the maps only whether they are blank.
"""

import math

import numpy as np

from train.measure import classes
from train.show.markdown import markdown

# Most classes whose rows are printed; results.json has all.
SHOWN = 12
# Share of blank maps from which it is said.
MANY_BLANK = 0.2


def examine(labels, predicted, blank, num_classes: int) -> dict:
    """How good the answers are, beside answers that looked at nothing.

    Args:
      labels, predicted: [N] of int in [0, num_classes), N >= 1.
      blank: [N], 1 where the map of the label has no mass.
      num_classes: C.

    Returns:
      dict of accuracy, balanced_accuracy (mean over the classes that occur), chance
      (1 / C), majority (share of the most frequent class), margin (half of the 95 %
      interval of the accuracy, normal approximation), blank (share), recall (C floats,
      NaN for a class that does not occur), confusion (C rows of C counts: row true,
      column predicted), num_images, and verdict ("ok", "weak" or "chance").
    """
    labels, predicted = np.asarray(labels, int), np.asarray(predicted, int)
    confusion = classes.confusion(labels, predicted, num_classes)
    number, sizes = len(labels), confusion.sum(axis=1)
    right = np.diag(confusion)
    accuracy = float(right.sum() / number)
    recall = np.full(num_classes, np.nan)
    np.divide(right, sizes, out=recall, where=sizes > 0)
    found = {
        "num_images": number,
        "accuracy": accuracy,
        "margin": 1.96 * math.sqrt(accuracy * (1.0 - accuracy) / number),
        "balanced_accuracy": classes.balanced(labels, labels == predicted),
        "chance": 1.0 / num_classes,
        "majority": float(sizes.max() / number),
        "blank": float(np.mean(blank)),
        "recall": recall.tolist(),
        "confusion": confusion.tolist(),
    }
    return {**found, "verdict": _verdict(found, int((sizes > 0).sum()))}


def _verdict(found, num_present) -> str:
    """ "chance": no better than answers that looked at nothing; "weak": not surely."""
    # A classifier that answers alike everywhere has 1 / C here, however rare the rest.
    excess = found["balanced_accuracy"] - 1.0 / num_present
    if num_present > 1 and excess <= 0.0:
        return "chance"
    balanced_margin = 1.0 / math.sqrt(found["num_images"])  # two deviations at most
    worst = np.nanmin(found["recall"])
    if num_present > 1 and (excess < balanced_margin or worst < found["chance"] / 2):
        return "weak"
    return "ok"


def sentence(name: str, found: dict, class_names) -> str:
    """One plain sentence on a phase whose maps mean little; "" if there is no need."""
    accuracy = f"{found['accuracy']:.1%}"
    if found["verdict"] == "chance":
        return (
            f"{name} answers no better than one who has not looked (accuracy "
            f"{accuracy}, the most frequent class {found['majority']:.1%}, mean over "
            f"the classes {found['balanced_accuracy']:.1%}): its maps mean nothing."
        )
    if found["verdict"] == "weak":
        worst = int(np.nanargmin(found["recall"]))
        return (
            f"{name} is too weak to trust its maps: accuracy {accuracy} of "
            f"{found['num_images']} pictures, and of class {class_names[worst]} "
            f"{found['recall'][worst]:.0%} are found."
        )
    return blank_sentence(name, found["blank"])


def blank_sentence(name: str, share: float) -> str:
    """One sentence on a phase, a large share of whose maps are blank; else ""."""
    if share > MANY_BLANK:
        return f"{share:.0%} of the maps of {name} are blank: nothing is seen there."
    return ""


def text(phases: dict, class_names) -> str:
    """What is printed: a table of the phases, then the last one's classes.

    Args:
      phases: dict phase -> ``examine``'s.
      class_names: C names.
    """
    columns = {
        "accuracy": "accuracy",
        "balanced_accuracy": "mean over classes",
        "majority": "majority class",
        "chance": "chance",
        "blank": "blank maps",
    }
    rows = [
        (name, *(f"{found[key]:.1%}" for key in columns))
        for name, found in phases.items()
    ]
    blocks = [markdown(("phase", *columns.values()), rows)]
    last, found = list(phases.items())[-1]
    blocks.append(confusion_table(last, found, class_names))
    notes = [sentence(name, found, class_names) for name, found in phases.items()]
    return with_notes(blocks, notes)


def with_notes(blocks, notes) -> str:
    """Blocks of text, and below them the sentences that are not empty."""
    return "\n\n".join([*blocks, *(f"NOTE: {note}" for note in notes if note)])


def confusion_table(phase: str, found: dict, class_names) -> str:
    """Who was taken for whom; of many classes the ones that are found worst."""
    recall = np.asarray(found["recall"])
    order = [c for c in range(len(recall)) if np.isfinite(recall[c])]
    if len(class_names) > SHOWN:
        order = sorted(order, key=lambda c: recall[c])[:SHOWN]
        rows = []
        for c in order:
            counts = np.array(found["confusion"][c])
            counts[c] = 0
            most = int(counts.argmax())
            taken = f"{class_names[most]} ({counts[most]})" if counts[most] else "-"
            rows.append((class_names[c], f"{recall[c]:.1%}", taken))
        return markdown((f"{phase}: worst classes", "found", "most taken for"), rows)
    rows = [
        (
            class_names[c],
            *map(str, found["confusion"][c]),
            f"{recall[c]:.1%}",
        )
        for c in order
    ]
    header = (f"{phase}: true \\ answer", *class_names, "found")
    return markdown(header, rows)
