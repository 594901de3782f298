"""Pictures on disk, decoded small and once: upright 8-bit RGB with their masks.

A photograph of 12 megapixels takes a tenth of a second to decode and 36 MB; what a
network sees of it is 256 pixels. So each picture is decoded at a reduced scale, resized
and kept as an array in a cache folder; a second run, or a second epoch, reads that.

A picture's file in the cache is named by its path, size and time stamp and by the size
it was reduced to, and is written whole or not at all: two runs may share a cache.
"""

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibsgl_jax import images
from train.data import similar
from train.files import cache_folder

# Part of every name in the cache: another way of reading makes another file.
VERSION = 2
# Resized for "crop", a picture is at most this many times as long as wide; the rest
# could never be seen at evaluation, and a panorama would fill the memory.
MAX_ASPECT = 3.0
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Facts(NamedTuple):
    """What is known of a picture that was read.

    Attributes:
      digest: of the file's content, hexadecimal.
      hash: `similar.perceptual_hash`, or None where imagehash is not installed.
      size: (width, height) of the upright picture, before it was reduced.
      warning: what looks wrong with it, in one line; "" for nothing.
    """

    digest: str
    hash: str | None
    size: tuple[int, int]
    warning: str = ""


def upright_size(path) -> tuple[int, int]:
    """(width, height) from a file's header, as the picture stands upright.

    Raises:
      images.ImageError: one line that says what is wrong with the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Of a TIFF it depends on Pillow's version whether it is turned already.
            is_known = image.format != "TIFF" or not _is_turned(image)
            if is_known and image.width * image.height <= images.MAX_PIXELS:
                return _upright(image)
    except Exception:  # whatever it is, `read` names it
        pass
    return images.read(path).size


def _upright(image):
    width, height = image.size
    return (height, width) if _is_turned(image) else (width, height)


def _is_turned(image):
    return image.getexif().get(0x0112) in TURNED


def read_small(path, least: int, warn_fn=lambda line: None):
    """As `images.read`, but a JPEG file is decoded at a reduced scale.

    Args:
      path: of the file.
      least: the shorter side keeps at least this many pixels, where it has them.
      warn_fn: as of `images.read`.

    Returns:
      RGB `PIL.Image` and the (width, height) that it has in full.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            if is_jpeg and image.width * image.height <= images.MAX_PIXELS:
                full = _upright(image)
                image.draft(None, (least, least))
                return ImageOps.exif_transpose(image).convert("RGB"), full
    except Exception:  # whatever it is, `read` names it
        pass
    image = images.read(path, warn_fn=warn_fn)
    return image, image.size


def read_mask(path) -> np.ndarray:
    """A mask as bool [H, W]: True where the object is.

    The object is what is not zero; in a JPEG file, which blurs, what is above half; in
    a picture whose transparency varies, what is opaque.

    Raises:
      images.ImageError: one line that says what is wrong with the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(images.source(path)) as image:
            least = 127 if image.format in ("JPEG", "MPO") else 0
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA"):
                alpha = np.asarray(image.getchannel("A"))
                if alpha.min() < alpha.max():
                    return alpha > 127
                image = image.convert("RGB")
            values = np.asarray(image)  # of a palette the indices
    except OSError as error:
        images.read(path)  # names a missing, empty or damaged file
        raise images.ImageError(f"{path}: damaged mask ({error})") from None
    if values.ndim == 3:
        values = values.max(axis=-1)
    return values > least


def kept_part(size, fit) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what is kept of a picture, as shares of its sides.

    Everything, but for "crop" the middle of one longer than MAX_ASPECT times its width.
    """
    width, height = size
    if fit == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    across = min(1.0, MAX_ASPECT * height / width)
    down = min(1.0, MAX_ASPECT * width / height)
    return (
        (1 - across) / 2,
        (1 - down) / 2,
        (1 + across) / 2,
        (1 + down) / 2,
    )


