"""Several labels per image: how well a network ranks the images of each class.

The average precision of a class is the mean, over its images, of the precision down to
that image in the order of the class's logits (scikit-learn's
``average_precision_score``). A ranking by chance has about the class's frequency.
"""

import numpy as np


def average_precisions(logits, positives) -> np.ndarray:
    """float64 [C] of logits and positives [N, C]; NaN for a class without an image.

    An image whose logit is NaN comes last.
    """
    from sklearn.metrics import average_precision_score

    logits = np.nan_to_num(logits, nan=np.finfo(np.float32).min)
    return np.array(
        [
            average_precision_score(there, scores) if there.any() else np.nan
            for scores, there in zip(logits.T, positives.T > 0, strict=True)
        ]
    )


def mean_average_precision(logits, positives) -> float:
    """The mean over the classes that have an image; NaN if none has (macro)."""
    found = average_precisions(logits, positives)
    found = found[np.isfinite(found)]
    return float(found.mean()) if found.size else float("nan")


def top_label(logits, positives) -> float:
    """The share of images whose largest logit is of a label, of those that have one."""
    there = positives > 0
    hit = np.take_along_axis(there, np.argmax(logits, axis=1)[:, None], axis=1)
    known = there.any(axis=1)
    return float(hit[known].mean()) if known.any() else float("nan")


def frequencies(positives) -> np.ndarray:
    """float64 [C]: the share of the images that have a label."""
    return np.mean(positives > 0, axis=0)


def chance(positives) -> float:
    """What ``mean_average_precision`` is about by chance: the mean frequency."""
    shares = frequencies(positives)
    return float(shares[shares > 0].mean()) if shares.any() else float("nan")


def class_rows(values: dict, phases) -> list[dict]:
    """Per class that occurs: its number, its images and what each phase makes of it.

    Args:
      values: per-example arrays by "phase/measure".
      phases: names.

    Returns:
      dicts {"class", "n", "frequency", "average_precision": dict by phase, "found": the
      share of its images in which the network says that it is there, by phase}.
    """
    positives = values[f"{phases[0]}/positives"] > 0
    precisions, found = {}, {}
    for phase in phases:
        logits = values[f"{phase}/logits"]
        precisions[phase] = average_precisions(logits, positives)
        found[phase] = np.sum((logits > 0) & positives, axis=0)
    return [
        {
            "class": int(number),
            "n": int(count),
            "frequency": float(count / len(positives)),
            "average_precision": {p: float(precisions[p][number]) for p in phases},
            "found": {p: float(found[p][number] / count) for p in phases},
        }
        for number, count in enumerate(positives.sum(axis=0))
        if count
    ]
