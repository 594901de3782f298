"""Examples that are given from Python: sequences of dicts, or Hugging Face data sets.

    data = open_examples({"train": examples, "test": others}, image_size=224)
    data = open_examples(datasets.load_dataset("imagefolder", ...), image_size=224)

An example is a dict of `image` (a `PIL.Image`, a path, or an array [H, W], [H, W, 1],
[H, W, 3]: uint8, uint16, bool, or float in [0, 1]), `label` (int or str; with
`link="sigmoid"` a list of them, empty or not) and, perhaps, `bbox` (ymin, xmin, ymax,
xmax in [0, 1]), `mask` ([H, W], not zero on the object) and `group` (str; stays in one
split). What has `features` is taken for an object of `datasets`, not imported here.
"""

import collections
import hashlib
import io
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibsgl_jax import images
from ibsgl_jax.images import ImageError
from train.data import decoded, folders, several, similar, splitting
from train.data.faults import fault_message, listed, shown
from train.data.grouping import group_keys
from train.data.labels_csv import SPLIT_NAMES
from train.errors import DatasetError, FaultsError

# Reduced examples are kept in memory up to this many bytes, else made at every use.
CACHE_BYTES = 2**30


class _Part(NamedTuple):
    """One given sequence, and what its columns are called."""

    split: str | None
    examples: Any
    image: str = "image"
    label: str = "label"
    names: tuple[str, ...] | None = None


def open_examples(
    data,
    *,
    image_size: int,
    fit: str = "crop",
    link: str = "softmax",
    class_names=None,
    shares=None,
    seed: int = 0,
    look_alikes: str = "together",
    cache_bytes: int = CACHE_BYTES,
    look_only: bool = False,
) -> folders.Pictures | None:
    """Given examples as splits, checked and reduced like those of a folder.

    Args:
      data: a sequence of examples, or a mapping from split to one; splits that are
        absent are cut out of train.
      class_names: names of the classes 0, 1, ...; None: those of the data set's
        features, or the labels themselves.
      cache_bytes: reduced examples are kept in memory up to this size.
      look_only: find what is wrong; None for more examples than
        `folders.MOST_LOOKED_AT`, which are not read for that.
      image_size, fit, link, shares, seed, look_alikes: as in `folders.open_folder`.

    Raises:
      DatasetError: all faults, one line each.
    """
    if fit not in images.FITS:
        raise ValueError(f"fit={fit!r}: choose one of {', '.join(images.FITS)}")
    side = image_size if fit == "squash" else round(image_size / folders.CENTRE)
    faults = _Faults()
    parts = _parts(data, faults)
    if look_only and sum(len(p.examples) for p in parts) > folders.MOST_LOOKED_AT:
        faults.stop()
        return None
    read = [
        found
        for part in parts
        for found in _read_all(part, faults, side, fit, link, cache_bytes)
    ]
    names = class_names or next((p.names for p in parts if p.names), None)
    labels, names = _named([found.label for found in read], names, faults)
    if not any(len(part.examples) for part in parts) and not faults.lines:
        faults.lines.append("no examples")
    elif len(names) == 1:
        faults.lines.append(f"one class only, {names[0]!r}: a classifier needs two")
    faults.stop()
    given = [found.split for found in read]
    keys, warnings = group_keys(
        [found.name for found in read],
        list(map(several.written, labels)),
        [found.group for found in read],
        [found.facts for found in read],
        splits=given,
        look_alikes=look_alikes,
    )
    splits, made, more = splitting.complete_splits(
        labels, keys, given, shares=shares, seed=seed
    )
    faults.lines += more + several.faults(labels, splits, link)
    odd = several.doubts(labels)
    faults.lines += odd if faults.lines else []
    faults.stop()
    sources = _sources(read, labels, splits, names, side=side, fit=fit)
    told = folders.doubts([f.facts for f in read])
    rows = zip(read, labels, splits, strict=True)
    return folders.Pictures(
        *sources,
        num_classes=len(names),
        class_names=names,
        understood=f"{len(read)} given examples in {len(names)} classes; {made}",
        table=splitting.counts_table(labels, splits),
        warnings=(*odd, *several.notes(labels), *told, *warnings),
        rows=tuple(
            (f.name, several.written(label), f.group or "", s) for f, label, s in rows
        ),
    )


def _sources(read, labels, splits, names, **options):
    """A `GivenSource` for each split."""
    index = {name: i for i, name in enumerate(names)}
    has = {name: any(getattr(f, name) for f in read) for name in ("box", "mask")}
    return [
        GivenSource(
            [f for f, s in zip(read, splits, strict=True) if s == split],
            [
                several.encode(label, index)
                for label, s in zip(labels, splits, strict=True)
                if s == split
            ],
            **options,
            **has,
        )
        for split in splitting.SPLITS
    ]


