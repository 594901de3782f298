"""python -m benchmarks.step [--json] [--quick]: what guidance adds to a training step.

For each network the plain step and its rivals take turns of four steps in one process,
so that a change of the machine's speed meets all of them; printed are the median of a
step, the ratio to the plain step turn by turn (median and quartiles), the compile time,
and the peak memory that the compiler plans for. "guided_N" has N bottleneck steps at
the last layer, "inner_N" N of them at a finer one, where "hirescam_squared" is the
teacher that needs one pass. With "_every_4" one of the four is guided. "floor_N" is the
plain step and, for a head that is not linear, what N bottleneck steps cannot do
without. Random weights and images: the work is the same.
"""

import argparse
import functools
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floor import make_floor
from configs import default
from configs.baselines import icasc, saliency_guided
from ibsgl_jax import models
from train import memory
from train.method.build import make_optimizer, make_penalty
from train.method.state import create_state
from train.method.step import train_step
from train.show.markdown import markdown

# name: (model, image side, classes, batch on a CPU, batch on an accelerator, a layer of
# twice the last one's resolution, if there is one)
NETWORKS = {
    "quickstart": ("small_resnet", 48, 10, 64, 1024, "layer1_0"),
    "resnet18_64": ("resnet18", 64, 200, 8, 256, "layer3_1"),
    "resnet50_224": ("resnet50", 224, 1000, 8, 128, "layer3_5"),
    "vgg16_224": ("vgg16", 224, 1000, 8, 64, "conv4_3"),
    "vit_small16_224": ("vit_small16", 224, 1000, 8, 64, ""),
}


NUM_STEPS = (10, 20)
EVERY = 4


def make_phases(inner_layer: str) -> dict:
    """dict name -> phase of a configuration; "plain" first."""
    made = {"plain": default.plain_phase()}
    guided = functools.partial(
        default.guided_phase, release=0.0, teacher_layer="", **default.BOTTLENECK
    )
    for n in NUM_STEPS:
        made[f"guided_{n}"] = guided(every=1)
        made[f"guided_{n}"].bottleneck.num_steps = n
    made[f"guided_{n}_every_{EVERY}"] = guided(every=EVERY)
    if inner_layer:
        made[f"inner_{n}_every_{EVERY}"] = guided(
            every=EVERY, teacher_layer=inner_layer
        )
    for every in (1, EVERY):
        ending = "" if every == 1 else f"_every_{every}"
        made["hirescam_squared" + ending] = default.guided_phase(
            every=every, release=0.0, teacher_layer=inner_layer
        )
    made["saliency_guided"] = saliency_guided.phase()
    made["icasc"] = icasc.phase()
    return made


def make_step(model, tx, phase, axis_name=None):
    """The step of a phase, a function of (state, batch); on one device without axis."""
    penalty_fn = make_penalty(
        default.get_config(),
        phase,
        1,
        model,
        axis_name,
        platform=jax.default_backend(),
    )
    return functools.partial(
        train_step,
        penalty_fn=penalty_fn,
        layer=phase.get("teacher_layer", ""),
        model=model,
        tx=tx,
        base_key=jax.random.key(0),
        image_stats={"mean": (0.5,) * 3, "std": (0.25,) * 3},
        axis_name=axis_name,
    )


def turn(step, given) -> float:
    """Mean seconds of ``step(x)`` over what is given.

    One before them, of the last, is not counted: it pays for memory that the system
    took back while others had their turn.
    """
    jax.block_until_ready(step(given[-1]))
    begin = time.perf_counter()
    for x in given:
        jax.block_until_ready(step(x))
    return (time.perf_counter() - begin) / len(given)


def _turn(step, state, batch):
    """A function that takes steps 0 .. EVERY - 1 and returns the mean time of one."""
    given = [state.replace(step=jnp.int32(i)) for i in range(EVERY)]
    return functools.partial(turn, lambda state: step(state, batch), given)


