"""python -m train.teachers --workdir W [W ...]: how good the maps are that could teach.

Bottleneck maps of one phase's network, without training, by layer, number of steps and
number of samples; several workdirs are seeds of the same configuration. Printed are
means over the seeds with half of the 95 % interval. Without boxes or masks the maps are
judged by deletion and by the Average Drop at equal area.
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt
from train import memory

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()
    memory.restart()

import functools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging as absl_logging

from ibsgl_jax import (
    attribution,
    bottleneck,
    feature_stats,
    metrics,
    perturbation,
    saliency,
    tapping,
)
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train import command, devices
from train.arguments import Parser, at_least, some
from train.data import dataset
from train.data.batches import iterate
from train.errors import UserError, disk_errors
from train.files import write_json
from train.measure import splits, statistics
from train.measure.batch import make_prob_fn, target_mask
from train.measure.catalogue import NUM_STEPS
from train.measure.seeds import mean_and_margin
from train.method import answers
from train.method.step import normalize_images
from train.run import saved_run
from train.show.markdown import markdown

# The middle two where there are no boxes; the last is the mean Pearson correlation of
# the map of the true class with that of the runner-up, 1 for a teacher that does not
# see the class.
COLUMNS = {
    "box_share": "box share",
    "pointing": "pointing",
    "matched_drop": "Average Drop, equal area",
    "deletion_mean": "deletion, mean colour",
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

    def config(self) -> BottleneckConfig:
        return BottleneckConfig(
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            beta=self.beta,
            blur_sigma=self.blur_sigma or None,
        )

    def title(self) -> str:
        layer = self.layer or "last"
        samples = "sample" if self.num_samples == 1 else "samples"
        title = f"{layer}, {self.num_steps} steps, {self.num_samples} {samples}"
        title += f", beta {self.beta:g}" if self.beta != 10.0 else ""
        return title + (f", blur {self.blur_sigma:g}" if self.blur_sigma != 0.5 else "")


def measure(run, phase: str, source, teacher: Teacher | None) -> dict:
    """Means over a source of the teacher's maps; None: of L^c itself.

    Returns:
      dict of those of ``COLUMNS`` that the data define (NaN where no example does):
      localisation where there are boxes or masks, else what the maps explain.
    """
    config, model, variables = run.config, run.model, run.states[phase].variables
    values = splits.collect(
        measure_teacher,
        config,
        model,
        source,
        variables,
        _moments(config, model, variables, teacher, run.data.train),
        teacher=teacher,
        matched_area=config.matched_area,
        rivals=run.data.num_classes > 1,
    )
    summary = statistics.summarize(values, keys=COLUMNS)
    return {name: entry["mean"] for name, entry in summary.items()}


def measure_teacher(
    variables, moments, batch, *, model, image_stats, teacher, matched_area, rivals
) -> dict:
    """The measures of ``COLUMNS`` of one batch, per example: [N] each."""
    images = normalize_images(batch["image"], **image_stats)
    labels, size = batch["label"], images.shape[1:3]
    features_fn, head_fn = functions(model, variables, teacher, images.shape[1:])
    features = features_fn(images)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(
        batch["place"]
    )

    def maps_fn(classes):
        if teacher is None:
            return attribution.hirescam(head_fn, features, classes)
        return bottleneck.attribute(
            keys,
            head_fn,
            features,
            classes,
            moments,
            config=teacher.config(),
            loss=answers.link_of(batch),
        ).saliency

    small = maps_fn(labels)
    maps, values = saliency.upsample(small, size), {}
    if rivals:
        others = answers.runner_up(head_fn(features), batch)
        correlation = _correlation(small, maps_fn(others))
        values |= answers.rivalled({"class_correlation": correlation}, batch)
    target = target_mask(batch)
    if target is not None:
        for name, (score, count) in (
            ("box_share", metrics.box_share(maps, target)),
            ("pointing", metrics.pointing_hit(maps, target)),
        ):
            values[name] = jnp.where(count > 0, score, jnp.nan)
        return answers.shown(values, batch)
    prob_fn = make_prob_fn(model, variables, batch)
    matched = metrics.explanation_map(images, metrics.match_area(maps, matched_area))
    values["matched_drop"] = metrics.drop(prob_fn(images), prob_fn(matched))
    values["deletion_mean"] = perturbation.deletion_insertion(
        prob_fn,
        images,
        maps,
        perturbation.mean_baseline(images),
        num_steps=NUM_STEPS,
    ).deletion_auc
    return answers.shown(values, batch)


def functions(model, variables, teacher, image_shape):
    """(features_fn, head_fn) at the teacher's layer."""
    if teacher is None or not teacher.layer:
        return make_features_fn(model, variables), make_head_fn(model, variables)
    return tapping.linen(
        model, variables, teacher.layer, image_shape=image_shape, train=False
    )


