"""How a folder of pictures is laid out: which files, their classes, splits and masks.

    FOLDER/CLASS/*                      splits are made by the caller
    FOLDER/{train,validation,test}/CLASS/*
    FOLDER/labels.csv                   see `labels_csv`
    FOLDER/masks/...                    the same tree again, of masks
    FOLDER/{images,masks}/...           two parallel trees

Nothing is decoded here. Hidden files and folders are no part of the data; links to
folders are followed. What is wrong becomes a line in `Layout.faults`.
"""

import collections
import functools
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from train.data import labels_csv, several
from train.data.faults import listed, shown
from train.data.labels_csv import SPLIT_NAMES, Picture

SPLITS = ("train", "validation", "test")
MASK_FOLDERS = ("masks", "mask")
# Formats that Pillow lists and cannot read without another program, or are no pictures.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF")


class Layout(NamedTuple):
    """What a folder was understood to hold.

    Attributes:
      pictures: list of `Picture`, sorted by name.
      understood: one line for people.
      faults: what must be mended, one line each.
      warnings: what should be looked at, one line each.
    """

    pictures: list[Picture]
    understood: str
    faults: list[str]
    warnings: list[str]


def recognise(folder: Path, link: str = "softmax") -> Layout:
    """The pictures of a folder, whichever of the layouts it has.

    With ``link="sigmoid"`` a label is several names, of a class folder one: `several`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        return Layout([], "", [f"{shown(folder)}: {what}"], [])
    try:
        files = find_files(folder)
    except OSError as error:
        fault = f"{shown(error.filename)}: cannot be listed ({error.strerror})"
        return Layout([], "", [fault], [])
    root = _picture_root(folder, files)
    files, masks = _without_masks(folder, root, files)
    if (folder / "labels.csv").is_file():
        return _listed_layout(folder, root, files, masks, link)
    pictures = [f for f in files if is_picture(f)]
    if not pictures:
        return Layout([], "", [_nothing_there(folder, files)], [])
    tops = {f.relative_to(root).parts[0] for f in pictures if root in f.parent.parents}
    tops = {top.lower() for top in tops}
    if tops & {"train", "training"} and tops <= SPLIT_NAMES.keys():
        return _split_layout(folder, root, files, masks, link)
    return _class_layout(folder, root, files, masks, link)


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones; a loop of links ends."""
    found, seen = [], set()

    def refuse(error):
        raise error

    for top, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
        found += [Path(top, f) for f in files if f[0] != "."]
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file's suffix is that of a format that Pillow reads."""
    return path.suffix.lower() in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NO_PICTURES
    )


def _nothing_there(folder, files):
    if files:
        return f"{shown(folder)}: no picture among the files there ({len(files)})"
    hidden = any(name.startswith(".") for name in os.listdir(folder))
    return f"{shown(folder)}: " + (
        "only hidden files, which are left out" if hidden else "the folder is empty"
    )


def _picture_root(folder, files):
    """FOLDER/images where all pictures but the masks lie there, else FOLDER."""
    tops = {f.relative_to(folder).parts[0] for f in files if is_picture(f)}
    tops -= set(MASK_FOLDERS)
    return folder / "images" if tops == {"images"} else folder


def _without_masks(folder, root, files):
    """Splits off the masks: a folder whose files mirror those of the others.

    Returns:
      The other files, and a dict from a picture's path without its suffix, relative to
      the root, to its mask.
    """
    for name in MASK_FOLDERS:
        tree = folder / name
        inside = [f for f in files if tree in f.parents and is_picture(f)]
        if not inside:
            continue
        others = [f for f in files if tree not in f.parents]
        pictures = [f for f in others if is_picture(f) and root in f.parents]
        known = {f.relative_to(root).with_suffix("") for f in pictures}
        masks = {f.relative_to(tree).with_suffix(""): f for f in inside}
        masks |= {
            key.with_name(key.name.removesuffix("_mask")): f
            for key, f in list(masks.items())
        }
        if masks.keys() & known:
            return others, masks
    return files, {}


def _listed_layout(folder, root, files, masks, link):
    pictures, faults = labels_csv.read(folder, link)
    warnings = []
    pictures = [p._replace(mask=p.mask or _mask_of(root, p, masks)) for p in pictures]
    named = {os.path.realpath(p.path) for p in pictures}
    named |= {os.path.realpath(p.mask) for p in pictures if p.mask}
    left = [f for f in files if is_picture(f) and os.path.realpath(f) not in named]
    if left and not faults:
        names = listed([shown(f.relative_to(folder)) for f in left])
        warnings.append(f"left out, as not in labels.csv ({len(left)}): {names}")
    if not pictures and not faults:
        faults.append("labels.csv: no row below the header")
    return _finish(pictures, "labels.csv", faults, warnings)


