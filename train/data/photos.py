"""What the embedded data sets share: an object of ours on a crop of a photograph.

A split owns a vertical strip of every picture, so no pixel of a test image occurs in a
training image. The pictures lie in installed packages.
"""

import dataclasses
import functools
import importlib.resources
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.errors import DatasetError

# Share of a picture's width that each split owns.
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
# The options of `make_config`, with the smallest value of each.
_LEAST = {
    "image_size": 32,
    "num_train": 1,
    "num_validation": 1,
    "num_test": 1,
    "seed": 0,
}


@dataclasses.dataclass(kw_only=True)
class PhotoConfig(tfds.core.BuilderConfig):
    """What to generate; `make_config` gives every choice a name of its own.

    Attributes:
      image_size: side of the square images, in pixels.
      num_train, num_validation, num_test: examples per split. A smaller split is the
        beginning of the larger one.
      seed: of everything random.
    """

    image_size: int = 48
    num_train: int = 10_000
    num_validation: int = 2_000
    num_test: int = 2_000
    seed: int = 0


def make_config(builder_class, name: str, options: dict) -> PhotoConfig:
    """Returns the builder's config for `options`, named so that data never mix.

    Args:
      builder_class: a `PhotoBuilder`.
      name: of one of its BUILDER_CONFIGS.
      options: fields of `PhotoConfig`. Those that differ from the default become part
        of the name, as in "shortcut_image_size64".

    Raises:
      DatasetError: for an unknown name or option, or a size out of range.
    """
    known = {config.name: config for config in builder_class.BUILDER_CONFIGS}
    if name not in known:
        raise DatasetError(
            f"{builder_class.name} has no config {name!r}; "
            f"choose {' or '.join(map(repr, known))}"
        )
    changed = {}
    for option, value in options.items():
        if option not in _LEAST:
            raise DatasetError(
                f"{builder_class.name} has no option {option!r}; "
                f"it has {', '.join(_LEAST)}"
            )
        if not isinstance(value, int) or value < _LEAST[option]:
            raise DatasetError(
                f"{builder_class.name}: {option} is {value!r}; "
                f"give an integer of at least {_LEAST[option]}"
            )
        if value != getattr(known[name], option):
            changed[option] = value
    if not changed:
        return known[name]
    full_name = "_".join([name, *(f"{k}{v}" for k, v in sorted(changed.items()))])
    return dataclasses.replace(known[name], name=full_name, **changed)


class PhotoBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of `SPLITS`; a subclass gives `make_example`, and may have more."""

    SPLITS = tuple(SHARES)

    def make_example(self, split: str, index: int) -> dict:
        """One example, a function of the config's seed, split and index alone."""
        raise NotImplementedError

    def make_info(self, description: str, label, **ids) -> tfds.core.DatasetInfo:
        """The info of examples of `encode_example`, with the features of their rest."""
        size = self.builder_config.image_size
        image, mask = (
            tfds.features.Image(shape=(size, size, channels), encoding_format="png")
            for channels in (3, 1)
        )
        return self.dataset_info_from_configs(
            description=description,
            features=tfds.features.FeaturesDict(
                {
                    "image": image,
                    "label": label,
                    "bbox": tfds.features.BBoxFeature(),
                    "mask": mask,
                    **ids,
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for index in range(getattr(self.builder_config, f"num_{split}")):
            yield index, self.make_example(split, index)


def example_rng(seed: int, split: str, index: int, *, splits=tuple(SHARES)):
    """The `np.random.Generator` of one example; `splits` are all of its data set."""
    return np.random.default_rng([seed, splits.index(split), index])


def strip_box(size: tuple[int, int], split: str) -> tuple[int, int, int, int]:
    """Pixels (x0, y0, x1, y1) of a picture of `size` (width, height) for `split`."""
    width, height = size
    lo, hi = (round(share * width) for share in SHARES[split])
    return lo, 0, hi, height


@functools.cache
def open_strip(package: str, name: str, split: str) -> tuple[Image.Image, int]:
    """The part of a picture that `split` may use, and the whole picture's width."""
    # The packaged file itself: skimage.data's functions may start a download.
    with (importlib.resources.files(package) / name).open("rb") as file:
        image = Image.open(file).convert("RGB")
    if name == "retina.jpg":  # the square inside the disc, without its black corners
        margin = round(0.15 * image.width)
        image = image.crop((margin, margin, *(s - margin for s in image.size)))
    return image.crop(strip_box(image.size, split)), image.width


def crop_square(rng, image: Image.Image, side: float, size: int) -> Image.Image:
    """A square of `side` pixels at a random place, resized to `size` x `size`."""
    x, y = (rng.uniform(0, s - side) for s in image.size)
    return image.resize((size, size), Image.BILINEAR, box=(x, y, x + side, y + side))


def draw_background(rng, strip: tuple[Image.Image, int], size: int) -> np.ndarray:
    """A random crop of the strip, 10 to 20 % of the photo's width wide."""
    image, width = strip
    side = min(rng.uniform(0.1, 0.2) * width, *image.size)
    return np.asarray(crop_square(rng, image, side, size), np.float32)


def encode_example(image: np.ndarray, alpha: np.ndarray, **rest) -> dict:
    """The record of an image [size, size, 3] uint8 and the opacity of its object.

    Returns:
      Dict of image and mask (PNG bytes), bbox (the mask's tight box, in [0, 1]) and
      the rest as it is.
    """
    mask = alpha > 0.5
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    return {
        "image": _encode_png(image),
        "bbox": tfds.features.BBox(*(box / len(mask)).tolist()),
        "mask": _encode_png(255 * mask.astype(np.uint8)),
        **rest,
    }


def _encode_png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