class _Found(NamedTuple):
    """An example that was read once."""

    name: str
    part: _Part
    place: int
    split: str | None
    label: Any
    group: str | None
    facts: decoded.Facts
    box: bool
    mask: bool
    kept: dict | None


class GivenSource:
    """Examples of one split, from memory where they were kept.

    Args:
      found: list of what was read.
      labels: list of `several.encode`'s.
      side, fit: as in `decoded.reduce`.
      box, mask: whether examples have these; one without gets zeros.
    """

    def __init__(self, found, labels, *, side, fit, box=False, mask=False):
        self._found, self._labels = found, labels
        self._side, self._fit, self._box, self._mask = side, fit, box, mask

    def __len__(self):
        return len(self._found)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"no example {index}")
        found = self._found[index]
        kept = found.kept
        if kept is None:
            example = found.part.examples[found.place]
            try:
                kept = _reduced(example, found.part, self._side, self._fit)[0]
            except (ImageError, OSError) as error:
                raise DatasetError(f"{found.name}: {error}") from None
        out = {**kept, **self._labels[index]}
        if self._box:
            out.setdefault("bbox", np.zeros(4, np.float32))
        if self._mask:
            out.setdefault("mask", np.zeros(out["image"].shape[:2], np.uint8))
        return out


class _Faults:
    """Lines, and kinds of faults with the examples that have them."""

    def __init__(self):
        self.lines = []
        self._kinds = collections.defaultdict(list)

    def add(self, kind, name):
        self._kinds[kind].append(name)

    def stop(self):
        lines = [
            f"examples {kind} ({len(names)}): {listed(names)}"
            for kind, names in self._kinds.items()
        ]
        if self.lines or lines:
            raise FaultsError(fault_message("data", self.lines + lines))


def _parts(data, faults):
    if not isinstance(data, Mapping):
        return [_part(None, data, faults)]
    parts = []
    for name, examples in data.items():
        split = SPLIT_NAMES.get(str(name).lower())
        if split is None:
            faults.lines.append(
                f"unknown split '{shown(name)}': train, validation, test"
            )
        elif any(part.split == split for part in parts):
            faults.lines.append(f"split {split} is given twice")
        else:
            parts.append(_part(split, examples, faults))
    return parts


def _part(split, examples, faults):
    if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
        faults.lines.append(
            f"{split or 'data'}: a {type(examples).__name__} has no length and no "
            "index; give a list, a sequence or a data set that is not streamed"
        )
        return _Part(split, [])
    features = getattr(examples, "features", None)
    if not isinstance(features, Mapping):
        return _Part(split, examples)
    classes = [name for name, feature in features.items() if _class_names(feature)]
    pictures = [n for n, f in features.items() if type(f).__name__ == "Image"]
    label = "label" if "label" in features else next(iter(classes), "label")
    pictures = [name for name in pictures if name != "mask"]
    image = "image" if "image" in features else next(iter(pictures), "image")
    names = _class_names(features.get(label))
    return _Part(split, examples, image, label, tuple(names) if names else None)


