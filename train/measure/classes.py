"""What a network says of each class: counts of (class, answer), and what is chance.

Of several labels per image, whose classes are not taken for one another, that is in
``precision``.
"""

import numpy as np

from train.measure import precision


def confusion(labels, predicted, num_classes: int) -> np.ndarray:
    """int [C, C]: how often an image of a row's class is called the column's."""
    index = np.asarray(labels, int) * num_classes + np.asarray(predicted, int)
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, -1)


def majority(labels, names) -> dict:
    """The most frequent class and its share: what always naming it would get right.

    Args:
      labels: indices into names.

    Returns:
      {name, share}.
    """
    counts = np.bincount(np.asarray(labels, int))
    share = float(counts.max() / counts.sum())
    return {"name": names[int(counts.argmax())], "share": share}


def recalls(labels, correct) -> np.ndarray:
    """The mean of ``correct`` [N] in each of the classes that occur in labels [N]."""
    labels = np.asarray(labels, int)
    counts = np.bincount(labels)
    return np.bincount(labels, correct)[counts > 0] / counts[counts > 0]


def balanced(labels, correct) -> float:
    """The mean of ``recalls``."""
    return float(recalls(labels, correct).mean())


def worst(labels, correct) -> float:
    """The lowest of ``recalls``."""
    return float(recalls(labels, correct).min())


def class_rows(values: dict, phases, num_classes: int) -> list[dict]:
    """Per class that occurs: its number, its images and what each phase makes of it.

    Args:
      values: per-example arrays by "phase/measure".
      phases: names.
      num_classes: of the data set.

    Returns:
      of several labels per image ``precision.class_rows``; else
      dicts {"class", "n", "accuracy": dict by phase, "box_share": the same where it is
      known, "taken_for": dict phase -> the most frequent wrong answer or None}.
    """
    if f"{phases[0]}/positives" in values:
        return precision.class_rows(values, phases)
    labels = values[f"{phases[0]}/label"].astype(int)
    matrices = {
        phase: confusion(labels, values[f"{phase}/predicted"], num_classes)
        for phase in phases
    }
    rows = []
    for number in np.unique(labels):
        row = {"class": int(number), "n": int((labels == number).sum())}
        for key in ("accuracy", "box_share"):
            row[key] = {
                phase: _mean(values[f"{phase}/{key}"][labels == number])
                for phase in phases
                if f"{phase}/{key}" in values
            }
        row["taken_for"] = {}
        for phase, matrix in matrices.items():
            wrong = matrix[number] * (np.arange(num_classes) != number)
            row["taken_for"][phase] = int(wrong.argmax()) if wrong.any() else None
        rows.append(row)
    return rows


def by_chance(values: dict, phase: str, names) -> dict:
    """What one who has not looked would reach.

    Args:
      values: per-example arrays by "phase/measure".
      phase: whose labels are read; all have the same.
      names: of the classes.

    Returns:
      {majority, unlabelled}: the second 0; of several labels per image {majority: None,
      frequency, unlabelled}: ``precision.chance``, and how many images have none.
    """
    positives = values.get(f"{phase}/positives")
    if positives is None:
        return {"majority": majority(values[f"{phase}/label"], names), "unlabelled": 0}
    unlabelled = int((~(positives > 0).any(axis=1)).sum())
    chance = precision.chance(positives)
    return {"majority": None, "frequency": chance, "unlabelled": unlabelled}


def weak_note(results) -> list[str]:
    """A line on the phases that are no better than chance; none if there is none."""
    key, share = "mean_ap", results.get("frequency")
    if share is None:
        key, share = "accuracy", results["majority"]["share"]
    weak = [
        f"{phase} ({row[key]['mean']:.1%})"
        for phase, row in results["phases"].items()
        if results["num_classes"] > 1 and row[key]["mean"] <= share
    ]
    if not weak:
        return []
    told = f"ranking the images of a class by chance would ({share:.1%} mAP)"
    if key == "accuracy":
        told = f"naming {results['majority']['name']!r} for each would be ({share:.1%})"
        told = f"right on no more images than {told}"
    else:
        told = f"ranking the images no better than {told}"
    return [
        f"{told}: {', '.join(weak)}. A classifier so weak has no reasons, and its maps "
        "mean nothing"
    ]


def _mean(values):
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None
