"""Handwritten digits on photographs: a tfds builder without download or TensorFlow.

Digits are scikit-learn's `load_digits` (8 x 8, written by hand); backgrounds are
crops of ten photographs inside the scikit-image and scikit-learn packages. A split
owns its digit samples and a vertical strip of every photograph, so no pixel of a
test image occurs in a training image.
"""

import dataclasses
import functools

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import photos

# Photo i is the one that class i prefers under `shortcut`.
PHOTOS = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "rocket.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "ihc.png"),
    ("skimage.data", "retina.jpg"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
)
SHORTCUT_PROBABILITY = 0.9


@dataclasses.dataclass(kw_only=True)
class PhotoDigitsConfig(photos.PhotoConfig):
    """What to generate: the fields of `PhotoConfig` and one more.

    Attributes:
      background: "independent" (any photo behind any class) or "shortcut" (in train
        a class has its own photo with probability 0.9, else one of the other nine;
        validation and test are independent).
    """

    background: str = "independent"


def make_config(background: str = "independent", **options) -> PhotoDigitsConfig:
    """Returns the config for a background and options; see `photos.make_config`."""
    return photos.make_config(Builder, background, options)


class Builder(photos.PhotoBuilder):
    """Builder of `photo_digits`; prepare it with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        PhotoDigitsConfig(name="independent", description="Photo independent of class"),
        PhotoDigitsConfig(
            name="shortcut", background="shortcut", description="Photo tells the class"
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.make_info(
            "Handwritten digits on crops of photographs.",
            tfds.features.ClassLabel(num_classes=10),
            photo=np.int64,
            digit=np.int64,
        )

    def make_example(self, split, index):
        return generate_example(self.builder_config, split, index)


def generate_example(config: PhotoDigitsConfig, split: str, index: int) -> dict:
    """One example, a function of (config.seed, split, index) alone.

    Returns:
      Dict of `photos.encode_example` with label, photo (position in `PHOTOS`) and
      digit (row of `load_digits`).
    """
    rng = photos.example_rng(config.seed, split, index)
    label = int(rng.integers(10))
    photo = int(rng.integers(len(PHOTOS)))
    if config.background == "shortcut" and split == "train":
        others = (label + rng.integers(1, len(PHOTOS))) % len(PHOTOS)
        photo = label if rng.random() < SHORTCUT_PROBABILITY else int(others)
    digit = int(rng.choice(digit_indices(config.seed, split)[label]))

    strip = photos.open_strip(*PHOTOS[photo], split)
    image = photos.draw_background(rng, strip, config.image_size)
    alpha = _draw_digit(rng, digit, config.image_size)
    image = _blend(rng, image, alpha)
    return photos.encode_example(image, alpha, label=label, photo=photo, digit=digit)


@functools.cache
def open_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images float [1797, 8, 8] in [0, 16] and their classes [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@functools.cache
def digit_indices(seed: int, split: str) -> tuple[np.ndarray, ...]:
    """Rows of `load_digits` that belong to `split`, per class; disjoint over splits."""
    _, labels = open_digits()
    order = np.random.default_rng(seed).permutation(len(labels))
    lo, hi = (round(share * len(order)) for share in photos.SHARES[split])
    mine = order[lo:hi]
    return tuple(mine[labels[mine] == c] for c in range(10))


def _draw_digit(rng, digit, size):
    """Opacity [size, size] in [0, 1] of the digit at a random size and place."""
    pixels = open_digits()[0][digit]
    ink = pixels > 4
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels = np.pad(pixels, 1)  # soft edges
    height, width = pixels.shape
    # The strokes fill `height - 2` of the padded height.
    scale = rng.uniform(14, 30) / 48 * size / (height - 2)
    stretch = rng.uniform(0.8, 1.25)
    shape = [round(width * scale * stretch), round(height * scale)]
    glyph = Image.fromarray(pixels.astype(np.float32) / 16)
    glyph = np.asarray(glyph.resize([min(s, size) for s in shape], Image.BICUBIC))
    # Steeper than the scan, so that strokes are solid and edges still smooth.
    glyph = np.clip(2 * glyph - 0.5, 0, 1)
    alpha = np.zeros((size, size), np.float32)
    y, x = (int(rng.integers(0, size - s + 1)) for s in glyph.shape)
    alpha[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph
    return alpha


def _blend(rng, image, alpha):
    """Paints `alpha` in a random colour lighter or darker than what it covers."""
    covered = (image * alpha[..., None]).sum() / (3 * alpha.sum())
    contrast = rng.uniform(90, 200)
    lighter = rng.random() < 0.5
    if contrast > min(covered, 255 - covered):  # one side, at least, lacks the room
        lighter = covered < 128
    level = covered + contrast if lighter else covered - contrast
    level = min(max(level, 0), 255)
    colour = level + rng.uniform(-60, 60, 3)
    alpha = alpha[..., None]
    return np.clip((1 - alpha) * image + alpha * colour, 0, 255).astype(np.uint8)
