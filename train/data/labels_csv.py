"""labels.csv: one row a picture, with its class and what else is known of it.

    file,label,group,split,ymin,xmin,ymax,xmax,mask
    images/1.jpg,good,part7,train,.1,.2,.5,.6,masks/1.png

Only `file` and `label` are required. Files are relative to the folder of labels.csv.
With `link="sigmoid"` a label is several, as `good;new`, or none, an empty cell.
Pictures of one group stay in one split. A box is in shares of the picture's sides or,
where most boxes of the file have a value above 1, in pixels. Cells are separated by
commas, semicolons or tabs.
"""

import csv
import io
import os
from pathlib import Path
from typing import NamedTuple

from train.data import several
from train.data.faults import listed, shown

BOX = ("ymin", "xmin", "ymax", "xmax")
COLUMNS = ("file", "label", "group", "split", *BOX, "mask")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


class Picture(NamedTuple):
    """One picture of a data set, before it is read.

    Attributes:
      path: the file.
      name: its path relative to the folder, as people see it.
      label: name of its class; with several labels per picture a tuple of names.
      group: pictures of one group stay in one split; None: on its own.
      split: "train", "validation", "test", or None if not given.
      box: (ymin, xmin, ymax, xmax) in shares of the upright picture, or in pixels if
        `in_pixels`; None without one.
      mask: file of the object's mask, or None.
      in_pixels: what unit the box has.
    """

    path: Path
    name: str
    label: str | tuple[str, ...]
    group: str | None = None
    split: str | None = None
    box: tuple[float, float, float, float] | None = None
    mask: Path | None = None
    in_pixels: bool = False


def read(folder: Path, link: str = "softmax") -> tuple[list[Picture], list[str]]:
    """The pictures of FOLDER/labels.csv, and its faults, one line each."""
    path = folder / "labels.csv"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        return [], [f"labels.csv: cannot be read ({error.strerror})"]
    except UnicodeDecodeError:
        return [], ["labels.csv: not UTF-8 text; save it as UTF-8"]
    header, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if row
        ]
    except csv.Error as error:
        return [], [f"labels.csv, line {reader.line_num}: {error}"]
    if not rows:
        return [], ["labels.csv: the file is empty"]
    columns = [name.lower() for name in rows[0][1]]
    header_faults = _header_faults(columns)
    if not {"file", "label"} <= set(columns):
        return [], header_faults
    pictures, faults = [], _Faults()
    for line, cells in rows[1:]:
        if len(cells) != len(columns):
            faults.add("cells", f"line {line} has {len(cells)}")
            continue
        row = dict(zip(columns, cells, strict=True))
        picture = _row(folder, line, row, link, faults)
        if picture:
            pictures.append(picture)
    _find_duplicates(pictures, faults)
    splits = sum(p.split is not None for p in pictures)
    if 0 < splits < len(pictures):
        missing = next(p for p in pictures if p.split is None)
        faults.add("partial", shown(missing.name), count=len(pictures) - splits)
    return _with_unit(pictures), header_faults + faults.lines(len(columns))


def _header_faults(columns):
    faults = [
        f"labels.csv: no column {name!r}; the header must have file,label"
        for name in ("file", "label")
        if name not in columns
    ]
    faults += [
        f"labels.csv: unknown column '{shown(name)}'; known are {', '.join(COLUMNS)}"
        for name in columns
        if name not in COLUMNS
    ]
    faults += [
        f"labels.csv: column '{shown(name)}' occurs twice"
        for name in sorted({name for name in columns if columns.count(name) > 1})
    ]
    some = [name for name in BOX if name in columns]
    if some and len(some) < len(BOX):
        faults.append(f"labels.csv: a box needs {', '.join(BOX)}; found {some}")
    return faults


class _Faults:
    """Faults of rows, gathered by kind so that a thousand of them are one line."""

    TEXTS = {
        "cells": "rows with another number of cells than the header's {columns}",
        "file": "rows without a file",
        "label": "rows with an empty or NaN label",
        "missing": "files that are not there",
        "mask": "masks that are not there",
        "split": "splits that are none of train, validation, test",
        "box": "boxes that are no four numbers with ymin < ymax and xmin < xmax",
        "duplicate": "files named twice",
        "partial": "rows without a split while others have one, fill all or none",
    }

    def __init__(self):
        self._names = {kind: [] for kind in self.TEXTS}
        self._counts = dict.fromkeys(self.TEXTS, 0)

    def add(self, kind, name, count=1):
        self._names[kind].append(name)
        self._counts[kind] += count

    def lines(self, columns):
        return [
            f"labels.csv: {text.format(columns=columns)} ({self._counts[kind]}): "
            + listed(self._names[kind])
            for kind, text in self.TEXTS.items()
            if self._counts[kind]
        ]


def _row(folder, line, row, link, faults):
    name = _path(folder, row["file"])
    where = f"{shown(name)} (line {line})"
    if not name:
        faults.add("file", f"line {line}")
        return None
    if link == "softmax" and row["label"].lower() in ("", "nan"):
        faults.add("label", where)
        return None
    if not (folder / name).is_file():
        faults.add("missing", where)
        return None
    mask = _path(folder, row.get("mask") or "") or None
    if mask and not (folder / mask).is_file():
        faults.add("mask", f"{shown(mask)} (line {line})")
        mask = None
    split = row.get("split") or None
    if split and split.lower() not in SPLIT_NAMES:
        faults.add("split", f"'{shown(split)}' (line {line})")
    box = _box([row[side] for side in BOX]) if row.keys() >= set(BOX) else None
    if box is False:
        faults.add("box", where)
    return Picture(
        folder / name,
        Path(name).as_posix(),
        row["label"] if link == "softmax" else several.parse(row["label"]),
        group=row.get("group") or None,
        split=SPLIT_NAMES.get(split.lower()) if split else None,
        box=box or None,
        mask=folder / mask if mask else None,
    )


def _path(folder, name):
    """A file's name with the separators of this system, if that is what they are."""
    if os.sep != "/" or (folder / name).is_file():
        return name
    return name.replace("\\", "/")


def _box(cells):
    """Four numbers, None for four empty cells, False for anything else."""
    if not any(cells):
        return None
    try:
        ymin, xmin, ymax, xmax = map(float, cells)
    except ValueError:
        return False
    return (ymin, xmin, ymax, xmax) if ymin < ymax and xmin < xmax else False


def _find_duplicates(pictures, faults):
    seen = set()
    for picture in pictures:
        key = os.path.realpath(picture.path)
        if key in seen:
            faults.add("duplicate", shown(picture.name))
        seen.add(key)


def _with_unit(pictures):
    boxes = [p.box for p in pictures if p.box]
    in_pixels = 2 * sum(max(box) > 1 for box in boxes) > len(boxes)
    return [p._replace(in_pixels=in_pixels and p.box is not None) for p in pictures]
