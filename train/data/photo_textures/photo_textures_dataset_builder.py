"""Patches of real materials on photographs: a tfds builder without download.

A smooth random shape, the same for all classes, is cut out of a picture of a material
and pasted on a crop of a photograph; the class is the material. Patches are grey, of
random brightness, contrast and tint, turned and mirrored, so that only the texture
tells the class. All pictures lie inside the scikit-image and scikit-learn packages; a
split owns a vertical strip of each.
"""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from train.data import photos

# Position is the label: file and pixels of it per 1/48 of the image, so that a patch
# shows enough of the material to know it by.
TEXTURES = {
    "brick": ("brick.png", 2.4),
    "grass": ("grass.png", 2.2),
    "gravel": ("gravel.png", 1.2),
    "tissue": ("ihc.png", 2.6),
    "galaxies": ("hubble_deep_field.jpg", 2.4),
    "cell": ("cell.png", 1.0),
    "print": ("page.png", 1.5),
    "handwriting": ("text.png", 1.2),
}
# None of them shows one of the materials alone, and each stands behind any class.
PHOTOS = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "rocket.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
)
AREA = (0.08, 0.15)  # of the shape, as a share of the image
ZOOM = (0.9, 1.1)  # of a material, either way
BRIGHTNESS = (100.0, 155.0)  # mean over the shape
CONTRAST = (45.0, 65.0)  # standard deviation over the shape
TINT = 15.0  # largest shift of a channel
TURN = 15.0  # degrees, either way
_SUPERSAMPLE = 4


def make_config(name: str = "independent", **options) -> photos.PhotoConfig:
    """Returns the config for some options; see `photos.make_config`."""
    return photos.make_config(Builder, name, options)


class Builder(photos.PhotoBuilder):
    """Builder of `photo_textures`; prepare it with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        photos.PhotoConfig(name="independent", description="Photo independent of class")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.make_info(
            "Patches of materials on crops of photographs.",
            tfds.features.ClassLabel(names=list(TEXTURES)),
            photo=np.int64,
        )

    def make_example(self, split, index):
        return generate_example(self.builder_config, split, index)


def generate_example(config: photos.PhotoConfig, split: str, index: int) -> dict:
    """One example, a function of (config.seed, split, index) alone.

    Returns:
      Dict of `photos.encode_example` with label (position in `TEXTURES`) and photo
      (position in `PHOTOS`).
    """
    rng = photos.example_rng(config.seed, split, index)
    label = int(rng.integers(len(TEXTURES)))
    photo = int(rng.integers(len(PHOTOS)))
    strip = photos.open_strip(*PHOTOS[photo], split)
    image = photos.draw_background(rng, strip, config.image_size)
    alpha = _draw_shape(rng, config.image_size)
    name, texels = list(TEXTURES.values())[label]
    picture, _ = photos.open_strip("skimage.data", name, split)
    texture = _draw_texture(rng, picture.convert("L"), texels, alpha)
    image = (1 - alpha[..., None]) * image + alpha[..., None] * texture
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return photos.encode_example(image, alpha, label=label, photo=photo)


def _draw_shape(rng, size):
    """Opacity [size, size] in [0, 1] of a blob: a stretched and dented circle."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radius = np.ones_like(angle)
    for frequency in range(2, 6):
        wave = np.cos(frequency * angle + rng.uniform(0, 2 * np.pi))
        radius += rng.uniform(0, 0.3) / frequency * wave
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    area = 0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))
    scale = size * np.sqrt(rng.uniform(*AREA) / area)
    corners = []
    for values in (scale * x, scale * y):
        low, high = values.min(), values.max()
        corners.append(values - low + rng.uniform(0, max(size - (high - low), 0)))
    canvas = Image.new("L", (size * _SUPERSAMPLE,) * 2)
    outline = (_SUPERSAMPLE * np.stack(corners, 1)).ravel().tolist()
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    return np.asarray(canvas.resize((size, size), Image.BOX), np.float32) / 255


def _draw_texture(rng, picture, texels, alpha):
    """A turned, mirrored part of the picture under the shape, in a random colour."""
    size = len(alpha)
    rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
    height, width = (s[-1] + 1 - s[0] for s in (rows, columns))
    inside = alpha[rows[0] : rows[0] + height, columns[0] : columns[0] + width]
    # A square that, turned, still covers the shape's box.
    turn = np.radians(TURN)
    side = int(np.ceil(max(height, width) * (np.cos(turn) + np.sin(turn)))) + 2
    length = min(texels * rng.uniform(*ZOOM) * 48 / size * side, *picture.size)
    # Of a few places the one that shows most: materials have blank parts.
    patches = [photos.crop_square(rng, picture, length, side) for _ in range(3)]
    patch = max(patches, key=lambda p: np.asarray(p, np.float32).std())
    patch = patch.rotate(rng.uniform(-TURN, TURN), Image.BICUBIC)
    top, left = (side - height) // 2, (side - width) // 2
    grey = np.asarray(patch, np.float32)[top : top + height, left : left + width]
    if rng.random() < 0.5:
        grey = grey[:, ::-1]

    mean = np.average(grey, weights=inside)
    deviation = np.sqrt(np.average((grey - mean) ** 2, weights=inside))
    grey = (grey - mean) / max(deviation, 1.0)
    grey = rng.uniform(*BRIGHTNESS) + rng.uniform(*CONTRAST) * np.clip(grey, -2.5, 2.5)
    colour = np.zeros((size, size, 3), np.float32)
    colour[rows[0] : rows[0] + height, columns[0] : columns[0] + width] = grey[
        ..., None
    ] + rng.uniform(-TINT, TINT, 3)
    return colour