def _split_layout(folder, root, files, masks, link):
    pictures, faults, loose = [], [], []
    for path in filter(is_picture, files):
        if root not in path.parents:
            loose.append(path)
            continue
        parts = path.relative_to(root).parts
        if len(parts) == 1:
            loose.append(path)
        elif len(parts) == 2:
            faults.append(parts[0])
        else:
            split = SPLIT_NAMES[parts[0].lower()]
            picture = _picture(folder, root, path, parts[1], masks, link)
            pictures.append(picture._replace(split=split))
    faults = [
        f"{top}/: pictures outside class folders ({count}); put them into {top}/CLASS/"
        for top, count in sorted(collections.Counter(faults).items())
    ]
    given = sorted({p.split for p in pictures}, key=SPLITS.index)
    layout = f"SPLIT/CLASS/* with {', '.join(given)}"
    warnings = _left_out(folder, files, loose) + _inner_folders(root, pictures, 2)
    return _finish(pictures, layout, faults, warnings)


def _class_layout(folder, root, files, masks, link):
    pictures, loose = [], []
    for path in filter(is_picture, files):
        if path.parent == root or root not in path.parents:
            loose.append(path)
        else:
            label = path.relative_to(root).parts[0]
            pictures.append(_picture(folder, root, path, label, masks, link))
    faults, warnings = [], _left_out(folder, files, loose)
    if not pictures:
        faults.append(
            f"{shown(folder)}: pictures ({len(loose)}) and no class folders; put them "
            "into CLASS/ folders, or write labels.csv (file,label)"
        )
    warnings += _inner_folders(root, pictures, 1)
    return _finish(pictures, "CLASS/*", faults, warnings, hint=_deeper(pictures))


def _deeper(pictures):
    """Where to look if the only class is none, as words after its fault."""
    parents = {p.path.parent for p in pictures}
    if len(parents) < 2:
        return ""
    common = Path(os.path.commonpath(parents))
    inside = sorted({p.relative_to(common).parts[0] for p in parents - {common}})
    names = listed(map(shown, inside))
    return f"; if they are {names}, give --config.data={shown(common)}"


def _inner_folders(root, pictures, depth):
    """A warning of folders inside class folders, which might be the classes."""
    inside = collections.defaultdict(set)
    for picture in pictures:
        parts = picture.path.relative_to(root).parts
        if len(parts) > depth + 1:
            inside["/".join(parts[:depth])].add(parts[depth])
    if not inside:
        return []
    named = [
        f"{shown(c)}/ ({listed(map(shown, sorted(n)))})" for c, n in inside.items()
    ]
    return [f"folders inside a class folder belong to its class: {listed(named)}"]


def _picture(folder, root, path, label, masks, link):
    name = path.relative_to(folder).as_posix()
    picture = Picture(path, name, label if link == "softmax" else (label,))
    return picture._replace(mask=_mask_of(root, picture, masks))


def _mask_of(root, picture, masks):
    try:
        return masks.get(picture.path.relative_to(root).with_suffix(""))
    except ValueError:  # a listed file elsewhere
        return None


def _left_out(folder, files, loose):
    lines = []
    others = [f for f in files if not is_picture(f)]
    for found, why in ((loose, "outside class folders"), (others, "no pictures")):
        if found:
            names = listed([shown(f.relative_to(folder)) for f in found])
            lines.append(f"left out, as {why} ({len(found)}): {names}")
    return lines


def _finish(pictures, layout, faults, warnings, hint=""):
    pictures = sorted(pictures, key=lambda p: p.name)
    classes = {name for p in pictures for name in several.names(p.label)}
    parts = [f"{len(pictures)} pictures in {len(classes)} classes"]
    without = sum(not several.names(p.label) for p in pictures)
    parts += [f"{without} without a label"] if without else []
    for name in ("group", "split", "box", "mask"):
        count = sum(getattr(p, name) is not None for p in pictures)
        if count and not (name == "split" and layout.startswith("SPLIT")):
            parts.append(f"{count} with a {name}")
    faults = faults + _class_faults(classes, hint)
    alike = collections.defaultdict(set)
    for label in classes:
        alike[label.casefold()].add(label)
    warnings = warnings + [
        f"classes {' and '.join(sorted(map(shown, names)))} differ in case only"
        for names in alike.values()
        if len(names) > 1
    ]
    labels = [p.label for p in pictures]
    warnings += several.doubts(labels) + several.notes(labels)
    return Layout(pictures, f"{layout}: {', '.join(parts)}", faults, warnings)


def _class_faults(classes, hint):
    if len(classes) == 1:
        (label,) = classes
        return [f"one class only, '{shown(label)}': a classifier needs two{hint}"]
    return [
        f"class '{shown(label)}': its name is not printable text; rename it"
        for label in sorted(classes)
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in label)
    ]
