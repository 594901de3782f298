"""A folder of pictures as a data set: understood, checked, split, read small.

    data = open_folder("photos", image_size=224)
    print(data.understood, data.table, *data.warnings, sep="\\n")
    data.train[0]       # dict: image uint8 [H, W, 3], label int32 (, bbox, mask, ...)

The layouts are in `layouts`, the columns of labels.csv in `labels_csv`, the rule of the
splits in `splitting`, how pictures are read in `decoded`. The folder itself is only
read. All that is wrong is raised at once; what names and headers show, before anything
is kept in the cache.
"""

import concurrent.futures
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibsgl_jax.images import ImageError
from train.data import decoded, layouts, several, splitting
from train.data.faults import fault_message, listed, shown
from train.data.grouping import group_keys
from train.errors import DatasetError, FaultsError

SPLITS = splitting.SPLITS
# Share of the pictures that may be unreadable.
MAX_UNREADABLE = 0.05
# What `resize_center` shows of the shorter side.
CENTRE = 0.875
# Pictures that are decoded only to find what else is wrong.
MOST_LOOKED_AT = 500


class Pictures(NamedTuple):
    """The splits of a data set of pictures, and what people should know of it.

    Attributes:
      train, validation, test: sequences of dicts of image uint8 [H, W, 3], label int32
        and, where any example has them, bbox float32 [4] (ymin, xmin, ymax, xmax in
        shares; all zero for an example without) and mask uint8 [H, W] of 0 and 1. With
        several labels also positives uint8 [C], and label is their first.
      num_classes: number of classes.
      class_names: tuple of str; label i is class_names[i].
      understood: one line: layout, number of pictures, who made the splits.
      table: text, examples of each class in each split.
      warnings: lines about what should be looked at.
      rows: (file, label, group, split) of every example, for `write_splits`.
    """

    train: Sequence
    validation: Sequence
    test: Sequence
    num_classes: int
    class_names: tuple[str, ...]
    understood: str
    table: str
    warnings: tuple[str, ...]
    rows: tuple[tuple[str, str, str, str], ...]

    def write_splits(self, path) -> None:
        """Writes who is where; the file is a labels.csv that gives the same splits."""
        splitting.write_splits(path, self.rows)

    def class_weights(self, *, power: float = 1.0) -> list[float]:
        """`splitting.class_weights` of the training split."""
        index = {name: i for i, name in enumerate(self.class_names)}
        labels = [index[row[1]] for row in self.rows if row[3] == "train"]
        return splitting.class_weights(labels, self.num_classes, power=power)


def open_folder(
    folder,
    *,
    image_size: int,
    fit: str = "crop",
    link: str = "softmax",
    shares=None,
    seed: int = 0,
    look_alikes: str = "together",
    max_unreadable: float = MAX_UNREADABLE,
    cache_dir=None,
    workdir=None,
    num_threads: int | None = None,
    progress: bool = False,
    look_only: bool = False,
) -> Pictures | None:
    """A folder of pictures as splits of examples.

    Args:
      folder: in one of the layouts of `layouts`.
      image_size: side of the square that the model sees, in pixels.
      fit: "crop": the aspect is kept and the shorter side becomes image_size / 0.875,
        for the transforms `resize_center` and `imagenet`, which see the middle or a
        part; "squash": the whole picture becomes image_size x image_size.
      link: "softmax", one label per picture; "sigmoid", several or none (`several`).
      shares: dict split -> share, for splits that the folder does not give.
      seed: of the splits that are made.
      look_alikes: "together": near-identical pictures stay in one split; "ignore".
      max_unreadable: share of the pictures that may be left out as unreadable.
      cache_dir: folder of resized pictures; None for `decoded.default_folder()`.
      workdir: of the run, which may not lie in the folder nor the folder in it.
      num_threads: that read; None for one per core, at most 8.
      progress: show a bar while the pictures are read.
      look_only: find what is wrong and write nothing; None if more pictures than
        MOST_LOOKED_AT would have to be decoded for that.

    Raises:
      DatasetError: all faults, one line each.
    """
    folder = Path(folder)
    side = image_size if fit == "squash" else round(image_size / CENTRE)
    cache_dir = cache_dir or decoded.default_folder()
    reader = decoded.Reader(side=side, fit=fit, folder=cache_dir)
    layout = layouts.recognise(folder, link)
    try_all = functools.partial(
        _try_all, reader=reader, threads=num_threads or min(os.cpu_count() or 1, 8)
    )
    pictures, sizes, bad = try_all(_header, layout.pictures)
    faults = layout.faults + _place_faults(folder, workdir)
    faults += _size_faults(pictures, sizes)
    few = _count_faults(pictures)
    unreadable = functools.partial(
        _unreadable, number=len(layout.pictures), most=max_unreadable
    )
    if look_only or faults or few or unreadable(bad)[0]:
        reader.keeps = progress = False
        if sum(not reader.facts(p.path, p.mask) for p in pictures) > MOST_LOOKED_AT:
            _raise(folder, faults + few + unreadable(bad)[0])
            return None

    pictures, facts, damaged = try_all(_prepare, pictures, progress=progress)
    few = few or _count_faults(pictures)
    splits, made, more, warnings = _divide(pictures, facts, shares, seed, look_alikes)
    more += several.faults([p.label for p in pictures], splits, link)
    # A division without pictures that are to come tells nothing.
    faults += few or ([] if layout.faults else more)
    lines, notes = unreadable(bad | damaged, tell=bool(faults))
    _raise(folder, faults + lines)
    told = [*notes, *doubts(facts), *_cache_warnings(reader), *warnings]
    return _assemble(
        pictures,
        facts,
        splits,
        reader,
        f"{layout.understood}; {made}",
        [*layout.warnings, *told],
    )


