"""Which examples have to stay in one split: given groups, copies and near-copies."""

import collections

from train.data import similar
from train.data.faults import listed, shown

# A cluster of this share of all pictures that look alike is what a fixed camera sees,
# not copies of one picture.
MAX_CLUSTER = 0.1


def group_keys(names, labels, groups, facts, *, splits, look_alikes="together"):
    """What stays together, and what people should know about copies.

    Args:
      names, labels: of the examples.
      groups: given group or None.
      facts: with digest and hash.
      splits: given split or None.
      look_alikes: "together" or "ignore", of near-identical pictures.

    Returns:
      list of keys for `splitting.assign`, and warnings.
    """
    if look_alikes not in ("together", "ignore"):
        raise ValueError(f"look_alikes={look_alikes!r}: choose together or ignore")
    same = similar.identical([f.digest for f in facts])
    alike, warnings = [], []
    if look_alikes == "together" and any(f.hash is None for f in facts):
        warnings.append(
            "near-identical pictures are not looked for; pip install imagehash"
        )
    elif look_alikes == "together":
        copies = {i for _, i in same}
        hashes = ["" if i in copies else f.hash for i, f in enumerate(facts)]
        alike, warnings = _look_alikes(hashes)
    members = {}
    for i, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(i)
    chains = [pair for m in members.values() for pair in zip(m, m[1:], strict=False)]
    roots = similar.clusters(len(names), [*same, *alike, *chains])
    own = [
        f"content:{f.digest}" if g is None else f"group:{g}"
        for f, g in zip(facts, groups, strict=True)
    ]
    smallest = {}
    for root, key in zip(roots, own, strict=True):
        smallest[root] = min(key, smallest.get(root, key))
    keys = [smallest[root] for root in roots]
    for pairs, what in ((same, "identical"), (alike, "near-identical")):
        warnings += _copies(pairs, what, names, labels, splits)
    return keys, warnings


def _look_alikes(hashes):
    """Near-identical pairs, less those of clusters too large to be copies."""
    pairs = similar.near(hashes)
    roots = similar.clusters(len(hashes), pairs)
    sizes = collections.Counter(roots)
    most = max(10, MAX_CLUSTER * len(hashes))
    crowd = sum(size for size in sizes.values() if size > most)
    if not crowd:
        return pairs, []
    warning = (
        f"{crowd} pictures look alike, as from a fixed camera, and are not kept "
        "together; if they belong together, give a group in labels.csv"
    )
    return [pair for pair in pairs if sizes[roots[pair[0]]] <= most], [warning]


def _copies(pairs, what, names, labels, splits):
    if not pairs:
        return []
    across = [(i, j) for i, j in pairs if splits[i] and splits[j] != splits[i]]
    across = [(i, j) for i, j in across if splits[j]]
    lines = []
    if across:
        named = [
            f"{shown(names[i])} ({splits[i]}) and {shown(names[j])} ({splits[j]})"
            for i, j in across
        ]
        lines.append(
            f"{what} pictures across splits ({len(across)} pairs): {listed(named)}"
        )
    elif any(split is None for split in splits):
        number = len({i for pair in pairs for i in pair})
        named = [f"{shown(names[i])} and {shown(names[j])}" for i, j in pairs]
        lines.append(
            f"{what} pictures, each kept with its like ({number}): {listed(named)}"
        )
    mixed = [
        f"{shown(names[i])} ({shown(labels[i])}) and {shown(names[j])} "
        f"({shown(labels[j])})"
        for i, j in pairs
        if labels[i] != labels[j]
    ]
    if mixed:
        lines.append(
            f"{what} pictures in two classes ({len(mixed)} pairs): {listed(mixed)}"
        )
    return lines