def _class_names(feature):
    """Of a ClassLabel, or of a list of them."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _read_all(part, faults, side, fit, link, cache_bytes):
    used = 0
    for place in range(len(part.examples)):
        name = f"{part.split or 'example'}[{place}]"
        try:
            example = part.examples[place]
        except OSError as error:  # a data set that decodes its pictures
            faults.add("that cannot be used", f"{name} ({shown(error)})")
            continue
        if not isinstance(example, Mapping):
            faults.add("that are no dict of image and label", name)
            continue
        missing = [c for c in (part.image, part.label) if c not in example]
        if missing:
            faults.add(f"without {' and '.join(map(repr, missing))}", name)
            continue
        label = _label(example[part.label], link, faults, name)
        try:
            kept, facts = _reduced(example, part, side, fit)
        except (ImageError, OSError) as error:  # as of a file that PIL opened
            faults.add("that cannot be used", f"{name} ({shown(error)})")
            continue
        used += kept["image"].nbytes
        group = example.get("group")
        yield _Found(
            *(name, part, place, part.split, label),
            None if group is None else str(group),
            facts,
            "bbox" in kept,
            "mask" in kept,
            kept if used <= cache_bytes else None,
        )


def _label(value, link, faults, name):
    """An int or str, of several a tuple of them; None, and a fault, for neither."""
    is_list = isinstance(value, list | tuple) or np.ndim(value) == 1
    if is_list and link == "softmax":
        faults.add(f"with a list of labels, which is for {several.LINK}", name)
        return None
    labels = [_one_label(v) for v in (value if is_list else [value])]
    if None in labels:
        faults.add("with a label that is neither a whole number nor text", name)
        return None
    if link == "softmax":
        return labels[0]
    if len(set(labels)) < len(labels) and set(labels) <= {0, 1}:
        faults.add("that names class 0 or 1 twice; give classes by number", name)
        return None
    return tuple(dict.fromkeys(labels))


def _one_label(value):
    if isinstance(value, str):
        return value.strip() or None
    if np.ndim(value) == 0 and hasattr(value, "item"):  # of NumPy, JAX or torch
        value = value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value) if value >= 0 else None
    return None


def _named(labels, names, faults):
    """As `_classes`, of labels that may be tuples."""
    labels = [label for label in labels if label is not None]
    if not any(isinstance(label, tuple) for label in labels):
        return _classes(labels, names, faults)
    found, names = _classes([x for label in labels for x in label], names, faults)
    found = iter(map(str, found))
    return [tuple(next(found) for _ in label) for label in labels], names


def _classes(labels, names, faults):
    """The class name of each label, and the names in order."""
    labels = [label for label in labels if label is not None]
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        faults.lines.append("some labels are numbers and some are text")
        return labels, ()
    if kinds == {int} and names:
        if labels and max(labels) >= len(names):
            faults.lines.append(
                f"label {max(labels)} and only {len(names)} class names"
            )
            return labels, tuple(names)
        return [str(names[label]) for label in labels], tuple(map(str, names))
    if kinds == {int}:
        there = set(labels)
        absent = sorted(set(range(max(there) + 1)) - there)
        if absent:
            faults.lines.append(
                f"labels must be 0, 1, ...; none is {listed(map(str, absent))}"
            )
        return list(map(str, labels)), tuple(map(str, range(max(there) + 1)))
    known = tuple(names) if names else folders.sort_classes(set(labels))
    unknown = sorted(set(labels) - set(known))
    if unknown:
        faults.lines.append(f"labels that are no class names: {listed(unknown)}")
    return labels, known


def _reduced(example, part, side, fit):
    """The example small, without its label, and its facts.

    Raises:
      ImageError: "image ...", "mask ..." or "bbox ...", without a name.
    """
    told = []
    image, size = _image(example[part.image], side, told.append)
    mask = example.get("mask")
    if mask is not None:
        mask = _mask(mask)
        if mask.shape != size[::-1]:
            raise ImageError(
                f"mask is {mask.shape[1]} x {mask.shape[0]}, its image "
                f"{size[0]} x {size[1]}"
            )
    pixels = decoded.reduce(image, mask, side=side, fit=fit)
    kept = {"image": np.ascontiguousarray(pixels[..., :3])}
    if mask is not None:
        kept["mask"] = np.ascontiguousarray(pixels[..., 3])
    if example.get("bbox") is not None:
        box = np.asarray(example["bbox"], np.float64)
        if box.shape != (4,) or not (
            (box >= 0).all() and (box <= 1).all() and (box[:2] < box[2:]).all()
        ):
            raise ImageError("bbox is not ymin, xmin, ymax, xmax in [0, 1]")
        kept["bbox"] = decoded.move_box(box, size, fit)
    digest = hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16)
    digest.update(str(size).encode())
    hashed = similar.perceptual_hash(image) if similar.is_available() else None
    return kept, decoded.Facts(digest.hexdigest(), hashed, size, "; ".join(told))


def _image(value, side, warn_fn=lambda line: None):
    """An RGB `PIL.Image` and the size that it has in full."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
    if isinstance(value, str | Path):
        return decoded.read_small(value, 2 * side, warn_fn)
    if isinstance(value, io.BytesIO):
        try:
            Image.open(value)
            image = images.read("image", data=value.getvalue(), warn_fn=warn_fn)
        except UnidentifiedImageError:
            raise ImageError("image: its bytes are no image") from None
        except ImageError as error:  # which has no path to name
            raise ImageError(f"image: {str(error).partition(': ')[2]}") from None
        return image, image.size
    if isinstance(value, Image.Image):
        if value.mode in ("RGB", "L", "1", "CMYK", "YCbCr", "HSV"):
            image = ImageOps.exif_transpose(value).convert("RGB")
        else:  # as from a file of its own
            file = io.BytesIO()
            value.save(file, "TIFF" if value.mode == "F" else "PNG")
            image = images.read("image", data=file.getvalue(), warn_fn=warn_fn)
        return image, image.size
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ImageError(
            f"image is an array {list(np.shape(value))}, not [H, W] or [H, W, 3]"
        )
    image = Image.fromarray(_eight_bits(array))
    return image, image.size


def _eight_bits(array):
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"image is {array.dtype}; give uint8, or floats in [0, 1]")
    if not (array >= 0).all() or not (array <= 1).all():
        raise ImageError("image has floating-point values outside [0, 1]")
    return np.round(array * 255).astype(np.uint8)


def _mask(value):
    if isinstance(value, str | Path):
        return decoded.read_mask(value)
    mask = np.asarray(value)
    if mask.ndim == 3:
        mask = mask.max(axis=-1)
    if mask.ndim != 2:
        raise ImageError(f"mask is an array {list(mask.shape)}, not [H, W]")
    return mask > 0
