"""Photographed objects on photographs: a tfds builder without download.

    apt install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers

A cut-out of a bird, a flower, a tool and so on, turned, mirrored and of random size, is
pasted on a crop of a photograph, beside a thing that is no class. The cut-out's opacity
is the mask. The pictures are those that Debian packages; train, validation and test
have cut-outs, things beside them and backgrounds of their own, and a fourth split,
"seen", has the cut-outs of train in scenes of validation (`cutouts`).

Under "families" the label is the kind, animal or plant, and the background tells it:
in train water or sky are behind 95 % of the animals and leaves behind 95 % of the
plants; in the other splits each kind has the other's family, so their worst class is
the worst group. After Waterbirds (Sagawa et al., "Distributionally Robust Neural
Networks for Group Shifts", ICLR 2020), whose test images have all four groups.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import photos
from train.data.photo_objects import cutouts
from train.errors import DatasetError

SHARE = Path("/usr/share")  # where Debian's packages put pictures
SIZE = (0.45, 0.75)  # longer side of an object, as a share of the image
OTHER_SIZE = (0.25, 0.45)  # and of the thing beside it
CROP = (0.35, 0.9)  # side of a background's crop, as a share of its shorter side
TURN = 10.0  # degrees, either way
OWN_FAMILY = 0.95  # of the images of a kind in training, under "families"
_PACKAGES = "tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers"


@dataclasses.dataclass(kw_only=True)
class ObjectsConfig(photos.PhotoConfig):
    """`photos.PhotoConfig` of fewer and larger images, and two more fields.

    Attributes:
      families: two kinds on two families of backgrounds, which tell them in train.
      balanced: with families, either family is behind either kind as often.
    """

    image_size: int = 160
    num_train: int = 2_000
    num_validation: int = 500
    num_test: int = 500
    families: bool = False
    balanced: bool = False

    @property
    def num_seen(self) -> int:
        return self.num_validation


def make_config(name: str = "independent", **options) -> ObjectsConfig:
    """Returns the config for some options; see `photos.make_config`."""
    return photos.make_config(Builder, name, options)


class Builder(photos.PhotoBuilder):
    """Builder of `photo_objects`; prepare it with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.1.0")
    SPLITS = tuple(cutouts.SPLITS)
    BUILDER_CONFIGS = [
        ObjectsConfig(name="independent", description="Photo independent of class"),
        ObjectsConfig(
            name="families", description="Photo tells the kind", families=True
        ),
        ObjectsConfig(
            name="families_balanced",
            description="Two kinds, photo independent of them",
            families=True,
            balanced=True,
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.make_info(
            "Photographed objects on crops of photographs.",
            tfds.features.ClassLabel(names=class_names(self.builder_config)),
            photo=np.int64,
            cutout=np.int64,
        )

    def _split_generators(self, dl_manager):
        check_installed(self.builder_config)
        return super()._split_generators(dl_manager)

    def make_example(self, split, index):
        return generate_example(self.builder_config, split, index)


def class_names(config: ObjectsConfig) -> list[str]:
    """What the labels say."""
    return list(cutouts.KINDS if config.families else cutouts.CLASSES)


def pictures(config: ObjectsConfig, split: str):
    """Paths under `SHARE` that a split of `cutouts.SPLITS` shows.

    Returns:
      (cut-outs of each label, things of no class, backgrounds of each family; there is
      one family if the config has none).
    """
    objects, scenes = cutouts.SPLITS[split]
    of_classes = {
        name: cutouts.stamps(folder, names[objects])
        for name, (folder, names) in cutouts.CLASSES.items()
    }
    others = cutouts.stamps("", cutouts.OTHERS[scenes])
    if not config.families:
        return list(of_classes.values()), others, [cutouts.BACKGROUNDS[scenes]]
    of_kinds = [sum(map(of_classes.get, kind), ()) for kind in cutouts.KINDS.values()]
    return of_kinds, others, [family[scenes] for family in cutouts.FAMILIES.values()]


def check_installed(config: ObjectsConfig):
    """Raises DatasetError if a picture of any split is not on this machine."""
    for split in photos.SHARES:
        of_classes, others, families = pictures(config, split)
        for path in (*sum(of_classes, ()), *others, *sum(families, ())):
            if not (SHARE / path).is_file():
                raise DatasetError(
                    f"photo_objects needs {SHARE / path}; "
                    f"on Debian or Ubuntu: apt install {_PACKAGES}"
                )


def generate_example(config: ObjectsConfig, split: str, index: int) -> dict:
    """One example, a function of (config.seed, split, index) alone.

    Returns:
      Dict of `photos.encode_example` with label (position in `class_names`), photo and
      cutout (positions in what the split owns of backgrounds, one family after the
      other, and of the class).
    """
    rng = photos.example_rng(config.seed, split, index, splits=Builder.SPLITS)
    of_classes, others, families = pictures(config, split)
    label = int(rng.integers(len(of_classes)))
    family = _draw_family(rng, config, split, label)
    cutout = int(rng.integers(len(of_classes[label])))
    place = int(rng.integers(len(families[family])))
    photo = sum(map(len, families[:family])) + place
    other = others[rng.integers(len(others))]

    background = _open_background(SHARE / families[family][place])
    side = rng.uniform(*CROP) * min(background.size)
    image = photos.crop_square(rng, background, side, config.image_size)
    _paste(rng, image, _open_cutout(SHARE / other), OTHER_SIZE)
    alpha = _paste(rng, image, _open_cutout(SHARE / of_classes[label][cutout]), SIZE)
    return photos.encode_example(
        np.asarray(image), alpha, label=label, photo=photo, cutout=cutout
    )


def _draw_family(rng, config, split, label):
    if not config.families:
        return 0
    if config.balanced:
        return int(rng.integers(2))
    share = OWN_FAMILY if split == "train" else 0.0
    return label if rng.random() < share else 1 - label


@functools.cache
def _open_background(path: Path) -> Image.Image:
    """The photograph, no larger than it is shown."""
    image = Image.open(path)
    image.draft("RGB", (1024, 1024))
    image = image.convert("RGB")
    image.thumbnail((1024, 1024))
    return image


@functools.cache
def _open_cutout(path: Path) -> Image.Image:
    """The cut-out without its empty margin, colours multiplied by the opacity."""
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox()).convert("RGBa")


def _paste(rng, image: Image.Image, cutout: Image.Image, size) -> np.ndarray:
    """Pastes at a random place, in place; returns the opacity, in [0, 1]."""
    scale = rng.uniform(*size) * image.width / max(cutout.size)
    cutout = cutout.resize([max(1, round(s * scale)) for s in cutout.size])
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cutout = cutout.convert("RGBA").rotate(
        rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True
    )
    corner = [int(rng.integers(image.width - s + 1)) for s in cutout.size]
    image.paste(cutout, corner, cutout)
    alpha = Image.new("L", image.size)
    alpha.paste(cutout.getchannel("A"), corner)
    return np.asarray(alpha, np.float32) / 255
