"""python -m benchmarks.folder FOLDER [--pictures 10000] [--json]: a large folder.

Draws photographs of 12 megapixels into FOLDER, unless it is there: DISTINCT different
JPEG files of 4000 x 3000 in two classes, each under as many names as it takes (hard
links, so that they fill no disk; reading comes from memory, a disk adds its own time).
Then, with the configuration that ``configs/photos.py`` gets from them: the time to read
them for the first time and again, the memory that takes, and the time of a training
step whose pictures come from the cache beside one whose pictures lie in memory.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.input import make_stream, make_training
from configs import photos
from train import devices
from train.data import dataset, folders
from train.run import choose
from train.show.markdown import markdown

DISTINCT, SIZE = 200, (4000, 3000)
ROUNDS = 5


def draw(folder: Path, number: int):
    """Soft shapes under the grain of a sensor; some 4 MB each."""
    from PIL import Image

    grain = np.random.default_rng(0).normal(0, 6, (SIZE[1], SIZE[0], 1))
    grain = grain.astype(np.int16)
    for i in range(number):
        path = folder / "ab"[i % 2] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= DISTINCT:
            os.link(folder / "ab"[i % 2] / f"{i % DISTINCT:05}.jpg", path)
            continue
        coarse = np.random.default_rng(i).integers(30, 226, (9, 12, 3), np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.BICUBIC))
        pixels = soft + np.roll(grain, 97 * i, axis=1)
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(function, *arguments, **options):
    """(seconds, result)."""
    begin = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - begin, result


def step_times(config, sources: dict, num_classes: int) -> dict:
    """Seconds of a step for each source: medians over rounds of steps, in turns."""
    step, state = make_training(config, config.plain, num_classes)
    streams = {
        name: devices.prefetch(
            make_stream(config, source, num_threads=config.num_threads), config
        )
        for name, source in sources.items()
    }
    times = {name: [] for name in sources}
    for turn in range(ROUNDS + 1):
        for name, stream in streams.items():
            begin = time.perf_counter()
            for _ in range(5):
                state, _ = step(state, next(stream))
            jax.block_until_ready(state)
            if turn:  # the first compiles
                times[name].append((time.perf_counter() - begin) / 5)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(folder: Path, cache: Path) -> dict:
    """All figures of a folder."""
    config = photos.get_config()
    config.data = str(folder)
    config, chosen = choose.complete(config, cache)
    options = {"image_size": config.image_size, "fit": config.fit, "cache_dir": cache}
    start = peak_gib()
    first, data = timed(folders.open_folder, folder, **options)
    number, reading = len(data.rows), peak_gib()
    again, data = timed(folders.open_folder, folder, **options)
    size = sum(path.stat().st_size for path in cache.rglob("*.npy"))
    held = dataset.first_examples(data.train, 1000)
    held = [held[i] for i in range(len(held))]
    sources = {"cache": data.train, "memory": held}
    steps = step_times(config, sources, data.num_classes)
    return {
        "pictures": number,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "seconds_first": first / number,
        "seconds_again": again / number,
        "cache_mib": size / 2**20,
        "gib_at_start": start,
        "gib_after_reading": reading,
        "gib_after_steps": peak_gib(),
        "seconds_step": steps,
    }


def table(row: dict) -> str:
    """The figures as Markdown."""
    steps = row["seconds_step"]
    cells = {
        "pictures": f"{row['pictures']:,}",
        "first reading, seconds a picture": f"{row['seconds_first']:.4f}",
        "again, from the cache, seconds a picture": f"{row['seconds_again']:.4f}",
        "cache on disk, MiB": f"{row['cache_mib']:.0f}",
        "memory before and after reading, GiB": f"{row['gib_at_start']:.2f}, "
        f"{row['gib_after_reading']:.2f}",
        f"step of {row['batch_size']} at {row['image_size']}, from memory, s": (
            f"{steps['memory']:.3f}"
        ),
        "the same from the cache, s": f"{steps['cache']:.3f}",
    }
    return markdown(("figure", "value"), cells.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if not arguments.folder.exists():
        draw(arguments.folder, arguments.pictures)
    with tempfile.TemporaryDirectory() as cache:
        row = measure(arguments.folder, Path(cache))
    print(json.dumps(row) if arguments.json else table(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
