"""Which examples are for training, for choosing and for the final figures.

The split of a group of pictures (most often one picture) is read off a hash of its
key, which is the content of the file or the name of the group. What that guarantees:

- the order, the names and the dates of files do not matter, nor does the machine;
- pictures that are added or removed move no other picture, except in a class that
  would have less than half its share in some split: there the groups whose hashes are
  nearest to that split are moved in (and, when the class has grown, back);
- a near-identical picture that joins a group may take the group with it;
- a class has its share of each split on average (30 of 200: 30 give or take 5), at
  least half of it where groups allow, and at least one example.

A picture with several labels (`several`) counts in each of its classes, one without any
in none.
"""

import collections
import csv
import hashlib
import io
import os
from pathlib import Path

from train.data import several
from train.data.faults import shown

SPLITS = ("train", "validation", "test")
HEADER = ("file", "label", "group", "split")
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def assign(labels, keys, *, shares=None, seed: int = 0) -> list[str]:
    """The split of each example, whole groups together.

    Args:
      labels: sequence of class names, or of tuples of them.
      keys: sequence of str; examples with the same key stay together.
      shares: dict split -> share of the examples; only these splits are made.
      seed: another one gives another division.

    Returns:
      list of names of splits. A class may be missing from one if its groups are too
      few or too mixed: see `missing`.
    """
    shares = {s: v for s, v in (shares or SHARES).items() if v > 0}
    total = sum(shares.values())
    shares = {split: value / total for split, value in shares.items()}
    groups = collections.defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    places = {key: _place(key, seed) for key in groups}
    limits = _limits(shares)
    chosen = {
        key: next(s for s, (low, high) in limits.items() if low <= place < high)
        for key, place in places.items()
    }
    classes = {
        key: collections.Counter(
            name for i in groups[key] for name in several.names(labels[i])
        )
        for key in groups
    }
    _fill_up(chosen, places, classes, shares, limits)
    return [chosen[key] for key in keys]


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(
        f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=6
    )
    return int.from_bytes(digest.digest()) / 2**48


def _limits(shares):
    limits, low = {}, 0.0
    for split in SPLITS:
        if split in shares:
            limits[split] = (low, low + shares[split])
            low += shares[split]
    last = list(limits)[-1]
    limits[last] = (limits[last][0], 1.0)  # rounding leaves no gap
    return limits


def _fill_up(chosen, places, classes, shares, limits):
    """Moves groups until every class has half its share of every split, if it can."""
    sizes = sum(classes.values(), collections.Counter())
    counts = collections.Counter()
    members = collections.defaultdict(list)
    for key, content in classes.items():
        for label, number in content.items():
            counts[chosen[key], label] += number
            members[label].append(key)

    def least(split, label):
        return max(1, int(shares[split] * sizes[label] / 2))

    def distance(key, split):
        low, high = limits[split]
        return max(low - places[key], places[key] - high, 0.0)

    def may_leave(key):
        return all(
            counts[chosen[key], label] - number >= least(chosen[key], label)
            for label, number in classes[key].items()
        )

    for label in sorted(sizes, key=lambda name: (sizes[name], name)):
        for split in shares:
            others = (key for key in members[label] if chosen[key] != split)
            for key in sorted(others, key=lambda k: (distance(k, split), k)):
                if counts[split, label] >= least(split, label):
                    break
                if may_leave(key):
                    for name, number in classes[key].items():
                        counts[chosen[key], name] -= number
                        counts[split, name] += number
                    chosen[key] = split


def complete_splits(labels, keys, given, *, shares=None, seed=0):
    """The given splits with those that are absent cut out of train.

    Returns:
      list of splits, a few words on who made them, and faults.
    """
    shares = {**SHARES, **(shares or {})}
    there = {split for split in given if split}
    absent = [split for split in SPLITS if split not in there]
    if not absent:
        faults = _absent(labels, given, ("train",))
        return list(given), "the splits are the folder's", faults
    if there and "train" not in there:
        return (
            list(given),
            "",
            [f"no training pictures: only {', '.join(sorted(there))}"],
        )
    cut = [i for i, split in enumerate(given) if split in (None, "train")]
    made = assign(
        [labels[i] for i in cut],
        [keys[i] for i in cut],
        shares={split: shares[split] for split in {*absent, "train"}},
        seed=seed,
    )
    splits = list(given)
    for i, split in zip(cut, made, strict=True):
        splits[i] = split
    faults = _absent([labels[i] for i in cut], made, {*absent, "train"})
    if not there:
        return splits, "splits made by content", faults
    return splits, f"{' and '.join(absent)} cut out of train by content", faults


def lacks_train(given) -> str:
    """The fault of splits that are given without one to train on, or ""."""
    if not given or "train" in given:
        return ""
    return f"no training pictures: only {' and '.join(sorted(given))}"


def _absent(labels, splits, wanted):
    wanted = [split for split in SPLITS if split in wanted]
    return [
        f"class '{shown(label)}' has no example for {', '.join(lacking)}: its pictures "
        "are in too few groups (copies count as one)"
        for label, lacking in missing(labels, splits, wanted).items()
    ]


def missing(labels, splits, wanted=SPLITS) -> dict[str, list[str]]:
    """dict class -> the wanted splits in which it has no example."""
    there = set(several.pairs(labels, splits))
    absent = {
        label: [split for split in wanted if (label, split) not in there]
        for label in sorted({label for label, _ in there})
    }
    return {label: lacking for label, lacking in absent.items() if lacking}


def write_splits(path, rows) -> None:
    """Writes who is where as a table; it is a labels.csv that gives the same splits.

    Args:
      path: of the file, replaced whole.
      rows: sequence of (file, label, group, split).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows)
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
    os.replace(scratch, path)


def counts_table(labels, splits) -> str:
    """Examples per class and split as text, the largest class first, with its share."""
    shown_labels = [several.names(label) or (several.NO_LABEL,) for label in labels]
    cells = collections.Counter(several.pairs(shown_labels, splits))
    sizes = collections.Counter()
    for (label, _), number in cells.items():
        sizes[label] += number
    rows = [("class", *SPLITS, "all", "share")]
    for label, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        numbers = (str(cells[label, split]) for split in SPLITS)
        rows.append((label, *numbers, str(size), f"{size / len(labels):.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def class_weights(labels, num_classes: int, *, power: float = 1.0) -> list[float]:
    """Weights that make rare classes count as much as frequent ones.

    Args:
      labels: sequence of int in [0, num_classes), of the training split.
      num_classes: number of classes; one without an example gets weight 0.
      power: 1 for the inverse of the frequency, 0.5 for its root, 0 for no weights.

    Returns:
      list of num_classes weights whose mean over the examples is 1.
    """
    counts = collections.Counter(int(label) for label in labels)
    raw = [counts[c] ** -power if counts[c] else 0.0 for c in range(num_classes)]
    total = sum(raw[c] * n for c, n in counts.items())
    return [value * sum(counts.values()) / total for value in raw]
