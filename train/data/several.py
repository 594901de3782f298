"""Several labels per picture: how they are written, counted, checked and carried.

A label is the name of a class (`link="softmax"`), or a tuple of names, none to many
(`link="sigmoid"`); the first is the one that is explained, and that a box is of. Where
every tuple has one name, the classes are learnt as questions apart, each under a
sigmoid of its own: a binary cross-entropy head.
Imports numpy and this room's `faults` only.
"""

import numpy as np

from train.data.faults import listed, shown

SEPARATOR = ";"
NO_LABEL = "(no label)"
LINK = "--config.link=sigmoid"


def parse(text: str) -> tuple[str, ...]:
    """The names in a cell, "a; b" as ("a", "b"); none of an empty cell or a NaN."""
    names = dict.fromkeys(name.strip() for name in text.split(SEPARATOR))
    return tuple(name for name in names if name.lower() not in ("", "nan"))


def names(label) -> tuple[str, ...]:
    """The classes of a label."""
    return (label,) if isinstance(label, str) else label


def written(label) -> str:
    """A label as a cell of labels.csv."""
    return SEPARATOR.join(names(label))


def pairs(labels, others) -> list[tuple]:
    """(name, other) for every class of each label, with what stands beside it."""
    return [
        (name, other)
        for label, other in zip(labels, others, strict=True)
        for name in names(label)
    ]


def encode(label, index: dict) -> dict:
    """What of a label is in an example.

    Args:
      label: a name, or a tuple of names.
      index: dict name -> number of the class, of all classes.

    Returns:
      label int32; of a tuple that of its first name, or 0 for an empty one, and
      positives uint8 [C], 1 for every one of its names.
    """
    if isinstance(label, str):
        return {"label": np.int32(index[label])}
    numbers = [index[name] for name in label]
    positives = _positives(numbers, len(index))
    return {"label": np.int32(numbers[0] if numbers else 0), "positives": positives}


def _positives(numbers, num_classes: int):
    """uint8 [C], 1 for the classes of these numbers."""
    positives = np.zeros(num_classes, np.uint8)
    positives[numbers] = 1
    return positives


def faults(labels, splits, link: str) -> list[str]:
    """What several labels per picture cannot do without, one line each."""
    if link == "softmax" or not labels:
        return []
    there = {split for _, split in pairs(labels, splits)}
    return [
        f"no picture of {split} has a label: nothing could be measured there"
        for split in sorted(set(splits) - there)
    ]


def notes(labels) -> list[str]:
    """A line on labels that are all of one name each."""
    single = [not isinstance(label, str) and len(label) == 1 for label in labels]
    if not labels or not all(single):
        return []
    return [
        f"every picture has just one label, and with {LINK} each class is learnt as a "
        f"question of its own; several labels are a{SEPARATOR}b in a cell of "
        "labels.csv, or a list from Python"
    ]


def doubts(labels) -> list[str]:
    """A line on names of classes that look like several labels."""
    odd = [label for label in labels if isinstance(label, str) and SEPARATOR in label]
    if not odd:
        return []
    some = listed(map(shown, sorted(set(odd))))
    return [
        f"labels with '{SEPARATOR}' are taken for names of classes ({len(odd)}): "
        f"{some}; if they are several labels of a picture, {LINK}"
    ]


class OneOfSeveral:
    """A source of examples with one label each, with the positives of several."""

    def __init__(self, source, num_classes: int):
        self._source, self._num_classes = source, num_classes

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        example = self._source[index]
        positives = _positives([example["label"]], self._num_classes)
        return {**example, "positives": positives}
