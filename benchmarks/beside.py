"""python -m benchmarks.beside RUN/PHASE ... --out FILE.png: maps of several networks.

The first images of the first run's test split as each network sees them: the map of
the true class by each method, what the network says, and the object's box. The runs
must be of one data set, that has boxes.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import attribution, feature_stats, models, saliency, trained
from ibsgl_jax.bottleneck import BottleneckConfig
from train.data import dataset
from train.errors import UserError
from train.method.step import normalize_images
from train.run import saved_run

METHODS = ("hirescam", "ib")
TITLES = {"hirescam": "HiResCAM", "ib": "bottleneck"}


def explain(variables, images, labels, stats, *, model, image_stats):
    """(logits, dict method -> maps at the image's size) of uint8 images."""
    mean, std = image_stats
    images = normalize_images(images, mean=mean, std=std)
    features_fn = models.make_features_fn(model, variables)
    head_fn = models.make_head_fn(model, variables)
    maps = {
        method: attribution.attribute(
            method,
            features_fn,
            head_fn,
            images,
            labels,
            key=jax.random.key(0),
            moments=feature_stats.moments(stats),
            **({"config": BottleneckConfig(num_steps=20)} if method == "ib" else {}),
        )
        for method in METHODS
    }
    return head_fn(features_fn(images)), maps


def first_batch(run, number):
    source = dataset.first_examples(run.data.test, number)
    examples = [source[i] for i in range(number)]
    return {
        name: np.stack([e[name] for e in examples])
        for name in ("image", "label", "bbox")
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="RUN/PHASE")
    parser.add_argument("--names", nargs="+", help="of the networks, in the picture")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        run = saved_run.Run(Path(args.networks[0]).parent)
    except UserError as error:
        parser.error(str(error))
    batch = first_batch(run, args.images)
    rows = []
    for network in map(Path, args.networks):
        model = trained.load(network.parent / "models" / f"{network.name}.npz")
        image_stats = model.preprocessing.mean, model.preprocessing.std
        explain_fn = functools.partial(
            explain, model=model.model, image_stats=image_stats
        )
        logits, maps = jax.jit(explain_fn)(
            model.variables,
            jnp.asarray(batch["image"]),
            jnp.asarray(batch["label"]),
            model.stats,
        )
        rows.append((np.asarray(jax.nn.softmax(logits)), jax.device_get(maps)))
    draw(batch, rows, args.names or args.networks, args.out)
    print(args.out)
    return 0


def draw(batch, rows, names, path):
    """A row an image, a column a network and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 1 + len(rows) * len(METHODS)
    number = len(batch["image"])
    figure, axes = plt.subplots(
        number, columns, figsize=(1.6 * columns, 1.85 * number), squeeze=False
    )
    grey = batch["image"].mean(-1)
    size = grey.shape[1:]
    for i, line in enumerate(axes):
        top, left, bottom, right = batch["bbox"][i] * (*size, *size)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.imshow(grey[i], cmap="gray", vmin=0, vmax=255)
            axis.add_patch(
                plt.Rectangle(
                    (left - 0.5, top - 0.5),
                    right - left,
                    bottom - top,
                    fill=False,
                    edgecolor="white",
                    linewidth=1,
                )
            )
        line[0].imshow(batch["image"][i])
        line[0].set_ylabel(int(batch["label"][i]), fontsize=9)
        columns = iter(line[1:])
        for name, (probs, maps) in zip(names, rows, strict=True):
            for method in METHODS:
                axis = next(columns)
                heat = np.asarray(saliency.normalize(maps[method][i : i + 1])[0])
                axis.imshow(heat, cmap="inferno", alpha=0.35 + 0.5 * heat)
                if i == 0:
                    axis.set_title(f"{name}\n{TITLES[method]}", fontsize=9)
                says, true = probs[i].argmax(), probs[i][batch["label"][i]]
                axis.set_xlabel(f"says {says}, P of the true {true:.2f}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
