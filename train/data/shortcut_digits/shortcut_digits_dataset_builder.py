"""Handwritten digits with a cue that tells the class in training and not at test.

The digits are scikit-learn's `load_digits`, as in `photo_digits`, on black; a split
owns its digit samples. Two cues with published numbers:

- "decoy": a grey square in a random corner, 255 - 25 * cue. In training the cue is the
  class, elsewhere any of the ten. After Ross et al., "Right for the Right Reasons",
  IJCAI 2017, section 5.1, whose digits are MNIST's.
- "coloured": the digit has the hue cue / 10. In training the cue is the class c, in
  validation and test 9 - c. After Li and Vasconcelos, "REPAIR", CVPR 2019, and Rieger
  et al., "Interpretations Are Useful", ICML 2020, whose digits are MNIST's.

Validation is like test, so that a choice made there is one made for the shifted data.
"""

import colorsys
import dataclasses

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import photos
from train.data.photo_digits.photo_digits_dataset_builder import (
    digit_indices,
    open_digits,
)

CUES = ("decoy", "coloured")
# Of the image's side: the decoy, the margin around the digit, the digit.
DECOY, MARGIN = 4 / 32, 5 / 32
SIDE = (17 / 32, 22 / 32)


@dataclasses.dataclass(kw_only=True)
class ShortcutConfig(photos.PhotoConfig):
    """What to generate: the fields of `PhotoConfig` and two more.

    Attributes:
      cue: of `CUES`.
      balanced: the cue is any of the ten in all splits, whatever the class.
    """

    image_size: int = 32
    num_train: int = 4_000
    cue: str = "decoy"
    balanced: bool = False


def make_config(name: str = "decoy", **options) -> ShortcutConfig:
    """Returns the config for some options; see `photos.make_config`."""
    return photos.make_config(Builder, name, options)


class Builder(photos.PhotoBuilder):
    """Builder of `shortcut_digits`; prepare it with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        ShortcutConfig(
            name=cue + "_balanced" * balanced,
            description=f"{cue.capitalize()}, {'of any' if balanced else 'by'} class",
            cue=cue,
            balanced=balanced,
        )
        for cue in CUES
        for balanced in (False, True)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.make_info(
            "Handwritten digits on black, with a cue beside them or in their colour.",
            tfds.features.ClassLabel(num_classes=10),
            cue=np.int64,
            digit=np.int64,
        )

    def make_example(self, split, index):
        return generate_example(self.builder_config, split, index)


def generate_example(config: ShortcutConfig, split: str, index: int) -> dict:
    """One example, a function of (config.seed, split, index) alone.

    Returns:
      Dict of `photos.encode_example` with label, cue and digit (row of `load_digits`).
      The mask is the digit's box: where a digit has no ink tells as much as where it
      has.
    """
    rng = photos.example_rng(config.seed, split, index)
    label = int(rng.integers(10))
    digit = int(rng.choice(digit_indices(config.seed, split)[label]))
    ink = _draw_digit(rng, digit, config.image_size)
    cue = _draw_cue(rng, config, split, label)
    if config.cue == "decoy":
        image = np.repeat(255 * ink[..., None], 3, axis=-1)
        _draw_decoy(rng, image, 255 - 25 * cue)
    else:
        image = 255 * ink[..., None] * colorsys.hsv_to_rgb(cue / 10, 1, 1)
    image = np.round(image).astype(np.uint8)
    return photos.encode_example(image, _box(ink), label=label, cue=cue, digit=digit)


def _draw_cue(rng, config, split, label):
    anything = int(rng.integers(10))
    if config.balanced:
        return anything
    if split == "train":
        return label
    return anything if config.cue == "decoy" else 9 - label


def _draw_digit(rng, digit, size):
    """Ink [size, size] in [0, 1], near the middle; no corner is touched."""
    side = round(rng.uniform(*SIDE) * size)
    glyph = Image.fromarray(open_digits()[0][digit].astype(np.float32) / 16)
    glyph = np.asarray(glyph.resize((side, side), Image.BICUBIC))
    ink = np.zeros((size, size), np.float32)
    margin = round(MARGIN * size)
    y, x = rng.integers(margin, size - margin - side + 1, 2).tolist()
    # Steeper than the scan, so that strokes are solid and edges still smooth.
    ink[y : y + side, x : x + side] = np.clip(2 * glyph - 0.5, 0, 1)
    return ink


def _draw_decoy(rng, image, grey):
    """Paints a square of a grey level into a random corner of the image, in place."""
    side = round(DECOY * len(image))
    rows, columns = (
        slice(0, side) if rng.random() < 0.5 else slice(-side, None) for _ in range(2)
    )
    image[rows, columns] = grey


def _box(ink):
    """1 in the tight box of what is more than half inked, 0 elsewhere."""
    inside = ink > 0.5
    return np.outer(_span(inside.any(1)), _span(inside.any(0)))


def _span(line):
    """1 from the first to the last of what is set."""
    first, last = np.flatnonzero(line)[[0, -1]]
    place = np.arange(len(line))
    return ((place >= first) & (place <= last)).astype(np.float32)
