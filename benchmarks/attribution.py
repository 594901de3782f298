"""python -m benchmarks.attribution [--json] [--quick]: what a map costs per image.

For each network plain inference and every method take turns in one process, so that a
change of the machine's speed meets all of them; printed are images per second and the
time per image as a ratio to plain inference in the same turn (median and quartiles).
"floor at LAYER" is what the bottleneck there cannot do without: the network once, the
rest of it and its gradient for every step and sample. The first call's time is that of
compiling. Random weights and images: the work is the same.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floor import make_floor
from ibsgl_jax import attribution, bottleneck, feature_stats, models, tapping
from train.show.markdown import markdown

# name: (model, image side, classes, batch on a CPU, batch on an accelerator, the layer
# further in that the bottleneck's authors used, of a ViT ours). The quick one is for a
# smoke test.
NETWORKS = {
    "efficientnet_lite0": ("efficientnet_lite0", 224, 1000, 8, 128, "block10"),
    "resnet50": ("resnet50", 224, 1000, 8, 128, "layer2_3"),
    "vgg16": ("vgg16", 224, 1000, 8, 64, "conv4_1"),
    "vit_small16": ("vit_small16", 224, 1000, 8, 128, "block8"),
    "quick": ("small_resnet", 48, 10, 8, 64, "layer2_0"),
}
INNER_SHARE = 4  # the bottleneck further in takes this part of the batch, else hours


def random_variables(model, side):
    """Variables of ordinary size, without compiling the model's initialisers."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    draw = np.random.default_rng(0)

    def make(path, shape):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(shape.shape[:-1])
            return jnp.asarray(
                draw.standard_normal(shape.shape, np.float32) * np.sqrt(2 / fan_in)
            )
        return jnp.full(shape.shape, 1.0 if name in ("scale", "var") else 0.0)

    return jax.tree_util.tree_map_with_path(make, shapes)


def make_variants(model, variables, images, inner_layer, methods):
    """dict name -> (function of images, how many of the images it takes)."""
    features_fn = models.make_features_fn(model, variables)
    head_fn = models.make_head_fn(model, variables)
    tapped_fn = attribution.make_tapped_fn(model, variables)
    num_images = len(images)
    variants = {
        "inference": (
            functools.partial(
                attribution.predict, features_fn, head_fn, chunk_size=num_images
            ),
            num_images,
        )
    }

    def explain(method, features_fn, head_fn, num_images, **more):
        needs = {"key": jax.random.key(0), **more}
        if method == "ib":
            needs["moments"] = moments_of(features_fn, images)
        return functools.partial(
            attribution.attribute,
            method,
            features_fn,
            head_fn,
            chunk_size=num_images,
            **needs,
        )

    for method in methods:
        more = {"tapped_fn": tapped_fn} if method == "full_grad" else {}
        explain_fn = explain(method, features_fn, head_fn, num_images, **more)
        variants[method] = (explain_fn, num_images)
    if "ib" in methods:
        # What guidance takes: with a pooled linear head one sample is enough.
        single = bottleneck.BottleneckConfig(num_samples=1)
        variants["ib, 1 sample"] = (
            explain("ib", features_fn, head_fn, num_images, config=single),
            num_images,
        )
        inner = tapping.linen(
            model, variables, inner_layer, image_shape=images.shape[1:]
        )
        num_inner = max(1, num_images // INNER_SHARE)
        variants[f"ib at {inner_layer}"] = (explain("ib", *inner, num_inner), num_inner)
        # IBA's own counts, which attribution.attribute takes here.
        config = bottleneck.BottleneckConfig()
        repeat_head = make_floor(config.num_steps, config.num_samples)
        tapped_features_fn, tail_fn = inner
        measured_fn = jax.jit(lambda features_fn, images: features_fn(images))

        def floor(images):
            features = measured_fn(tapped_features_fn, images)
            labels = jnp.zeros(len(images), jnp.int32)
            return repeat_head(tail_fn, features, labels)

        variants[f"floor at {inner_layer}"] = (floor, num_inner)
    return variants


def moments_of(features_fn, images):
    @jax.jit
    def measure(features_fn, images):
        features = features_fn(images)
        state = feature_stats.init(features.shape[1:])
        return feature_stats.moments(feature_stats.update(state, features))

    return measure(features_fn, images)


def measure(network, *, methods, num_rounds, max_seconds):
    """Rows of results for one network; a slow variant may get fewer rounds."""
    name, side, num_classes, small, large, inner_layer = NETWORKS[network]
    batch_size = small if jax.default_backend() == "cpu" else large
    model = models.create(name, num_classes=num_classes)
    images = jax.random.normal(jax.random.key(1), (batch_size, side, side, 3))
    variables = random_variables(model, side)
    variants = make_variants(model, variables, images, inner_layer, methods)

    def seconds_of(explain_fn, num_images):
        begin = time.perf_counter()
        jax.block_until_ready(explain_fn(images[:num_images]))
        return time.perf_counter() - begin

    times = {variant: [] for variant in variants}
    first = {}
    for variant, arguments in variants.items():
        first[variant] = seconds_of(*arguments)
        print(f"{network}: {variant} compiled", file=sys.stderr, flush=True)
    for i in range(num_rounds):
        for variant, arguments in variants.items():
            if sum(times[variant]) < max_seconds:
                times[variant].append(seconds_of(*arguments))
        print(f"{network}: round {i + 1}/{num_rounds}", file=sys.stderr, flush=True)

    plain = np.array(times["inference"]) / batch_size
    rows = []
    for variant, (_, num_images) in variants.items():
        seconds = np.array(times[variant]) / num_images
        ratios = seconds / plain[: len(seconds)]
        quartiles = np.percentile(ratios, (50, 25, 75))
        rows.append(
            {
                "network": network,
                "variant": variant,
                "batch_size": num_images,
                "rounds": len(seconds),
                "images_per_second": 1 / float(np.median(seconds)),
                "ratio": float(quartiles[0]),
                "ratio_quartiles": [float(q) for q in quartiles[1:]],
                "first_call_seconds": first[variant],
            }
        )
    return rows


def table(rows) -> str:
    lines = [
        (
            f"{row['network']}, {row['batch_size']}",
            row["variant"],
            f"{row['images_per_second']:.2f}",
            "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["ratio_quartiles"]),
            str(row["rounds"]),
        )
        for row in rows
    ]
    return markdown(
        ("network, batch", "variant", "images/s", "x inference (quartiles)", "rounds"),
        lines,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=attribution.METHODS,
        default=list(attribution.METHODS),
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="of timing, for each variant"
    )
    args = parser.parse_args(argv)
    full = [network for network in NETWORKS if network != "quick"]
    networks = args.networks or (["quick"] if args.quick else full)
    rows = []
    for network in networks:
        rows += measure(
            network,
            methods=args.methods,
            num_rounds=args.rounds,
            max_seconds=args.max_seconds,
        )
    device = jax.devices()[0].device_kind
    if args.json:
        print(json.dumps({"jax": jax.__version__, "device": device, "rows": rows}))
        return 0
    print(f"jax {jax.__version__}, {device}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
