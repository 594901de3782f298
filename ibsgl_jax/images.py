"""Photos as arrays for a model: read any format, prepare as the model takes them.

Does I/O; needs pillow.
"""

import io
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibsgl_jax.errors import UserError

# Decoded, this many pixels are 400 MB; larger ones are refused before decoding.
MAX_PIXELS = 100_000_000
FITS = ("crop", "squash")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # what it begins with
# Formats whose reader runs another program or decodes nothing by itself.
_LEFT_TO_OTHERS = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")


class ImageError(UserError):
    """A photo that cannot be read, in one line."""


class Photo(NamedTuple):
    """A photo made ready for a model.

    Attributes:
      pixels: float32 [size, size, 3], preprocessed.
      view: uint8 [H, W, 3], the part of the photo that the model sees, for display.
      box: (left, top, right, bottom) of that part, in pixels of the upright photo.
      size: (width, height) of the upright photo.
    """

    pixels: np.ndarray
    view: np.ndarray
    box: tuple[float, float, float, float]
    size: tuple[int, int]


def formats() -> list[str]:
    """Pillow's formats that are read: all but those it hands to another program."""
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name not in _LEFT_TO_OTHERS]


def source(path):
    """What Pillow opens of a file: its path, or all of it if it is a TIFF.

    Turned by its EXIF orientation, a TIFF that Pillow maps into memory comes out wrong.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        return io.BytesIO(start + file.read()) if start in _TIFF else path


def read(
    path,
    *,
    data: bytes | None = None,
    warn_fn: Callable[[str], None] = lambda line: None,
):
    """A photo as an upright 8-bit RGB ``PIL.Image``, whatever its format.

    Transparency is laid on white; 16-bit values are divided by 257; floating-point
    images must be in [0, 1]; of an animation the first frame counts.

    Args:
      path: the file, or where ``data`` came from.
      data: the file's contents, if they are at hand.
      warn_fn: called with one line for each thing that was read but looks wrong: a
        16-bit picture that holds fewer bits, pixels that are NaN.

    Raises:
      ImageError: one line that says what is wrong with the file.
    """
    from PIL import Image, UnidentifiedImageError

    def warn(line):
        warn_fn(f"{path}: {line}")

    try:
        if data is None and not stat.S_ISREG(Path(path).stat().st_mode):
            kind = "a folder" if Path(path).is_dir() else "no regular file"
            raise ImageError(f"{path}: is {kind}")
        with warnings.catch_warnings():
            # Pillow's own warnings about large or odd files: we refuse or read them.
            warnings.simplefilter("ignore")
            file = source(path) if data is None else io.BytesIO(data)
            with Image.open(file, formats=formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(_too_large(path, image.size))
                is_deep = ";16" in str(getattr(image, "tile", ""))
                image.load()
                return _to_rgb(path, _upright(image, warn), is_deep, warn)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except UnidentifiedImageError:
        empty = not data if data is not None else Path(path).stat().st_size == 0
        cause = "the file is empty" if empty else "not an image, whatever its name says"
        raise ImageError(f"{path}: {cause}") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(path)) from None
    except MemoryError:
        raise ImageError(f"{path}: decoding it takes more memory than there is") from (
            None
        )
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the decoder
            raise ImageError(f"{path}: {error.strerror}") from None
        raise ImageError(_damaged(path, error)) from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, ...
        raise ImageError(_damaged(path, error)) from None


def _damaged(path, error) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    return f"{path}: damaged image, or of a kind that Pillow cannot convert ({cause})"


def _too_large(path, size=None):
    found = f"{size[0]} x {size[1]} pixels" if size else "too many pixels"
    return (
        f"{path}: {found}; at most {MAX_PIXELS // 1_000_000} million are read, "
        "make it smaller first"
    )


def _upright(image, warn):
    """As the camera was held; a photo with a damaged EXIF block stays as it is."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        warn(f"its EXIF block is damaged and not used ({type(error).__name__})")
        return image


def _to_rgb(path, image, is_deep: bool, warn):
    from PIL import Image

    if image.mode.startswith("I"):
        image = _of_integers(path, image, warn)
    elif image.mode == "F":
        image = _of_floats(path, image, warn)
    elif is_deep:  # Pillow keeps the upper 8 of 16 bits
        largest = max(high for _, high in _extrema(image))
        if 0 < largest < 64:
            _warn_dark(256 * largest + 255, warn, "at most ")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _extrema(image):
    """(smallest, largest) of each colour channel, transparency left out."""
    channels = image.convert("RGB") if image.mode != "RGB" else image
    return channels.getextrema()


def _of_integers(path, image, warn):
    """Modes I and I;16 of every byte order, as 16 bits."""
    from PIL import Image

    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise ImageError(
            f"{path}: whole numbers from {low} to {high}; 0 to 65,535 can be read, "
            "scale them first"
        )
    if 0 < high < 16_384:
        _warn_dark(high, warn)
    table = np.clip(np.arange(65_536) / 257, 0, 255).round().astype(np.uint8)
    return Image.fromarray(table[values])


def _warn_dark(largest: int, warn, about: str = "") -> None:
    warn(
        f"16 bits, but its largest value is {about}{largest:,} of 65,535: if it holds "
        "10, 12 or 14 bits it is read too dark, scale it first"
    )


def _of_floats(path, image, warn):
    from PIL import Image

    values = np.array(image)
    missing = np.isnan(values)
    if missing.any():
        count = int(missing.sum())
        if count == values.size:
            raise ImageError(f"{path}: every pixel is NaN")
        warn(f"{count:,} pixels are NaN and read as black")
        values[missing] = 0
    low, high = float(values.min()), float(values.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise ImageError(
            f"{path}: floating-point values from {low:.6g} to {high:.6g}; 0 to 1 can "
            "be read, scale them first"
        )
    np.clip(values, 0, 1, out=values)
    values *= 255
    return Image.fromarray(values.round().astype(np.uint8))


def crop_box(
    size: tuple[int, int], *, share: float, fit: str = "crop"
) -> tuple[float, float, float, float]:
    """The part of a photo that the model sees: (left, top, right, bottom) in pixels.

    Args:
      size: (width, height) of the photo.
      share: side of the central square, as a share of the photo's shorter side.
      fit: "crop" takes that square; "squash" the whole photo, whatever its aspect.
    """
    width, height = size
    if fit == "squash":
        return (0.0, 0.0, float(width), float(height))
    if fit != "crop":
        raise ValueError(f"fit={fit!r}: choose one of {FITS}")
    side = share * min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def prepare(image, preprocessing, *, fit: str = "crop", view_size: int = 480) -> Photo:
    """A photo as the model takes it, and as a person looks at it.

    The same as resizing the shorter side to ``preprocessing.resize`` and cutting out
    the central ``preprocessing.size`` square, but in one step, so that a ribbon of
    1 x 10,000 pixels needs no more memory than another.

    Args:
      image: RGB ``PIL.Image``, from ``read``.
      preprocessing: size, resize, mean and std, as ``pretrained.preprocessing`` gives.
      fit: "crop", or "squash" for the whole photo squeezed into a square.
      view_size: longer side of the view, in pixels.
    """
    from PIL import Image

    size = preprocessing.size
    box = crop_box(image.size, share=size / preprocessing.resize, fit=fit)
    pixels = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(pixels, np.float32) / 255
    pixels = (pixels - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = view_size / max(width, height)
    view = image.resize(
        (max(1, round(width * scale)), max(1, round(height * scale))),
        Image.Resampling.BICUBIC,
        box=box,
    )
    return Photo(pixels, np.asarray(view), box, image.size)
