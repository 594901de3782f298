"""python -m benchmarks.step [--json] [--quick]: what guidance adds to a training step.

For each network the plain step and its rivals take turns in one process, so that a
change of the machine's speed meets all of them; printed are the median, the ratio to
the plain step turn by turn (median and quartiles), the compile time, and the peak
memory that the compiler plans for. Random weights and images: the work is the same.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from configs.baselines import icasc, saliency_guided
from ibsgl_jax import models
from train import baselines, loop
from train import state as states
from train import step as steps

# name: (model, image side, classes, batch on a CPU, batch on an accelerator)
NETWORKS = {
    "quickstart": ("small_resnet", 48, 10, 64, 1024),
    "resnet18_64": ("resnet18", 64, 200, 8, 256),
    "resnet50_224": ("resnet50", 224, 1000, 8, 128),
    "vgg16_224": ("vgg16", 224, 1000, 8, 64),
}


def make_steps(model, tx, num_steps=(10, 20)):
    """dict name -> step function of (state, batch); "plain" first."""
    bound = dict(
        model=model,
        tx=tx,
        base_key=jax.random.key(0),
        image_stats={"mean": (0.5,) * 3, "std": (0.25,) * 3},
    )
    made = {"plain": functools.partial(steps.plain_step, **bound)}
    for n in num_steps:
        phase = default.guided_phase()
        phase.bottleneck.num_steps = n
        made[f"guided_{n}"] = functools.partial(
            steps.guided_step,
            config=loop.guidance_config(phase),
            mu=lambda step: 3.0,
            decay=0.95,
            **bound,
        )
    made["saliency_guided"] = functools.partial(
        baselines.saliency_guided_step,
        **_options(saliency_guided.phase(), "mask_fraction", "weight"),
        **bound,
    )
    made["icasc"] = functools.partial(
        baselines.icasc_step,
        **_options(icasc.phase(), "weight", "omega", "threshold"),
        **bound,
    )
    return made


def _options(phase, *names):
    return {name: phase[name] for name in names}


def measure(network, *, dtype, num_rounds):
    """Rows of results for one network."""
    name, side, num_classes, small, large = NETWORKS[network]
    batch_size = small if jax.default_backend() == "cpu" else large
    model = models.create(name, num_classes=num_classes, dtype=jnp.dtype(dtype))
    optimizer = default.get_config().optimizer
    tx = states.make_optimizer(optimizer, lambda step: 1e-3)
    draw = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(
            draw.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
        ),
        "label": jnp.asarray(draw.integers(0, num_classes, batch_size), jnp.int32),
    }
    state = states.create_state(jax.random.key(0), model, tx, side)
    compiled, rows = {}, []
    for variant, step in make_steps(model, tx).items():
        begin = time.perf_counter()
        compiled[variant] = jax.jit(step).lower(state, batch).compile()
        seconds = time.perf_counter() - begin
        jax.block_until_ready(compiled[variant](state, batch))
        rows.append({"variant": variant, "compile_seconds": seconds})
        print(f"{network}: {variant} compiled", file=sys.stderr, flush=True)
    times = {variant: [] for variant in compiled}
    for i in range(num_rounds):
        for variant, step in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            times[variant].append(time.perf_counter() - begin)
        print(f"{network}: round {i + 1}/{num_rounds}", file=sys.stderr, flush=True)
    plain = np.array(times["plain"])
    for row in rows:
        seconds = np.array(times[row["variant"]])
        quartiles = np.percentile(seconds / plain, (50, 25, 75))
        memory = compiled[row["variant"]].memory_analysis()
        row |= {
            "network": network,
            "batch_size": batch_size,
            "dtype": dtype,
            "seconds": float(np.median(seconds)),
            "ratio": float(quartiles[0]),
            "ratio_quartiles": [float(q) for q in quartiles[1:]],
            "temp_bytes": memory.temp_size_in_bytes,
            "convolutions": compiled[row["variant"]].as_text().count(" convolution("),
        }
    base = rows[0]
    for row in rows:
        row["compile_ratio"] = row["compile_seconds"] / base["compile_seconds"]
        row["memory_ratio"] = row["temp_bytes"] / base["temp_bytes"]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the quickstart's only")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    networks = args.networks or (["quickstart"] if args.quick else NETWORKS)
    rows = []
    for network in networks:
        rows += measure(network, dtype=args.dtype, num_rounds=args.rounds)
    device = jax.devices()[0].device_kind
    if args.json:
        print(json.dumps({"jax": jax.__version__, "device": device, "rows": rows}))
        return 0
    print(f"jax {jax.__version__}, {device}")
    print("| network | step | ms | ratio (quartiles) | compile | memory |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['network']}, {row['batch_size']} | {row['variant']} "
            f"| {1e3 * row['seconds']:.0f} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['compile_ratio']:.1f} x | {row['memory_ratio']:.2f} x |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
