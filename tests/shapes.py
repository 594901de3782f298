"""Drawn pictures of two coloured shapes each, or none: several labels per picture."""

import numpy as np
from PIL import Image

from tests.pictures import write_csv

# Colours are clear enough for a network of seconds.
COLOURS = {"square": (230, 40, 40), "disc": (40, 230, 40), "cross": (40, 40, 230)}
SETS = (("square", "disc"), ("disc", "cross"), ("cross", "square"))


def draw(names, seed):
    """Each of the named shapes in a quarter of its own, on dim noise."""
    rng = np.random.default_rng([seed, len(names)])
    pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
    rows, columns = np.mgrid[:32, :32]
    for name, quarter in zip(names, rng.permutation(4), strict=False):
        y, x = 8 + 16 * (quarter // 2), 8 + 16 * (quarter % 2)
        down, across = abs(rows - y), abs(columns - x)
        inside = {
            "square": np.maximum(down, across) <= 5,
            "disc": down**2 + across**2 <= 36,
            "cross": (np.minimum(down, across) <= 2) & (down + across <= 8),
        }[name]
        pixels[inside] = COLOURS[name]
    return Image.fromarray(pixels)


def label_sets(number):
    """Every tenth picture has no shape."""
    return [SETS[i % 3] if i % 10 else () for i in range(number)]


def fill(folder, number=40):
    """A folder of them with its labels.csv."""
    folder.mkdir(parents=True)
    rows = []
    for seed, names in enumerate(label_sets(number)):
        draw(names, seed).save(folder / f"{seed}.png")
        rows.append((f"{seed}.png", "; ".join(names)))
    return write_csv(folder, ("file", "label"), rows)
