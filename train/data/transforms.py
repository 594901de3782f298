"""Transforms: example in, example out; boxes and masks follow the image.

In training an example with several labels shows another of them at every use.
"""

import functools

import numpy as np

from train.errors import DatasetError


def _window(example, top, left, height, width):
    """Cuts a window that may reach over the edge; the edge's pixels are repeated."""
    rows = np.arange(top, top + height)
    columns = np.arange(left, left + width)

    def cut(array):
        return array.take(rows, 0, mode="clip").take(columns, 1, mode="clip")

    old_height, old_width = example["image"].shape[:2]
    out = {**example, "image": cut(example["image"])}
    if "mask" in example:
        mask = out["mask"] = cut(example["mask"])
        mask[: max(0, -top)] = mask[max(0, old_height - top) :] = 0
        mask[:, : max(0, -left)] = mask[:, max(0, old_width - left) :] = 0
    if "bbox" in example:
        ymin, xmin, ymax, xmax = example["bbox"].tolist()
        box = (
            (ymin * old_height - top) / height,
            (xmin * old_width - left) / width,
            (ymax * old_height - top) / height,
            (xmax * old_width - left) / width,
        )
        out["bbox"] = np.array([min(max(v, 0), 1) for v in box], np.float32)
    return out


def _resize(example, height, width):
    """Resizes: bilinear with antialiasing; masks by nearest pixel."""
    from PIL import Image

    if example["image"].shape[:2] == (height, width):
        return example
    size = (width, height)
    image = Image.fromarray(example["image"]).resize(
        size, Image.BILINEAR, reducing_gap=2.0
    )
    out = {**example, "image": np.asarray(image)}
    if "mask" in example:
        mask = Image.fromarray(example["mask"]).resize(size, Image.NEAREST)
        out["mask"] = np.asarray(mask)
    return out


def _flip(example):
    """Mirrors left and right."""
    out = {**example, "image": example["image"][:, ::-1]}
    if "mask" in example:
        out["mask"] = example["mask"][:, ::-1]
    if "bbox" in example:
        ymin, xmin, ymax, xmax = example["bbox"]
        out["bbox"] = np.array([ymin, 1 - xmax, ymax, 1 - xmin], np.float32)
    return out


def none(example, rng=None, image_size=None):
    """The image as it is."""
    del rng, image_size
    return example


def shift(example, rng, image_size=None, *, distance=4):
    """Shifts by up to `distance` pixels each way. No flip: for digits."""
    del image_size
    top, left = rng.integers(-distance, distance + 1, 2).tolist()
    return _window(example, top, left, *example["image"].shape[:2])


def crop_flip(example, rng, image_size=None):
    """Shifts by up to 4 pixels (pad and crop), then mirrors half of the images."""
    example = shift(example, rng, image_size)
    return _flip(example) if rng.random() < 0.5 else example


def imagenet(example, rng, image_size, *, least=0.08):
    """A random part, 8 to 100 % of the area, resized; half of them mirrored.

    A box outside the part becomes a box of no area.
    Reference: Szegedy et al., Going Deeper with Convolutions, 2014, section 6.
    """
    height, width = example["image"].shape[:2]
    for _ in range(10):
        area = rng.uniform(least, 1.0) * height * width
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = rng.integers(0, height - h + 1)
            left = rng.integers(0, width - w + 1)
            example = _window(example, top, left, h, w)
            break
    else:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        example = _window(example, top, left, side, side)
    example = _resize(example, image_size, image_size)
    return _flip(example) if rng.random() < 0.5 else example


def zoom_flip(example, rng, image_size):
    """A random part, 60 to 100 % of the area, resized; half of them mirrored.

    For fine-tuning on few pictures, in which the smallest thing counts.
    """
    return imagenet(example, rng, image_size, least=0.6)


def resize_center(example, rng=None, image_size=None):
    """The shorter side becomes image_size / 0.875; then the central square."""
    del rng
    height, width = example["image"].shape[:2]
    scale = image_size / 0.875 / min(height, width)
    example = _resize(example, round(height * scale), round(width * scale))
    height, width = example["image"].shape[:2]
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return _window(example, top, left, image_size, image_size)


AUGMENTATIONS = {f.__name__: f for f in (none, shift, crop_flip, imagenet, zoom_flip)}
EVAL_TRANSFORMS = {f.__name__: f for f in (none, resize_center)}


def choose(table, name, image_size):
    """Returns example, rng -> example of a checked size."""
    if name not in table:
        raise ValueError(f"no transform {name!r}; choose one of {', '.join(table)}")
    if image_size is None and name in ("imagenet", "zoom_flip", "resize_center"):
        raise ValueError(f"transform {name!r} needs an image_size")
    return functools.partial(_transform, table[name], image_size)


def _draw_label(example, rng):
    """One of an example's labels, with equal chances; as it is without any."""
    there = np.flatnonzero(example["positives"])
    return {**example, "label": np.int32(rng.choice(there))} if there.size else example


def _transform(fn, image_size, example, rng=None):
    out = fn(example, rng, image_size)
    if rng is not None and "positives" in out:
        out = _draw_label(out, rng)
    shape = out["image"].shape
    if image_size is not None and shape != (image_size, image_size, 3):
        raise DatasetError(
            f"an image of {shape[0]} x {shape[1]} left transform {fn.__name__!r}, not "
            f"{image_size} x {image_size}; choose 'imagenet' to train, "
            "'resize_center' to evaluate"
        )
    return out
