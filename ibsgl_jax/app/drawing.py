"""Pictures of maps: one overlay, and a sheet of many. Needs matplotlib.

Titles are names of files and classes: text, never markup.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ibsgl_jax.app.terminal import shown

# In every picture's text chunk, by which ``photos.find`` knows them.
SOFTWARE = "ibsgl explain"
COLOUR_MAP = "inferno"
# Values above this quantile share the brightest colour: one hot pixel (common in
# gradients) would otherwise leave the rest of the map dark.
DISPLAY_QUANTILE = 0.995
RELATIVE = f"relative to the map's {100 * DISPLAY_QUANTILE:.1f} % quantile"
# A bottleneck map of fewer bits in all says nothing about where: it is as much fainter.
NEGLIGIBLE_BITS = 0.1
_AS_TEXT: dict[str, Any] = {"parse_math": False, "usetex": False}


class Panel(NamedTuple):
    """One map on one photo, ready to draw.

    Attributes:
      view: uint8 [H, W, 3].
      heat: float [h, w], non-negative, of any size.
      method: its name, for people.
      unit: "bits per pixel" of the heat, or None for maps without one.
    """

    view: np.ndarray
    heat: np.ndarray
    method: str
    unit: str | None = None

    @property
    def strength(self) -> float:
        """The share of its colour that a map is drawn with, in [0, 1]."""
        if self.unit is None:
            return 1.0
        return min(1.0, float(np.sum(self.heat)) / NEGLIGIBLE_BITS)

    def caption(self, peak: float) -> str:
        """Of a map with a unit, whose brightest colour stands for peak > 0."""
        if self.strength < 1.0:
            bits = self.strength * NEGLIGIBLE_BITS
            return f"{bits:.1g} bits in all: negligible"
        return f"up to {peak:.2g} {self.unit}"


def overlay(panel: Panel, *, title: str) -> bytes:
    """One map on its photo, beside a colour bar, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    peak = _draw(axes, panel)
    title = f"{_shorten(shown(title), 44)}\n{panel.method}"
    axes.set_title(title, fontsize=13, **_AS_TEXT)
    if peak > 0:
        if panel.strength < 1.0:
            axes.set_xlabel(panel.caption(peak), fontsize=11)
        bar = figure.colorbar(
            _scale(1.0 if panel.unit is None else peak),
            ax=axes,
            fraction=0.05,
            pad=0.03,
            extend="max",
        )
        bar.set_label(RELATIVE if panel.unit is None else panel.unit, fontsize=12)
        bar.ax.tick_params(labelsize=11)
    return _png(figure)


def contact_sheet(rows: Sequence[tuple[str, str, Sequence[Panel]]]) -> bytes:
    """A table as a PNG: a row for each photo, a column for each method.

    Args:
      rows: (name, title, panels), the panels in the same order of methods in every row.
    """
    from matplotlib.figure import Figure

    num_rows, num_columns = len(rows), 1 + len(rows[0][2])
    figure = Figure(figsize=(2.7 * num_columns, 3.0 * num_rows + 0.8))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    table = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes_of_row, (name, title, panels) in zip(table, rows, strict=True):
        axes_of_row[0].imshow(panels[0].view)
        title = "\n".join(_shorten(shown(line), 30) for line in (name, title))
        axes_of_row[0].set_title(title, fontsize=11, **_AS_TEXT)
        for axes, panel in zip(axes_of_row[1:], panels, strict=True):
            peak = _draw(axes, panel)
            axes.set_title(panel.method, fontsize=11)
            if panel.unit and peak > 0:
                axes.set_xlabel(panel.caption(peak), fontsize=10)
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
    return _png(figure)


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
    colours = _colours(heat / peak)
    colours[..., 3] *= panel.strength
    axes.imshow(colours, extent=(0, width, height, 0), interpolation="bilinear")
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


def _png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.simplefilter("ignore")
        figure.savefig(
            file,
            format="png",
            dpi=110,
            bbox_inches="tight",
            pad_inches=0.1,
            metadata={"Software": SOFTWARE},
        )
    return file.getvalue()
