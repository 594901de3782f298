"""Overlays and contact sheets."""

import io

import numpy as np
import pytest
from PIL import Image

from ibsgl_jax.app import drawing


def opened(data):
    """The pixels of a PNG, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def panel(heat, unit=None, view=None):
    view = np.full((48, 64, 3), 128, np.uint8) if view is None else view
    return drawing.Panel(view, heat, "Method", unit)


class TestDrawing:
    def blob(self):
        y, x = np.mgrid[:8, :8]
        return np.exp(-((x - 2) ** 2 + (y - 5) ** 2) / 4)

    def test_overlay_puts_the_heat_in_its_place(self):
        data = drawing.overlay(panel(self.blob(), "bits per pixel"), title="cat")
        picture = opened(data).astype(int)
        # Colour (the view is grey) is left of the colour bar, and low on the left.
        inside = picture[60:, : int(0.8 * picture.shape[1])]
        colour = inside.max(axis=-1) - inside.min(axis=-1)
        y, x = np.mgrid[: colour.shape[0], : colour.shape[1]]
        assert np.sum(x * colour) / np.sum(colour) < 0.45 * colour.shape[1]
        assert np.sum(y * colour) / np.sum(colour) > 0.55 * colour.shape[0]

    def test_photo_shows_where_the_map_is_zero(self):
        view = np.zeros((50, 50, 3), np.uint8)
        view[:, 25:] = 200
        heat = np.zeros((8, 8))
        heat[0, 0] = 1.0
        picture = opened(drawing.overlay(panel(heat, view=view), title=""))
        for value in (0, 200):
            assert np.mean(np.all(picture == value, axis=-1)) > 0.2

    @pytest.mark.parametrize("unit", [None, "bits per pixel"])
    def test_a_map_of_zeros_says_so(self, unit):
        data = drawing.overlay(panel(np.zeros((8, 8)), unit), title="cat")
        assert min(opened(data).shape[:2]) > 300

    def test_a_map_of_next_to_no_bits_is_no_colour_and_says_so(self):
        def colour(bits, unit="bits per pixel"):
            heat = bits * self.blob() / self.blob().sum()
            drawn = panel(heat, unit)
            picture = opened(drawing.contact_sheet([("a", "cat", [drawn])])).astype(int)
            picture = picture[: int(0.75 * len(picture))]  # without the scale
            return (picture.max(-1) - picture.min(-1)).sum(), drawn.caption(heat.max())

        much, text = colour(20.0)
        assert text.startswith("up to ") and text.endswith(" bits per pixel")
        little, text = colour(0.002)
        assert text == "0.002 bits in all: negligible" and little < 0.1 * much
        # Of a map without a unit nothing is known.
        assert colour(0.002, None)[0] > 0.9 * much

    def test_one_hot_pixel_does_not_hide_the_rest(self):
        from matplotlib.figure import Figure

        heat = np.ones((40, 40))
        heat[0, 0] = 1000.0
        assert drawing._draw(Figure().add_subplot(), panel(heat)) == 1.0

    def test_contact_sheet_grows_with_photos_and_methods(self):
        sizes = {}
        for num_rows, num_methods in ((1, 1), (3, 1), (1, 3)):
            rows = [("a.jpg", "cat", [panel(self.blob())] * num_methods)] * num_rows
            sheet = opened(drawing.contact_sheet(rows))
            sizes[num_rows, num_methods] = sheet.shape
        assert sizes[3, 1][0] > 2 * sizes[1, 1][0]
        assert sizes[1, 3][1] > 1.7 * sizes[1, 1][1]

    @pytest.mark.parametrize(
        "name",
        [
            "cost $5^^_$ x",
            "$\\frac{",
            "a_b^{c} 100 % & #",
            "two\nlines\x1b[31m",
            "\udce9",
        ],
    )
    def test_names_are_text(self, name):
        single = opened(drawing.overlay(panel(self.blob()), title=name))
        sheet = opened(drawing.contact_sheet([(name, name, [panel(self.blob())])]))
        assert min(*single.shape[:2], *sheet.shape[:2]) > 300

    def test_pictures_bear_a_sign(self):
        data = drawing.overlay(panel(self.blob()), title="cat")
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.info["Software"] == drawing.SOFTWARE
