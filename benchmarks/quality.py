"""python -m benchmarks.quality [--json] [--network ...]: what a map is worth its price.

The bottleneck at an inner layer, with several settings, and two CAMs of that layer:
rank correlation of the map with a reference of 100 samples and 60 steps (both at the
layer's resolution, median over the images), areas under deletion and insertion (mean
baseline), share of the map in the object's box, against the price in multiples of the
network's inference. ``--workdir RUN`` adds a run of an embedded data set, which has
boxes. EfficientNet-Lite0 has the weights of a package; ResNet-50 and VGG-16 have random
ones (on smaller images, without deletion: poor evidence) unless ``--weights`` gives a
file. Every map is kept in ``--cache``, so a stopped run goes on where it was (one cache
for one set of weights). Writes quality.json and quality.png to ``--out``, and leaves
the rows of networks that this run does not measure.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attribution import moments_of, random_variables
from ibsgl_jax import (
    attribution,
    bottleneck,
    metrics,
    models,
    perturbation,
    pretrained,
    saliency,
    tapping,
    trained,
)
from ibsgl_jax.bottleneck import BottleneckConfig
from train.data import photos, sources
from train.data.photo_digits.photo_digits_dataset_builder import PHOTOS
from train.show.markdown import markdown

# name: (layer, images, side with random weights)
NETWORKS = {
    "efficientnet_lite0": ("block10", 6, 224),
    "resnet50": ("layer2_3", 4, 112),
    "vgg16": ("conv4_1", 1, 112),
}
RUN_LAYER, NUM_RUN_IMAGES = "layer1_0", 32
NUM_STATISTICS = 128  # images behind the noise's mean and standard deviation
REFERENCE = BottleneckConfig(num_steps=60, num_samples=100)
ONE = functools.partial(BottleneckConfig, num_samples=1)
VARIANTS = {
    "IBA (10 steps, 10 samples)": BottleneckConfig(),
    "20 steps, 10 samples": BottleneckConfig(num_steps=20),
    "20 steps": ONE(num_steps=20),
    "10 steps": ONE(num_steps=10),
    "8 steps at rate 2": ONE(num_steps=8, learning_rate=2.0),
    "FAST, 5 steps": dataclasses.replace(bottleneck.FAST, num_steps=5),
    "FAST, 7 steps": dataclasses.replace(bottleneck.FAST, num_steps=7),
    "FAST": bottleneck.FAST,
    "FAST, 14 steps": dataclasses.replace(bottleneck.FAST, num_steps=14),
    "hirescam": "hirescam",
    "layer_cam": "layer_cam",
}
QUICK = ("FAST", "hirescam")


class Case(NamedTuple):
    """A network cut at a layer, images [N, H', W', 3], their classes and boxes."""

    name: str
    features_fn: Any
    head_fn: Any
    images: Any
    classes: Any
    moments: Any
    boxes: Any
    is_trained: bool


# ---- What is explained --------------------------------------------------------------


def draw_photos(num_images, side):
    """Crops of the photographs behind the embedded data sets, uint8."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(num_images):
        strip, _ = photos.open_strip(*PHOTOS[i % len(PHOTOS)], "train")
        size = rng.uniform(0.5, 1.0) * min(strip.size)
        crops.append(np.asarray(photos.crop_square(rng, strip, size, side)))
    return np.stack(crops)


def make_case(name, model, variables, preprocessing, layer, pictures, num, **more):
    """``Case`` of the first ``num`` of the pictures; all of them give the moments."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    images = jnp.asarray((pictures / 255.0 - mean) / std, jnp.float32)
    features_fn, head_fn = tapping.linen(
        model, variables, layer, image_shape=images.shape[1:]
    )
    logits = attribution.predict(features_fn, head_fn, images[:num])
    case = Case(
        name=name,
        features_fn=features_fn,
        head_fn=head_fn,
        images=images[:num],
        classes=jnp.argmax(logits, axis=-1),
        moments=moments_of(features_fn, images),
        boxes=None,
        is_trained=True,
    )
    return case._replace(**more)


def open_network(name, weights, num_images):
    layer, num, side = NETWORKS[name]
    is_trained = name in weights or name == "efficientnet_lite0"
    if is_trained:
        model, variables = pretrained.load(name, weights.get(name))
        side = 224
    else:
        model = models.create(name, num_classes=1000)
        variables = random_variables(model, side)
    return make_case(
        name if is_trained else f"{name}, random",
        model,
        variables,
        pretrained.preprocessing(name),
        layer,
        draw_photos(NUM_STATISTICS, side),
        num_images or num,
        is_trained=is_trained,
    )


def open_run(workdir, data_dir, num_images):
    """The first phase of a run of the trainer, on its validation split."""
    config = json.loads((workdir / "config.json").read_text())
    phase = config["phases"][0]
    found = trained.load(workdir / "models" / f"{phase}.npz")
    builder = sources.prepare(
        config["dataset"], data_dir, **config.get("dataset_options", {})
    )
    source = sources.open_source(builder, "validation")
    num = num_images or NUM_RUN_IMAGES
    examples = [source[i] for i in range(min(1000, len(source)))]
    case = make_case(
        f"{workdir.name}, {phase}",
        found.model,
        found.variables,
        found.preprocessing,
        RUN_LAYER,
        np.stack([example["image"] for example in examples]),
        num,
    )
    return case._replace(
        classes=jnp.asarray([example["label"] for example in examples[:num]]),
        boxes=jnp.asarray([example["bbox"] for example in examples[:num]]),
    )


# ---- The maps -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="how")
def solve(features_fn, head_fn, images, classes, key, moments, *, how):
    """A map [1, h, w] at the layer's resolution, by a configuration or a CAM."""
    features = features_fn(images)
    if isinstance(how, BottleneckConfig):
        return bottleneck.attribute(
            key, head_fn, features, classes, moments, config=how
        ).saliency
    return attribution.FEATURE_METHODS[how](head_fn, features, classes)


