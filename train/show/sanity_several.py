"""``sanity`` for several labels per image: each class beside its frequency.

Frequency is the average precision of a ranking by chance; there is no majority class
and nobody is taken for another.
"""

import numpy as np

from train.measure import precision
from train.show.markdown import markdown
from train.show.sanity import SHOWN, blank_sentence, with_notes


def examine(logits, positives, blank) -> dict:
    """How good the rankings are, beside rankings that looked at nothing.

    Args:
      logits, positives: [N, C], N >= 1.
      blank: [N], 1 where the map of the label has no mass, NaN without a label.

    Returns:
      dict of mean_ap, chance (the mean frequency), average_precision and frequency (C
      floats, NaN for a class that does not occur), blank (share), num_images,
      num_unlabelled, and verdict ("ok", "weak": a class no better than its frequency,
      "chance": their mean is not).
    """
    shares = precision.frequencies(positives)
    shares = np.where(shares > 0, shares, np.nan)
    found = precision.average_precisions(logits, positives)
    known = blank[np.isfinite(blank)]
    mean, chance = float(np.nanmean(found)), precision.chance(positives)
    verdict = "weak" if np.any(found <= shares) else "ok"
    return {
        "num_images": len(logits),
        "num_unlabelled": int(np.sum(~(positives > 0).any(axis=1))),
        "mean_ap": mean,
        "chance": chance,
        "blank": float(known.mean()) if known.size else float("nan"),
        "average_precision": found.tolist(),
        "frequency": shares.tolist(),
        "verdict": "chance" if mean <= chance else verdict,
    }


def sentence(name: str, found: dict, class_names) -> str:
    """One plain sentence on a phase whose maps mean little; "" if there is no need."""
    if found["verdict"] == "chance":
        return (
            f"{name} ranks no better than one who has not looked (mean average "
            f"precision {found['mean_ap']:.1%}, the classes' frequency "
            f"{found['chance']:.1%}): its maps mean nothing."
        )
    if found["verdict"] == "weak":
        gains = np.subtract(found["average_precision"], found["frequency"])
        worst = int(np.nanargmin(gains))
        return (
            f"{name} is too weak to trust its maps of class {class_names[worst]}: "
            f"average precision {found['average_precision'][worst]:.1%} of "
            f"{found['num_images']} pictures, its frequency "
            f"{found['frequency'][worst]:.1%}."
        )
    return blank_sentence(name, found["blank"])


def text(phases: dict, class_names) -> str:
    """What is printed: the phases' average precisions per class, beside frequency.

    Args:
      phases: dict phase -> ``examine``'s.
      class_names: C names.
    """
    last = list(phases.values())[-1]
    known = [c for c, share in enumerate(last["frequency"]) if np.isfinite(share)]
    head = "class: average precision"
    if len(known) > SHOWN:
        known = sorted(known, key=lambda c: last["average_precision"][c])[:SHOWN]
        head = "worst classes: average precision"
    rows = [
        (
            class_names[c],
            *(f"{found['average_precision'][c]:.1%}" for found in phases.values()),
            f"{last['frequency'][c]:.1%}",
        )
        for c in known
    ]
    means = [f"{found['mean_ap']:.1%}" for found in phases.values()]
    rows.append(("mean of all", *means, f"{last['chance']:.1%}"))
    blocks = [markdown((head, *phases, "frequency (chance)"), rows)]
    notes = [sentence(name, found, class_names) for name, found in phases.items()]
    return with_notes(blocks, notes)
