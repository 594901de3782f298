"""python -m benchmarks.growth [--out=DIR] [--quick]: how the cost of guidance grows.

What a guided step takes beyond a plain one, on a small ResNet: with the batch, with the
size of the features (H W K), with the bottleneck's steps, and with one machine cut into
1 to 8 devices at the same global batch (what is left then is overhead; nothing becomes
faster). Times are those of the process on all its cores, not of the clock, so that
other programs disturb them little. Writes growth.json and growth.png.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step import make_step
from configs import default
from configs.sweeps import variants
from ibsgl_jax import models
from train.devices import AXIS, over_devices
from train.method.build import make_optimizer
from train.method.state import create_state
from train.show.markdown import markdown

BASE = {"batch": 64, "filters": 16, "steps": 20, "devices": 1}
AXES = {
    "batch": (16, 64, 256),
    "filters": (8, 16, 32),
    "steps": (5, 10, 20, 40),
    "devices": (1, 2, 4, 8),
}
TITLES = {
    "batch": "images in the batch",
    "filters": "features of an image (H W K)",
    "steps": "bottleneck steps",
    "devices": "devices, the batch shared",
}


def measure(case, num_rounds):
    """The medians of both steps in one setting, in this process."""
    num = case["devices"]
    axis_name = AXIS if num > 1 else None
    model = models.create(
        "small_resnet",
        num_classes=10,
        num_filters=case["filters"],
        axis_name=axis_name,
    )
    tx = make_optimizer(default.get_config().optimizer, lambda step: 1e-3)
    guided = default.guided_phase(every=1, release=0.0, **variants.LAST)
    guided.bottleneck.num_steps = case["steps"]
    both = {
        name: make_step(model, tx, phase, axis_name)
        for name, phase in (("plain", default.plain_phase()), ("guided", guided))
    }
    size, draw = case["batch"], np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (size, 48, 48, 3), dtype=np.uint8),
        "label": draw.integers(0, 10, size).astype(np.int32),
        "place": np.arange(size, dtype=np.int32),
    }
    state = create_state(jax.random.key(0), model, tx, 48)
    if num > 1:
        batch = {k: v.reshape(num, -1, *v.shape[1:]) for k, v in batch.items()}
        both = {
            name: over_devices(step, in_axes=(None, 0), out_axes=None)
            for name, step in both.items()
        }
    else:
        batch = jax.tree.map(jnp.asarray, batch)
        both = {name: jax.jit(step) for name, step in both.items()}
    times = {name: [] for name in both}
    for i in range(num_rounds + 1):
        for name, step in both.items():
            begin = time.process_time()
            jax.block_until_ready(step(state, batch))
            if i > 0:  # the first compiles
                times[name].append(time.process_time() - begin)
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    elements = int(np.prod(state.feature_stats.mean.shape))
    return case | medians | {"elements": elements, "jax": jax.__version__}


def measure_apart(case, num_rounds):
    """``measure`` in a process of its own, which has as many devices as the case."""
    flags = f"--xla_force_host_platform_device_count={case['devices']}"
    command = [sys.executable, "-m", "benchmarks.growth", "--case", json.dumps(case)]
    done = subprocess.run(
        [*command, "--rounds", str(num_rounds)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def draw(rows, path):
    """One panel per axis: both steps against what varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(11, 2.8))
    for panel, (axis, own) in zip(panels, rows.items(), strict=True):
        x = [row["elements" if axis == "filters" else axis] for row in own]
        for name, style in (("guided", "o-"), ("plain", "s--")):
            panel.plot(x, [1e3 * row[name] for row in own], style, ms=4, label=name)
        panel.set_xticks(x)
        panel.set_xlim(left=0)
        panel.set_xlabel(TITLES[axis])
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("CPU ms a step")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def table(rows) -> str:
    lines = []
    for axis, own in rows.items():
        for each in own:
            plain, guided = 1e3 * each["plain"], 1e3 * each["guided"]
            value = str(each["elements" if axis == "filters" else axis])
            times = (f"{ms:.0f}" for ms in (plain, guided, guided - plain))
            lines.append((TITLES[axis], value, *times))
    header = "varied", "value", "plain, CPU ms", "guided, CPU ms", "beyond plain"
    return markdown(header, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks", help="folder of the results")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two settings, no plot")
    parser.add_argument("--case", help="(of the processes that it starts)")
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(measure(json.loads(args.case), args.rounds)))
        return 0
    found = {}

    def row(**changes):
        case = BASE | changes
        key = tuple(case.values())
        if key not in found:
            found[key] = measure_apart(case, args.rounds)
            print(found[key], file=sys.stderr, flush=True)
        return found[key]

    if args.quick:
        print(json.dumps([row(batch=8, steps=2), row(batch=8, steps=2, devices=2)]))
        return 0
    rows = {axis: [row(**{axis: x}) for x in values] for axis, values in AXES.items()}
    out = pathlib.Path(args.out)
    (out / "growth.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "growth.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