def _divide(pictures, facts, shares, seed, look_alikes):
    """Splits, who made them, faults, warnings: of pictures that were read."""
    keys, warnings = group_keys(
        [p.name for p in pictures],
        [several.written(p.label) for p in pictures],
        [p.group for p in pictures],
        facts,
        splits=[p.split for p in pictures],
        look_alikes=look_alikes,
    )
    splits, made, faults = splitting.complete_splits(
        [p.label for p in pictures],
        keys,
        [p.split for p in pictures],
        shares=shares,
        seed=seed,
    )
    return splits, made, faults, warnings


def _assemble(pictures, facts, splits, reader, understood, warnings):
    labels = [p.label for p in pictures]
    names = sort_classes({name for label in labels for name in several.names(label)})
    examples = {
        split: [
            (p, f)
            for p, f, s in zip(pictures, facts, splits, strict=True)
            if s == split
        ]
        for split in SPLITS
    }
    has = {name: any(getattr(p, name) for p in pictures) for name in ("box", "mask")}
    sources = [PictureSource(examples[s], names, reader, **has) for s in SPLITS]
    rows = (
        (p.name, several.written(p.label), p.group or "", s)
        for p, s in zip(pictures, splits, strict=True)
    )
    return Pictures(
        *sources,
        num_classes=len(names),
        class_names=names,
        understood=understood,
        table=splitting.counts_table(labels, splits),
        warnings=tuple(warnings),
        rows=tuple(rows),
    )


class PictureSource:
    """Examples of one split, read when they are asked for.

    Args:
      examples: sequence of (Picture, Facts).
      class_names: label i is class_names[i].
      reader: `decoded.Reader`.
      box, mask: whether examples have these; one without gets zeros.
    """

    def __init__(self, examples, class_names, reader, *, box=False, mask=False):
        index = {name: i for i, name in enumerate(class_names)}
        self._examples = examples
        self._labels = [several.encode(p.label, index) for p, _ in examples]
        self._places = [reader.place(p.path, p.mask) for p, _ in examples]
        self._reader, self._box, self._mask = reader, box, mask

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"no example {index}")
        picture, facts = self._examples[index]
        try:
            pixels = self._reader.read(
                picture.path, picture.mask, place=self._places[index]
            )
        except ImageError as error:
            raise DatasetError(
                f"{error}; it was there when the run began: put it back, or begin anew"
            ) from None
        example = {
            "image": np.ascontiguousarray(pixels[..., :3]),
            **self._labels[index],
        }
        if self._box:
            example["bbox"] = np.zeros(4, np.float32)
            if picture.box:
                box = _in_shares(picture, facts.size)
                example["bbox"] = decoded.move_box(box, facts.size, self._reader.fit)
        if self._mask:
            example["mask"] = np.zeros(pixels.shape[:2], np.uint8)
            if picture.mask:
                example["mask"] = np.ascontiguousarray(pixels[..., 3])
        return example


def sort_classes(names) -> tuple[str, ...]:
    """Names of classes in order: numbers by value, all else as text."""
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


# ---- Checks -------------------------------------------------------------------------


def _place_faults(folder, workdir):
    if workdir is None:
        return []
    inner, outer = Path(workdir).resolve(), folder.resolve()
    if inner == outer or outer in inner.parents:
        return [
            f"workdir {shown(workdir)} lies in the data folder, where its pictures "
            "would become data; choose another --workdir"
        ]
    if inner in outer.parents:
        return [
            f"the data folder lies in the workdir {shown(workdir)}; choose another "
            "--workdir"
        ]
    return []


