"""Small drawn pictures in folders, for tests."""

import csv

import numpy as np
from PIL import Image

SIZE = (40, 32)  # width, height


def draw(seed, size=SIZE, mode="RGB", blobs=(6, 7)):
    """A picture of soft blobs that no other seed makes."""
    values = np.random.default_rng(seed).integers(0, 256, (*blobs, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.BICUBIC).convert(mode)


def save(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(seed, **options).save(path)
    return path


def fill(folder, classes=("cat", "dog"), number=8, first=0, suffix=".png"):
    for c, label in enumerate(classes):
        for i in range(number):
            save(folder / label / f"{i}{suffix}", first + 100 * c + i)
    return folder


def write_csv(folder, header, rows):
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def names_of(data, split):
    return sorted(row[0] for row in data.rows if row[3] == split)


def map_all(source):
    return [source[i] for i in range(len(source))]
