"""python -m train.teachers --workdir W [W ...]: how good the maps are that could teach.

Bottleneck maps of one phase's network, without training, by layer, number of steps and
number of samples; several workdirs are seeds of the same configuration. Printed are
means over the seeds with half of the 95 % interval.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import attribution, bottleneck, feature_stats, metrics, saliency, tapping
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train import command
from train.data import dataset
from train.data.batches import iterate
from train.files import write_json
from train.measure import splits
from train.measure.batch import target_mask
from train.measure.seeds import mean_and_margin
from train.method.step import normalize_images
from train.run import saved_run
from train.show import tables

COLUMNS = {
    "box_share": "box share",
    "pointing": "pointing",
    "class_correlation": "correlation between classes",
}
# Images that the statistics of an inner layer are taken from.
NUM_STATISTICS = 1024


class Teacher(NamedTuple):
    """layer: of ``tapping.layer_names``, "" for the features before the head."""

    layer: str
    num_steps: int
    num_samples: int
    beta: float = 10.0
    blur_sigma: float = 0.5  # cells of the layer

    def title(self) -> str:
        layer = self.layer or "last"
        samples = "sample" if self.num_samples == 1 else "samples"
        title = f"{layer}, {self.num_steps} steps, {self.num_samples} {samples}"
        title += f", beta {self.beta:g}" if self.beta != 10.0 else ""
        return title + (f", blur {self.blur_sigma:g}" if self.blur_sigma != 0.5 else "")


def measure(run, phase: str, source, teacher: Teacher | None) -> dict:
    """Means over a source of the teacher's maps; None: of L^c itself.

    Returns:
      {box_share, pointing, class_correlation}: the last is the mean Pearson correlation
      of the map of the true class with that of the runner-up, 1 for a teacher that does
      not see the class.
    """
    config, model, variables = run.config, run.model, run.states[phase].variables
    features_fn = make_features_fn(model, variables)
    head_fn = make_head_fn(model, variables)
    logits_fn = jax.jit(lambda images: head_fn(features_fn(images)))
    if teacher is None:
        maps_fn = jax.jit(
            lambda keys, images, classes: attribution.hirescam(
                head_fn, features_fn(images), classes
            )
        )
    else:
        if teacher.layer:
            shape = (config.image_size, config.image_size, 3)
            features_fn, head_fn = tapping.linen(
                model, variables, teacher.layer, image_shape=shape, train=False
            )
        moments = _moments(config, features_fn, run.data.train)
        maps_fn = _bottleneck_maps(teacher, moments, features_fn, head_fn)
    sums = {name: np.zeros(2) for name in COLUMNS}
    for batch in splits.placed_batches(config, source):
        images = normalize_images(batch["image"], **dataset.image_stats(config))
        labels, real = jnp.asarray(batch["label"]), jnp.asarray(batch["example_mask"])
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(
            batch["place"]
        )
        others = saliency.runner_up(logits_fn(images), labels)
        small, small_others = (maps_fn(keys, images, c) for c in (labels, others))
        maps = saliency.upsample(small, images.shape[1:3])
        target = target_mask(batch)
        share, known = metrics.box_share(maps, target)
        hit, hit_known = metrics.pointing_hit(maps, target)
        correlation = _correlation(small, small_others)
        defined = jnp.isfinite(correlation)
        for name, values, counts in (
            ("box_share", share, known * real),
            ("pointing", hit, hit_known * real),
            ("class_correlation", correlation, defined * real),
        ):
            sums[name] += np.array(metrics.sum_and_count(values, counts))
    return {name: float(total / max(n, 1)) for name, (total, n) in sums.items()}


def _bottleneck_maps(teacher, moments, features_fn, head_fn):
    options = BottleneckConfig(
        num_steps=teacher.num_steps,
        num_samples=teacher.num_samples,
        beta=teacher.beta,
        blur_sigma=teacher.blur_sigma or None,
    )

    @jax.jit
    def maps_fn(keys, images, classes):
        features = features_fn(images)
        return bottleneck.attribute(
            keys, head_fn, features, classes, moments, config=options
        ).saliency

    return maps_fn


def _moments(config, features_fn, source):
    part = dataset.first_examples(source, NUM_STATISTICS)

    @jax.jit
    def update(stats, images, mask):
        images = normalize_images(images, **dataset.image_stats(config))
        return feature_stats.update(stats, features_fn(images), mask)

    stats = None
    for batch in iterate(dataset.eval_batches(config, part, shard=(0, 1))):
        if stats is None:
            images = jnp.zeros(batch["image"].shape, jnp.float32)
            shape = jax.eval_shape(jax.jit(features_fn), images).shape
            stats = feature_stats.init(shape[1:])
        stats = update(stats, batch["image"], batch["example_mask"])
    return feature_stats.moments(stats)


def _correlation(maps, others):
    """Pearson correlation per example, NaN where a map is constant."""
    a, b = (
        x.reshape(len(x), -1) - jnp.mean(x, axis=(1, 2))[:, None]
        for x in (maps, others)
    )
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    product = jnp.sum(a * b, axis=1)
    return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1.0), jnp.nan)


def table(rows: dict) -> str:
    """Markdown of {title: [dict per seed]}: mean and half of the 95 % interval."""

    def cell(values):
        mean, margin = mean_and_margin(values)
        return f"{mean:.3f} ± {margin:.3f}" if len(values) > 1 else f"{mean:.3f}"

    return tables.markdown(
        ("map", *COLUMNS.values()),
        [
            (title, *(cell([seed[name] for seed in seeds]) for name in COLUMNS))
            for title, seeds in rows.items()
        ],
    )


@command.run
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.teachers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", nargs="+", required=True, help="runs: the seeds")
    parser.add_argument("--phase", default="plain", help="whose network")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, default=512, help="images at most")
    parser.add_argument("--layers", nargs="*", default=[], help="inner layers to add")
    parser.add_argument("--steps", nargs="*", type=int, default=[10, 15, 20, 40])
    parser.add_argument("--samples", nargs="*", type=int, default=[1, 10])
    args = parser.parse_args(argv)
    teachers = [None]
    for layer in ("", *args.layers):
        teachers += [Teacher(layer, n, s) for n in args.steps for s in args.samples]
    teachers += [Teacher("", 20, 1, beta) for beta in (1.0, 100.0)]
    teachers += [Teacher("", 20, 1, blur_sigma=blur) for blur in (1.0, 0.0)]
    rows = {}
    for workdir in args.workdir:
        path = Path(workdir) / f"teachers_{args.split}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        run = saved_run.Run(workdir, phases=(args.phase,))
        source = saved_run.open_split(run, args.split, args.limit)
        for teacher in teachers:
            title = teacher.title() if teacher else "L^c"
            key = f"{args.phase}, {args.limit} images: {title}"
            if key not in known:
                print(f"{workdir}: {title}", file=sys.stderr, flush=True)
                known[key] = measure(run, args.phase, source, teacher)
                write_json(path, known, indent=1)
            rows.setdefault(title, []).append(known[key])
    print(f"{len(args.workdir)} seeds, phase {args.phase}, {args.split} split\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