def reduce(image, mask, *, side: int, fit: str) -> np.ndarray:
    """A picture as it is kept: uint8 [h, w, 3], or 4 channels with the mask (0, 1).

    Args:
      image: RGB `PIL.Image`.
      mask: bool array of any size over the same picture, or None.
      side: pixels; "squash" makes side x side, whatever the aspect, "crop" keeps the
        aspect and makes the shorter side so long, unless it is shorter already.
      fit: "crop" or "squash".
    """
    from PIL import Image

    part = kept_part(image.size, fit)
    width = image.width * (part[2] - part[0])
    height = image.height * (part[3] - part[1])
    if fit == "squash":
        size = (side, side)
    else:
        scale = min(1.0, side / min(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))

    def resized(picture, how):
        box = tuple(part[i] * picture.size[i % 2] for i in range(4))
        return np.asarray(picture.resize(size, how, box=box, reducing_gap=2.0))

    pixels = resized(image, Image.Resampling.BICUBIC)
    if mask is None:
        return pixels
    share = resized(Image.fromarray(mask.astype(np.uint8) * 255), Image.Resampling.BOX)
    inside = share >= 128
    if not inside.any():  # an object smaller than a pixel is still there
        inside = share > 0
    return np.dstack([pixels, inside.astype(np.uint8)])


def move_box(box, size, fit) -> np.ndarray:
    """A box in shares of the picture -> float32 [4] in shares of its kept part."""
    left, top, right, bottom = kept_part(size, fit)
    ymin, xmin, ymax, xmax = box
    moved = (
        (ymin - top) / (bottom - top),
        (xmin - left) / (right - left),
        (ymax - top) / (bottom - top),
        (xmax - left) / (right - left),
    )
    return np.clip(np.array(moved, np.float32), 0, 1)


def default_folder() -> Path:
    """Where pictures are cached unless another folder is named."""
    return cache_folder("pictures")


class Reader:
    """Reads pictures through a cache on disk.

    Args:
      side, fit: as in `reduce`.
      folder: of the cache, made when needed; None to decode at every use.

    Attributes:
      keeps: whether what is read is kept in the cache.
      failure: why the cache took no more, or None.
    """

    def __init__(self, *, side: int, fit: str = "crop", folder=None):
        if fit not in images.FITS:
            raise ValueError(f"fit={fit!r}: choose one of {', '.join(images.FITS)}")
        self.side, self.fit = side, fit
        self.folder = None if folder is None else Path(folder)
        self.keeps, self.failure = True, None

    def facts(self, path, mask=None) -> Facts | None:
        """What an earlier reading found, None if there was none."""
        place = self.place(path, mask)
        try:
            found = json.loads(place.with_suffix(".json").read_text())
            if found["hash"] is None and similar.is_available():
                return None
            if not place.with_suffix(".npy").exists():
                return None
            return Facts(**{**found, "size": tuple(found["size"])})
        except (AttributeError, OSError, ValueError, KeyError, TypeError):
            return None

    def prepare(self, path, mask=None) -> Facts:
        """Read a picture into the cache, unless it is there.

        A cache that takes no more is left as it is: see `failure`.

        Raises:
          images.ImageError: one line that says what is wrong with the file.
        """
        known = self.facts(path, mask)
        if known:
            return known
        place = self.place(path, mask)
        told = []
        pixels, size, image = self._decode(path, mask, told.append)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise images.ImageError(f"{path}: {error.strerror}") from None
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        hashed = similar.perceptual_hash(image) if similar.is_available() else None
        facts = Facts(digest, hashed, size, "; ".join(told))
        if place and self.keeps and not self.failure:
            array = io.BytesIO()
            np.save(array, pixels)
            try:
                _write(place.with_suffix(".npy"), array.getvalue())
                _write(place.with_suffix(".json"), json.dumps(facts._asdict()).encode())
            except OSError as error:
                self.failure = error.strerror or str(error)
        return facts

    def read(self, path, mask=None, *, place=None) -> np.ndarray:
        """A picture as `reduce` makes it.

        Args:
          path, mask: files; not looked at if the cache has the picture.
          place: what `place` returned when the run began.
        """
        if place:
            try:
                return np.load(place.with_suffix(".npy"), allow_pickle=False)
            except (OSError, ValueError, EOFError):  # not there, or damaged
                pass
        return self._decode(path, mask)[0]

    def _decode(self, path, mask, warn_fn=lambda line: None):
        image, size = read_small(path, 2 * self.side, warn_fn)
        object_ = None if mask is None else read_mask(mask)
        return reduce(image, object_, side=self.side, fit=self.fit), size, image

    def place(self, path, mask=None) -> Path | None:
        """Path in the cache without its suffix; None without a cache or a file."""
        if self.folder is None:
            return None
        parts = [VERSION, self.side, self.fit]
        for file in filter(None, (path, mask)):
            try:
                stat = os.stat(file)
            except OSError:
                return None
            parts += [os.path.abspath(file), stat.st_size, stat.st_mtime_ns]
        text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
        name = hashlib.blake2b(text, digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]


def _write(path: Path, content: bytes) -> None:
    """A whole file or none, also beside another process that writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