def measure(network, *, dtype, num_rounds, variants=None):
    """Rows of results for one network."""
    name, side, num_classes, small, large, inner_layer = NETWORKS[network]
    batch_size = small if jax.default_backend() == "cpu" else large
    model = models.create(name, num_classes=num_classes, dtype=jnp.dtype(dtype))
    optimizer = default.get_config().optimizer
    tx = make_optimizer(optimizer, lambda step: 1e-3)
    draw = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(
            draw.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
        ),
        "label": jnp.asarray(draw.integers(0, num_classes, batch_size), jnp.int32),
    }
    plain_state = create_state(jax.random.key(0), model, tx, side)
    compiled, run, rows = {}, {}, []
    for variant, phase in make_phases(inner_layer).items():
        if variants and variant not in ("plain", *variants):
            continue
        layer, state = phase.get("teacher_layer", ""), plain_state
        if layer:
            state = create_state(jax.random.key(0), model, tx, side, layer=layer)
        begin = time.perf_counter()
        step = make_step(model, tx, phase)
        compiled[variant] = jax.jit(step).lower(state, batch).compile()
        seconds = time.perf_counter() - begin
        run[variant] = _turn(compiled[variant], state, batch)
        rows.append({"variant": variant, "compile_seconds": seconds})
        print(f"{network}: {variant} compiled", file=sys.stderr, flush=True)
    head_fn = models.make_head_fn(model, plain_state.variables)
    if not isinstance(head_fn, models.PooledLinear):
        shape = (batch_size, *plain_state.feature_stats.mean.shape)
        features = jnp.ones(shape, model.dtype)
        for n in NUM_STEPS:
            repeat_head = make_floor(n, num_samples=1)

            def floor(state, batch, repeat_head=repeat_head):
                done = repeat_head(head_fn, features, batch["label"])
                return done, compiled["plain"](state, batch)

            run[f"floor_{n}"] = _turn(floor, plain_state, batch)
            rows.append({"variant": f"floor_{n}"})
    times = {variant: [] for variant in run}
    for i in range(num_rounds):
        for variant, go in run.items():
            times[variant].append(go())
        print(f"{network}: round {i + 1}/{num_rounds}", file=sys.stderr, flush=True)
    plain = np.array(times["plain"])
    for row in rows:
        seconds = np.array(times[row["variant"]])
        quartiles = np.percentile(seconds / plain, (50, 25, 75))
        row |= {
            "network": network,
            "batch_size": batch_size,
            "dtype": dtype,
            "seconds": float(np.median(seconds)),
            "ratio": float(quartiles[0]),
            "ratio_quartiles": [float(q) for q in quartiles[1:]],
        }
        if "compile_seconds" in row:  # a step, not a floor
            program = compiled[row["variant"]]
            row["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
            row["convolutions"] = program.as_text().count(" convolution(")
            row["compile_ratio"] = row["compile_seconds"] / rows[0]["compile_seconds"]
            row["memory_ratio"] = row["temp_bytes"] / rows[0]["temp_bytes"]
    return rows


def table(rows) -> str:
    lines = []
    for row in rows:
        costs = "", ""
        if "compile_ratio" in row:
            costs = f"{row['compile_ratio']:.1f} x", f"{row['memory_ratio']:.2f} x"
        lines.append(
            (
                f"{row['network']}, {row['batch_size']}",
                row["variant"],
                f"{1e3 * row['seconds']:.0f}",
                "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["ratio_quartiles"]),
                *costs,
            )
        )
    header = "network", "step", "ms", "ratio (quartiles)", "compile", "memory"
    return markdown(header, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the quickstart's only")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(make_phases("layer"))[1:],
        help="beside plain; all if absent",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    networks = args.networks or (["quickstart"] if args.quick else NETWORKS)
    rows = []
    for network in networks:
        rows += measure(
            network,
            dtype=args.dtype,
            num_rounds=args.rounds,
            variants=args.variants,
        )
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    if args.json:
        print(json.dumps({"jax": jax.__version__, "device": device, "rows": rows}))
        return 0
    print(f"jax {jax.__version__}, {device}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    memory.restart()
    sys.exit(main())
