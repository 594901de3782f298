"""python -m benchmarks.input [--json] [--quick]: does the input keep up with the step?

Images per second that the pipeline delivers to the device, for threads and for worker
processes, beside what the plain and the guided step of the same network consume. Two
cases: the embedded set's (48 x 48, decoded once, in memory) and ImageNet's (JPEG files
of 500 x 375, a random part of each at 224 x 224). `--quick` takes the first alone.
"""

import argparse
import io
import json
import os
import sys
import time

import jax
import numpy as np

from configs import default, imagenet_resnet50
from train import devices
from train.data import sources
from train.data.batches import iterate, make_train_dataset
from train.devices import AXIS
from train.method.build import make_model, make_optimizer, make_schedule, make_step
from train.method.state import create_state
from train.show.markdown import markdown


class Repeated:
    """A source of a few examples that pretends to have many."""

    def __init__(self, source, length):
        self._source = source
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._source[index % len(self._source)]


def photographs(num, height, width):
    """JPEG files as large as ImageNet's: noise with the spectrum of a photo."""
    from PIL import Image

    generator = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    falloff = 1.0 / np.maximum(frequency, 1.0 / width)
    records = []
    for i in range(num):
        noise = generator.standard_normal((3, height, width))
        smooth = np.fft.ifft2(np.fft.fft2(noise) * falloff).real
        smooth = 128 + 50 * smooth / smooth.std()
        pixels = np.clip(smooth, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
        records.append({"image": buffer.getvalue(), "label": i % 10})
    return records


def make_stream(config, source, **options):
    """The batches that training takes; options are those of ``iterate``."""
    batches = make_train_dataset(
        source,
        batch_size=config.batch_size,
        seed=0,
        augment=config.augment,
        image_size=config.image_size,
    )
    return iterate(batches, **options)


def make_training(config, phase, num_classes):
    """A phase's step over all devices, and the state that it starts from."""
    model = make_model(config, num_classes, axis_name=AXIS)
    tx = make_optimizer(config.optimizer, make_schedule(1e-4, 10_000, 0))
    step = make_step(config, phase, 100, generation=0, model=model, tx=tx)
    step = devices.over_devices(
        step, in_axes=(None, 0), out_axes=None, donate_argnums=0
    )
    state = create_state(jax.random.key(0), model, tx, config.image_size)
    return step, devices.replicate(state)


def input_speed(config, source, seconds, **options):
    """Images per second that arrive on the device."""
    stream = make_stream(config, source, **options)
    try:
        arriving = devices.prefetch(stream, config)
        for _ in range(4):  # workers start, buffers fill
            jax.block_until_ready(next(arriving))
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            jax.block_until_ready(next(arriving))
            count += config.batch_size
        return count / (time.perf_counter() - begin)
    finally:
        stream.close()


def step_speed(config, phase, seconds):
    """Images per second that a phase's step takes in on all devices."""
    step, state = make_training(config, phase, num_classes=10)
    side, size = config.image_size, config.batch_size
    image = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    batch = {"image": image, "label": np.arange(size, dtype=np.int32) % 10}
    (batch,) = devices.prefetch(iter([batch]), config)
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        count += size
    return count / (time.perf_counter() - begin)


def measure(name, config, records, cached, seconds, settings) -> dict:
    """All speeds of one case."""
    source = sources.DecodedSource(records)
    source = Repeated(sources.CachedSource(source) if cached else source, 10_000)
    row = {"case": name, "batch_size": config.batch_size, "input": {}, "step": {}}
    for title, options in settings.items():
        row["input"][title] = input_speed(config, source, seconds, **options)
    for title, phase in (
        ("plain", default.plain_phase()),
        ("guided", default.guided_phase()),
    ):
        row["step"][title] = step_speed(config, phase, seconds)
    row["input_per_step"] = max(row["input"].values()) / row["step"]["guided"]
    return row


def table(rows) -> str:
    lines = []
    for row in rows:
        cells = [
            ", ".join(f"{title}: {speed:.0f}" for title, speed in row[kind].items())
            for kind in ("input", "step")
        ]
        lines.append((row["case"], *cells, f"{row['input_per_step']:.1f}"))
    return markdown(
        ("case", "input, images/s", "step, images/s", "input / guided step"), lines
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="the embedded set alone")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    arguments = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    cores = os.cpu_count()
    small = default.get_config()
    small.batch_size = 64 if on_cpu else 1024
    settings = {f"{n} threads": {"num_threads": n} for n in sorted({1, min(4, cores)})}
    rows = [
        measure(
            "photo_digits",
            small,
            photographs(256, 48, 48),
            True,
            arguments.seconds,
            settings,
        )
    ]
    if not arguments.quick:
        large = imagenet_resnet50.get_config()
        large.batch_size = 16 if on_cpu else 256
        large.dtype = "float32" if on_cpu else "bfloat16"
        settings = {
            f"{cores} threads": {"num_threads": cores},
            f"{cores} workers": {"num_workers": cores},
        }
        records = photographs(32, 375, 500)
        rows.append(
            measure("imagenet", large, records, False, arguments.seconds, settings)
        )
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {cores} cores"
    print(
        json.dumps({"device": device, "rows": rows})
        if arguments.json
        else f"{device}\n\n{table(rows)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