def file_name(how):
    """Of a cached map: every field that differs from IBA's."""
    if isinstance(how, str):
        return how
    default = dataclasses.asdict(BottleneckConfig())
    fields = dataclasses.asdict(how).items()
    return "_".join(f"{k}={v}" for k, v in fields if v != default[k]) or "iba"


def maps_of(case, how, cache, label):
    """[N, h, w], image by image, each from the cache if it lies there."""
    folder = cache / case.name.replace(", ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    maps = []
    for i in range(len(case.images)):
        path = folder / f"{file_name(how)}_{i}.npy"
        if not path.exists():
            # Not the reference's draws, and for each image its own.
            key = jax.random.fold_in(jax.random.key(int(how == REFERENCE)), i)
            one = slice(i, i + 1)
            functions = case.features_fn, case.head_fn
            arguments = case.images[one], case.classes[one], key, case.moments
            found = np.asarray(solve(*functions, *arguments, how=how)[0])
            scratch = path.with_suffix(".tmp.npy")
            np.save(scratch, found)
            scratch.replace(path)
            say(f"{case.name}: {label}, image {i + 1}/{len(case.images)}")
        maps.append(np.load(path))
    return np.stack(maps)


def num_passes(how):
    """Forward and backward passes behind the layer for one map.

    The map is read before the last update, whose gradient is not computed.
    """
    return (how.num_steps - 1) * how.num_samples if how not in CAMS else 1


CAMS = tuple(how for how in VARIANTS.values() if isinstance(how, str))


# ---- Its worth and its price --------------------------------------------------------


def qualities(case, maps, reference, num_points=20):
    """Means over the images, the rank correlation's median and quartiles."""
    correlations = metrics.rank_correlation(jnp.asarray(maps), jnp.asarray(reference))
    quartiles = np.percentile(np.asarray(correlations), (50, 25, 75)).tolist()
    row = {"rank_correlation": quartiles[0], "quartiles": quartiles[1:]}
    size = case.images.shape[1:3]
    pictures = saliency.upsample(jnp.asarray(maps), size)
    if case.boxes is not None:
        share, _ = metrics.box_share(pictures, metrics.boxes_to_mask(case.boxes, size))
        row["box_share"] = float(jnp.mean(share))
    if case.is_trained:
        found = delete_and_insert(
            case.features_fn,
            case.head_fn,
            case.images,
            case.classes,
            pictures,
            num_points,
        )
        row["deletion"], row["insertion"] = (float(jnp.mean(area)) for area in found)
    return row


@functools.partial(jax.jit, static_argnames="num_points")
def delete_and_insert(features_fn, head_fn, images, classes, maps, num_points):
    def prob_fn(images):
        return metrics.probability(head_fn(features_fn(images)), classes)

    curves = perturbation.deletion_insertion(
        prob_fn,
        images,
        maps,
        perturbation.mean_baseline(images),
        num_steps=num_points,
    )
    return curves.deletion_auc, curves.insertion_auc


def prices(case, num_rounds):
    """Multiples of inference: FAST measured, what one more pass adds, the rest.

    Two images for the maps, up to eight for inference, in turns; medians.
    """
    steps = bottleneck.FAST.num_steps, 2
    configs = [dataclasses.replace(bottleneck.FAST, num_steps=n) for n in steps]
    functions = case.features_fn, case.head_fn
    num = min(2, len(case.images))
    eight = jnp.resize(case.images, (8, *case.images.shape[1:]))

    def infer():
        return attribution.predict(*functions, eight)

    def explain(config):
        arguments = case.images[:num], case.classes[:num], jax.random.key(0)
        return solve(*functions, *arguments, case.moments, how=config)

    # [three functions, rounds] seconds an image; the first round compiles.
    timed = (infer, 8), *((functools.partial(explain, c), num) for c in configs)
    seconds = []
    for i in range(num_rounds + 1):
        seconds.append([seconds_of(fn) / share for fn, share in timed])
        say(f"{case.name}: price, round {i}/{num_rounds}")
    plain, long, short = np.array(seconds[1:]).T
    per_pass = np.median((long - short) / plain) / (steps[0] - steps[1])
    base = np.median(short / plain) - per_pass * (steps[1] - 1)
    return float(base), float(per_pass)


def seconds_of(fn):
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - begin


def measure(case, variants, cache, num_rounds):
    """Rows of results for one network."""
    base, per_pass = prices(case, num_rounds)
    reference = maps_of(case, REFERENCE, cache, "reference")
    rows = []
    for name, how in {**variants, "reference": REFERENCE}.items():
        maps = maps_of(case, how, cache, name)
        rows.append(
            {
                "network": case.name,
                "variant": name,
                "images": len(maps),
                "passes": num_passes(how),
                "price": base + per_pass * num_passes(how),
                **qualities(case, maps, reference),
            }
        )
    return rows


# ---- Showing it ---------------------------------------------------------------------


def draw(rows, path):
    """One panel per network: rank correlation with the reference against the price."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(networks), figsize=(3.6 * len(networks), 3.2), sharey=True, squeeze=False
    )
    for panel, network in zip(panels[0], networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        fast = [row for row in own if row["variant"].startswith("FAST")]
        fast.sort(key=lambda row: row["price"])
        others = [
            row for row in own if row not in fast and row["variant"] != "reference"
        ]
        price = [row["price"] for row in fast]
        panel.plot(price, [row["rank_correlation"] for row in fast], "o-", label="FAST")
        for row, marker in zip(others, "sD^vP*X", strict=False):
            panel.plot(
                row["price"],
                row["rank_correlation"],
                marker,
                ls="none",
                label=row["variant"],
            )
        panel.set_xscale("log")
        panel.set_title(f"{network} ({own[0]['images']} images)", fontsize=9)
        panel.set_xlabel("multiples of inference")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("rank correlation with the reference")
    panels[0][-1].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def table(rows):
    columns = "rank_correlation", "deletion", "insertion", "box_share"
    lines = []
    for row in rows:
        cells = [f"{row[c]:.3f}" if c in row else "" for c in columns]
        cells[0] += " ({:.3f}-{:.3f})".format(*row["quartiles"])
        passes, price = str(row["passes"]), f"{row['price']:.1f}"
        lines.append((row["network"], row["variant"], passes, price, *cells))
    titles = "rank correlation (quartiles)", "deletion", "insertion", "box share"
    return markdown(("network", "variant", "passes", "x inference", *titles), lines)


def say(line):
    print(line, file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--network", nargs="*", choices=NETWORKS, help="all if absent")
    parser.add_argument("--workdir", type=pathlib.Path, help="of a run of the trainer")
    parser.add_argument("--data-dir", default="runs/data", help="of the run's data")
    parser.add_argument(
        "--weights",
        nargs="*",
        default=[],
        metavar="NETWORK=FILE",
        help="in torch's names",
    )
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("runs/quality")
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks"))
    parser.add_argument("--images", type=int, help="for each network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two variants, no files")
    args = parser.parse_args(argv)
    variants = {k: v for k, v in VARIANTS.items() if not args.quick or k in QUICK}
    names = list(NETWORKS) if args.network is None else args.network
    rows = []
    try:
        weights = read_weights(args.weights)
        cases = [functools.partial(open_network, name, weights) for name in names]
        if args.workdir:
            cases.insert(0, functools.partial(open_run, args.workdir, args.data_dir))
        for open_case in cases:
            rows += measure(open_case(args.images), variants, args.cache, args.rounds)
            if not args.quick:
                keep(rows, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(about(rows)) if args.json else table(rows))
    return 0


def read_weights(pairs):
    """dict network -> file of NETWORK=FILE."""
    for pair in pairs:
        if pair.partition("=")[0] not in NETWORKS or "=" not in pair:
            raise ValueError(
                f"--weights {pair}: give NETWORK=FILE, NETWORK one of "
                f"{', '.join(NETWORKS)}"
            )
    return dict(pair.split("=", 1) for pair in pairs)


def about(rows):
    device = jax.devices()[0].device_kind
    return {"jax": jax.__version__, "device": device, "rows": rows}


def keep(rows, out):
    """Write the rows beside those of other networks from earlier runs."""
    path = out / "quality.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {row["network"] for row in rows}
    rows = [row for row in earlier if row["network"] not in new] + rows
    path.write_text(json.dumps(about(rows), indent=1) + "\n")
    draw(rows, out / "quality.png")


if __name__ == "__main__":
    sys.exit(main())
