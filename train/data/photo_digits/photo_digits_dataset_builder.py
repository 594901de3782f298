"""Handwritten digits on photographs: a tfds builder without download or TensorFlow.

Digits are scikit-learn's `load_digits` (8 x 8, written by hand); backgrounds are
crops of ten photographs inside the scikit-image and scikit-learn packages. A split
owns its digit samples and a vertical strip of every photograph, so no pixel of a
test image occurs in a training image. May import tfds, PIL, sklearn and skimage.
"""

import dataclasses
import functools
import importlib.resources
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

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
# Share of a photo's width, and of the digit samples, that each split owns.
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
SHORTCUT_PROBABILITY = 0.9
# The options of `make_config`, with the smallest value of each.
_LEAST = {
    "image_size": 32,
    "num_train": 1,
    "num_validation": 1,
    "num_test": 1,
    "seed": 0,
}


@dataclasses.dataclass(kw_only=True)
class PhotoDigitsConfig(tfds.core.BuilderConfig):
    """What to generate; `make_config` gives every choice a name of its own.

    Attributes:
      background: "independent" (any photo behind any class) or "shortcut" (in train
        a class has its own photo with probability 0.9, else one of the other nine;
        validation and test are independent).
      image_size: side of the square images, in pixels.
      num_train, num_validation, num_test: examples per split. A smaller split is the
        beginning of the larger one.
      seed: of everything random.
    """

    background: str = "independent"
    image_size: int = 48
    num_train: int = 10_000
    num_validation: int = 2_000
    num_test: int = 2_000
    seed: int = 0


def make_config(background: str = "independent", **options) -> PhotoDigitsConfig:
    """Returns the config for `options`, named so that prepared data never mix.

    Args:
      background: "independent" or "shortcut".
      **options: other fields of `PhotoDigitsConfig`. Those that differ from the
        default become part of the name, as in "shortcut_image_size64".

    Raises:
      ValueError: for an unknown background or option, or a size out of range.
    """
    if background not in ("independent", "shortcut"):
        raise ValueError(
            f"photo_digits has no config {background!r}; "
            "choose 'independent' or 'shortcut'"
        )
    defaults = {c.name: c for c in Builder.BUILDER_CONFIGS}
    changed = {}
    for name, value in options.items():
        if name not in _LEAST:
            raise ValueError(
                f"photo_digits has no option {name!r}; it has {', '.join(_LEAST)}"
            )
        if not isinstance(value, int) or value < _LEAST[name]:
            raise ValueError(
                f"photo_digits: {name} is {value!r}; "
                f"give an integer of at least {_LEAST[name]}"
            )
        if value != getattr(PhotoDigitsConfig, name):
            changed[name] = value
    if not changed:
        return defaults[background]
    name = "_".join([background, *(f"{k}{v}" for k, v in sorted(changed.items()))])
    return PhotoDigitsConfig(name=name, background=background, **changed)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builder of `photo_digits`; prepare it with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        PhotoDigitsConfig(name="independent", description="Photo independent of class"),
        PhotoDigitsConfig(
            name="shortcut", background="shortcut", description="Photo tells the class"
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return self.dataset_info_from_configs(
            description="Handwritten digits on crops of photographs.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(size, size, 3), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "bbox": tfds.features.BBoxFeature(),
                    "mask": tfds.features.Image(
                        shape=(size, size, 1), encoding_format="png"
                    ),
                    "photo": np.int64,
                    "digit": np.int64,
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in SHARES}

    def _generate_examples(self, split):
        for index in range(getattr(self.builder_config, f"num_{split}")):
            yield index, generate_example(self.builder_config, split, index)


def generate_example(config: PhotoDigitsConfig, split: str, index: int) -> dict:
    """One example, a function of (config.seed, split, index) alone.

    Returns:
      Dict of image and mask (PNG bytes), bbox (the mask's tight box, in [0, 1]),
      label, photo (position in `PHOTOS`) and digit (row of `load_digits`).
    """
    rng = np.random.default_rng([config.seed, list(SHARES).index(split), index])
    label = int(rng.integers(10))
    photo = int(rng.integers(len(PHOTOS)))
    if config.background == "shortcut" and split == "train":
        others = (label + rng.integers(1, len(PHOTOS))) % len(PHOTOS)
        photo = label if rng.random() < SHORTCUT_PROBABILITY else int(others)
    digit = int(rng.choice(digit_indices(config.seed, split)[label]))

    image = _draw_background(rng, photo_strip(photo, split), config.image_size)
    alpha = _draw_digit(rng, digit, config.image_size)
    image = _blend(rng, image, alpha)
    mask = alpha > 0.5
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    return {
        "image": _encode_png(image),
        "label": label,
        "bbox": tfds.features.BBox(*(box / config.image_size).tolist()),
        "mask": _encode_png(255 * mask.astype(np.uint8)),
        "photo": photo,
        "digit": digit,
    }


@functools.cache
def _load_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@functools.cache
def digit_indices(seed: int, split: str) -> tuple[np.ndarray, ...]:
    """Rows of `load_digits` that belong to `split`, per class; disjoint over splits."""
    _, labels = _load_digits()
    order = np.random.default_rng(seed).permutation(len(labels))
    lo, hi = (round(share * len(order)) for share in SHARES[split])
    mine = order[lo:hi]
    return tuple(mine[labels[mine] == c] for c in range(10))


def strip_box(size: tuple[int, int], split: str) -> tuple[int, int, int, int]:
    """Pixels (x0, y0, x1, y1) of a photo of `size` (width, height) for `split`."""
    width, height = size
    lo, hi = (round(share * width) for share in SHARES[split])
    return lo, 0, hi, height


@functools.cache
def photo_strip(photo: int, split: str) -> tuple[Image.Image, int]:
    """The part of a photo that `split` may use, and the whole photo's width."""
    package, name = PHOTOS[photo]
    # The packaged file itself: skimage.data's functions may start a download.
    with (importlib.resources.files(package) / name).open("rb") as file:
        image = Image.open(file).convert("RGB")
    if name == "retina.jpg":  # the square inside the disc, without its black corners
        margin = round(0.15 * image.width)
        image = image.crop((margin, margin, *(s - margin for s in image.size)))
    return image.crop(strip_box(image.size, split)), image.width


def _draw_background(rng, strip, size):
    """A random crop of the strip, 10 to 20 % of the photo's width wide."""
    image, width = strip
    side = min(rng.uniform(0.1, 0.2) * width, *image.size)
    x, y = (rng.uniform(0, s - side) for s in image.size)
    crop = image.resize((size, size), Image.BILINEAR, box=(x, y, x + side, y + side))
    return np.asarray(crop, np.float32)


def _draw_digit(rng, digit, size):
    """Opacity [size, size] in [0, 1] of the digit at a random size and place."""
    pixels = _load_digits()[0][digit]
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


def _encode_png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
