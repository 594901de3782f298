"""Photos in, overlays out. May do I/O; needs pillow, and matplotlib for drawing."""

import glob
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SUFFIXES = (
    ".jpg .jpeg .jpe .png .gif .bmp .webp .tif .tiff .ppm .pgm .pnm .avif".split()
)
# Decoded, this many pixels are 300 MB; larger ones are refused before decoding.
MAX_PIXELS = 100_000_000
FITS = ("crop", "squash")
COLOUR_MAP = "inferno"
# Values above this quantile share the brightest colour: one hot pixel (common in
# gradients) would otherwise leave the rest of the map dark.
DISPLAY_QUANTILE = 0.995
RELATIVE = f"relative to the map's {100 * DISPLAY_QUANTILE:.1f} % quantile"


class ImageError(ValueError):
    """A photo that cannot be read or a picture that cannot be written, in one line."""


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


def find(arguments: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that arguments name: files, folders and wildcards.

    A folder stands for all images in it, at any depth.

    Returns:
      The paths, without repetition, in the order given (sorted inside a folder), and
      one line for each argument that names nothing.
    """
    paths, failures = [], []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                failures.append(f"{argument}: no images in this folder")
        elif path.exists() or not glob.has_magic(argument):
            # A missing file fails when it is read, in its turn.
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                failures.append(f"{argument}: no file matches")
        paths.extend(found)
    return list(dict.fromkeys(paths)), failures


def read(path):
    """A photo as an upright 8-bit RGB ``PIL.Image``, whatever its format.

    Transparency is laid on white; 16-bit values are divided by 257; floating-point
    images are taken to be in [0, 1]; of an animation the first frame counts.

    Raises:
      ImageError: one line that says what is wrong with the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow's own warnings about large or odd files: we refuse or read them.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                num_pixels = image.width * image.height
                if num_pixels > MAX_PIXELS:
                    raise ImageError(_too_large(path, image.size))
                image.load()
                image = ImageOps.exif_transpose(image)
                return _to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        cause = "the file is empty" if empty else "not an image, whatever its name says"
        raise ImageError(f"{path}: {cause}") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(path)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged image ({cause})") from None


def _too_large(path, size=None):
    found = f"{size[0]} x {size[1]} pixels" if size else "too many pixels"
    return (
        f"{path}: {found}; at most {MAX_PIXELS // 1_000_000} million are read, "
        "make it smaller first"
    )


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(values / 257, 0, 255).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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


class Panel(NamedTuple):
    """One map on one photo, ready to draw.

    Attributes:
      view: uint8 [H, W, 3].
      heat: float [h, w], non-negative, of any size.
      method: its name, for people.
      unit: "bits per pixel", or None for maps without one.
    """

    view: np.ndarray
    heat: np.ndarray
    method: str
    unit: str | None = None


def overlay(panel: Panel, *, title: str, path) -> None:
    """Draws one map on its photo, beside a colour bar, into a file.

    Raises:
      ImageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    peak = _draw(axes, panel)
    axes.set_title(f"{_shorten(title, 44)}\n{panel.method}", fontsize=13)
    if peak > 0:
        in_unit = panel.unit is not None
        bar = figure.colorbar(
            _scale(peak if in_unit else 1.0),
            ax=axes,
            fraction=0.05,
            pad=0.03,
            extend="max",
        )
        bar.set_label(panel.unit if in_unit else RELATIVE, fontsize=12)
        bar.ax.tick_params(labelsize=11)
    _save(figure, path)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Panel]]], *, path) -> None:
    """Draws a table: a row for each photo, a column for each method.

    Args:
      rows: (title, panels), the panels in the same order of methods in every row.
      path: file to write.

    Raises:
      ImageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    num_rows, num_columns = len(rows), 1 + len(rows[0][1])
    figure = Figure(figsize=(2.7 * num_columns, 3.0 * num_rows + 0.8))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    table = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes_of_row, (title, panels) in zip(table, rows, strict=True):
        axes_of_row[0].imshow(panels[0].view)
        axes_of_row[0].set_title(_wrap(title), fontsize=11)
        for axes, panel in zip(axes_of_row[1:], panels, strict=True):
            peak = _draw(axes, panel)
            axes.set_title(panel.method, fontsize=11)
            if panel.unit and peak > 0:
                axes.set_xlabel(f"up to {peak:.2g} {panel.unit}", fontsize=10)
        for axes in axes_of_row:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        _scale(1.0),
        ax=table,
        location="bottom",
        fraction=0.15 / num_rows,
        aspect=40,
        shrink=0.6,
        extend="max",
    )
    bar.set_label(RELATIVE, fontsize=11)
    bar.ax.tick_params(labelsize=10)
    _save(figure, path)


def _draw(axes, panel: Panel) -> float:
    """The photo with the heat over it; returns what the brightest colour stands for."""
    heat = np.asarray(panel.heat, np.float64)
    peak = float(np.quantile(heat, DISPLAY_QUANTILE)) or float(heat.max())
    height, width = panel.view.shape[:2]
    # Half its colour, so that the heat's is read as the heat's.
    grey = panel.view.mean(axis=-1, keepdims=True)
    muted = (panel.view / 2 + grey / 2).astype(np.uint8)
    axes.imshow(muted, extent=(0, width, height, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    if not peak > 0:
        axes.set_xlabel("the map is zero everywhere", fontsize=11)
        return 0.0
    axes.imshow(
        _colours(heat / peak), extent=(0, width, height, 0), interpolation="bilinear"
    )
    return peak


def _colours(relative: np.ndarray) -> np.ndarray:
    """RGBA of values in [0, 1]; the photo shows through, most where there is little."""
    import matplotlib

    relative = np.clip(relative, 0, 1)
    colours = matplotlib.colormaps[COLOUR_MAP](relative)
    colours[..., 3] = 0.7 * np.sqrt(relative)
    return colours


def _scale(peak: float):
    """What a colour bar needs: the colours as they look on mid-grey, from 0 to peak."""
    from matplotlib import cm
    from matplotlib.colors import ListedColormap, Normalize

    colours = _colours(np.linspace(0, 1, 256))
    alpha = colours[:, 3:]
    on_grey = ListedColormap(alpha * colours[:, :3] + (1 - alpha) * 0.5)
    return cm.ScalarMappable(Normalize(0, peak), on_grey)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def _wrap(text: str) -> str:
    return "\n".join(_shorten(line, 30) for line in text.split("\n"))


def _save(figure, path) -> None:
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror})") from None