def _header(picture, reader):
    """(size of the picture, size of its mask or None), or the error."""
    known = reader.facts(picture.path, picture.mask)
    if known:
        return known.size, None
    try:
        mask = decoded.upright_size(picture.mask) if picture.mask else None
        return decoded.upright_size(picture.path), mask
    except ImageError as error:
        return error


def _prepare(picture, reader):
    try:
        return reader.prepare(picture.path, picture.mask)
    except ImageError as error:
        return error


def _try_all(function, pictures, *, reader, threads, progress=False):
    """function(picture, reader) of all pictures, in order, by threads.

    Returns:
      The pictures that it did not fail for, its results, and dict name -> failure.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda picture: function(picture, reader), pictures)
        if progress and pictures:
            from tqdm import tqdm

            options = {"total": len(pictures), "leave": False}
            options |= {"delay": 2, "mininterval": 1}
            results = tqdm(results, desc="pictures", **options)
        pairs = list(zip(pictures, results, strict=True))
    bad = {p.name: str(r) for p, r in pairs if isinstance(r, ImageError)}
    pairs = [(p, r) for p, r in pairs if p.name not in bad]
    return [p for p, _ in pairs], [r for _, r in pairs], bad


def _in_shares(picture, size):
    width, height = size
    ymin, xmin, ymax, xmax = picture.box
    if not picture.in_pixels:
        return picture.box
    return (ymin / height, xmin / width, ymax / height, xmax / width)


def _size_faults(pictures, sizes):
    """Boxes outside their pictures and masks of another size."""
    outside, other = [], []
    for picture, (size, mask) in zip(pictures, sizes, strict=True):
        if picture.box:
            box = _in_shares(picture, size)
            if min(box) < -1e-6 or max(box) > 1 + 1e-6:
                outside.append(shown(picture.name))
        if mask and mask != size:
            name = f"{shown(picture.mask.name)} is {mask[0]} x {mask[1]}"
            other.append(f"{name}, its picture {size[0]} x {size[1]}")
    faults = []
    if outside:
        in_pixels = any(p.in_pixels for p in pictures)
        unit = "taken as pixels" if in_pixels else "taken as shares of the sides"
        faults.append(
            f"boxes, {unit}, that reach outside their picture ({len(outside)}): "
            + listed(outside)
        )
    if other:
        faults.append(f"masks of another size ({len(other)}): {listed(other)}")
    return faults


def _count_faults(pictures):
    """Classes with too few pictures for the splits that must be made."""
    if not pictures:
        return []
    given = {p.split for p in pictures} - {None}
    if splitting.lacks_train(given):
        return [splitting.lacks_train(given)]
    least = 1 if given == set(SPLITS) else 3 if not given else 4 - len(given)
    counts = {}
    for picture in pictures:
        for name in several.names(picture.label):
            here = picture.split in (None, "train")
            counts[name] = counts.get(name, 0) + here
    few = [f"{shown(c)} ({n})" for c, n in sorted(counts.items()) if n < least]
    if not few:
        return []
    return [
        f"classes with fewer than {least} pictures"
        + (" in train" if given else "")
        + f", too few for the splits ({len(few)}): {listed(few)}; add pictures or "
        "remove the class",
        *several.doubts([p.label for p in pictures]),
    ]


def _unreadable(bad, *, number, most, tell=False):
    """Faults and warnings of pictures that cannot be read; tell: a fault it is."""
    if not bad:
        return [], []
    reasons = listed(map(shown, bad.values()))
    line = f"pictures that cannot be read ({len(bad)} of {number}): {reasons}"
    if len(bad) > most * number:
        return [f"{line}; at most {most:.0%} may be"], []
    return ([line], []) if tell else ([], [line])


def doubts(facts):
    """A warning of pictures that were read and look wrong."""
    found = [shown(f.warning) for f in facts if f.warning]
    if len(found) < 2:
        return found
    return [f"{len(found)} pictures may have been read wrongly; the first, {found[0]}"]


def _raise(folder, faults):
    if faults:
        raise FaultsError(fault_message(shown(folder), dict.fromkeys(faults)))


def _cache_warnings(reader):
    if not reader.failure:
        return []
    return [
        f"the cache of resized pictures, {shown(reader.folder)}, cannot be written to "
        f"({reader.failure}); pictures are decoded at every use"
    ]