def _moments(config, model, variables, teacher, source):
    """Of the features at the teacher's layer, in training images; None for L^c."""
    if teacher is None:
        return None
    shape = (config.image_size, config.image_size, 3)
    features_fn, _ = functions(model, variables, teacher, shape)
    part = dataset.first_examples(source, NUM_STATISTICS)

    @jax.jit
    def update(stats, images, mask):
        images = normalize_images(images, **dataset.image_stats(config))
        return feature_stats.update(stats, features_fn(images), mask)

    images = jnp.zeros((1, *shape), jnp.float32)
    stats = feature_stats.init(jax.eval_shape(features_fn, images).shape[1:])
    for batch in iterate(dataset.eval_batches(config, part, shard=(0, 1))):
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
    known = {
        name: title
        for name, title in COLUMNS.items()
        if any(name in seed for seeds in rows.values() for seed in seeds)
    }

    def cell(values):
        mean, margin = mean_and_margin(values)
        if not math.isfinite(mean):
            return "–"
        return f"{mean:.3f} ± {margin:.3f}" if len(values) > 1 else f"{mean:.3f}"

    return markdown(
        ("map", *known.values()),
        [
            (title, *(cell([s.get(name, math.nan) for s in seeds]) for name in known))
            for title, seeds in rows.items()
        ],
    )


def make_parser():
    parser = Parser(
        prog="python -m train.teachers", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--workdir", nargs="+", type=some, required=True, help="runs: the seeds"
    )
    parser.add_argument("--phase", default="plain", help="whose network")
    parser.add_argument("--split", type=some, default="validation")
    parser.add_argument("--limit", type=at_least(1), default=512, help="images at most")
    parser.add_argument("--layers", nargs="*", default=[], help="inner layers to add")
    parser.add_argument(
        "--steps", nargs="*", type=at_least(1), default=[10, 15, 20, 40]
    )
    parser.add_argument("--samples", nargs="*", type=at_least(1), default=[1, 10])
    return parser


def check(runs, args):
    """UserError before anything is measured: phases, layers, splits, old results."""
    for run in runs:
        saved_run.open_split(run, args.split, args.limit)
        devices.check_devices(run.config)
        shape = (run.config.image_size, run.config.image_size, 3)
        variables = run.states[args.phase].variables
        for layer in args.layers:
            try:
                functions(run.model, variables, Teacher(layer, 1, 1), shape)
            except ValueError as error:
                raise UserError(f"--layers {layer}: {error}") from error
        read(run.workdir, args.split)


def read(workdir: Path, split: str) -> dict:
    """What is measured already, by title."""
    path = workdir / f"teachers_{split}.json"
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from None
    entries = known.values() if isinstance(known, dict) else [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is damaged (no dict of dicts); delete it")
    return known


@command.run
def main(argv=None) -> int:
    """The command."""
    args = make_parser().parse_args(argv)
    # Orbax and tfds tell much that no reader of a table needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    teachers = [None]
    for layer in ("", *args.layers):
        teachers += [Teacher(layer, n, s) for n in args.steps for s in args.samples]
    teachers += [Teacher("", 20, 1, beta) for beta in (1.0, 100.0)]
    teachers += [Teacher("", 20, 1, blur_sigma=blur) for blur in (1.0, 0.0)]
    rows = {}
    runs = [saved_run.Run(workdir, phases=(args.phase,)) for workdir in args.workdir]
    check(runs, args)
    for run in runs:
        for note in run.notes:
            print(f"note: {run.workdir}: {note}", file=sys.stderr)
        known = read(run.workdir, args.split)
        source = saved_run.open_split(run, args.split, args.limit)
        for teacher in teachers:
            title = teacher.title() if teacher else "L^c"
            key = f"{args.phase}, {args.limit} images: {title}"
            if key not in known:
                print(f"{run.workdir}: {title}", file=sys.stderr, flush=True)
                known[key] = measure(run, args.phase, source, teacher)
                with disk_errors():
                    path = run.workdir / f"teachers_{args.split}.json"
                    write_json(path, known, indent=1)
            # JSON has no NaN: null is what no example defines.
            found = {k: math.nan if v is None else v for k, v in known[key].items()}
            rows.setdefault(title, []).append(found)
    print(f"{len(runs)} seeds, phase {args.phase}, {args.split} split\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
