"""python -m benchmarks.reach RUN [--phase plain] [--json]: the step that is felt.

Guidance moves features A a step towards a better saliency map. Behind a ReLU no
gradient reaches an element that is zero: what is asked of it is asked in vain. For
images that a run learned from, with the object's mask as the teacher: the share of
elements at zero, the share of the step's square that lies on them, and how far the
saliency loss falls at A', with the part of A' that is felt, and with ``move="active"``.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import guidance, metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.data import dataset
from train.data.batches import iterate
from train.errors import UserError
from train.method.step import normalize_images
from train.run import saved_run
from train.show.markdown import markdown

FALLS = ("fall, all", "fall, felt", "fall, active")


def measure(variables, batch, *, model, image_stats):
    """Per example, [N]: see the module; the network as it is in training."""
    images = normalize_images(batch["image"], **image_stats)
    features, _ = model.apply(
        variables, images, train=True, method="features", mutable=["batch_stats"]
    )
    features = features.astype(jnp.float32)
    head_fn = make_head_fn(model, variables)
    mask = batch["mask"].astype(jnp.float32)
    teacher = jax.image.resize(mask, features.shape[:3], "linear")

    def guide(**options):
        config = guidance.GuidanceConfig(**options)
        return guidance.guide(
            None,
            head_fn,
            features,
            batch["label"],
            None,
            config=config,
            teacher=teacher,
        )

    def loss_at(features):
        classes = jnp.stack([batch["label"], everything.runner_up], axis=1)
        _, maps = saliency.logits_and_saliencies(head_fn, features, classes)
        return guidance.saliency_loss(
            maps[:, 0], maps[:, 1], teacher, everything.gate, guidance.GuidanceConfig()
        )

    everything, active = guide(), guide(move="active")
    target, zero = everything.target_features, features <= 0
    square = jnp.square(target - features)
    on_zero = jnp.sum(jnp.where(zero, square, 0.0), axis=(1, 2, 3))
    return {
        "elements at zero": jnp.mean(zero, axis=(1, 2, 3)),
        "of the step": on_zero / jnp.maximum(jnp.sum(square, axis=(1, 2, 3)), 1e-30),
        "loss": everything.loss,
        "fall, all": everything.loss - everything.target_loss,
        "fall, felt": everything.loss - loss_at(jnp.where(zero, features, target)),
        "fall, active": active.loss - active.target_loss,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run whose data set has masks")
    parser.add_argument("--phase", default="plain")
    parser.add_argument("--limit", type=int, default=256, help="images")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        run = saved_run.Run(args.run, phases=(args.phase,))
        source = saved_run.open_split(run, run.config.train_split, args.limit)
    except UserError as error:
        parser.error(str(error))
    stats = dataset.image_stats(run.config)
    step = jax.jit(functools.partial(measure, model=run.model, image_stats=stats))
    window = {}
    for batch in iterate(dataset.eval_batches(run.config, source)):
        if "mask" not in batch:
            parser.error(f"{args.run}: its data set has no masks")
        values = step(run.states[args.phase].variables, batch)
        for name, value in values.items():
            sums = np.array(metrics.sum_and_count(value, batch["example_mask"]))
            window[name] = window.get(name, 0.0) + sums
    means = {name: float(total / count) for name, (total, count) in window.items()}
    header = ("elements at zero", "of the step", "loss", *FALLS)
    row = [f"{means[name]:.3f}" for name in header]
    print(json.dumps(means) if args.json else markdown(header, [row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
