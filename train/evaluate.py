"""Judge trained phases on the test split: the table, results.json and the picture.

May import jax, numpy, ``ibsgl_jax``, and ``train``'s own modules except ``loop``.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import feature_stats, metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.data import pipeline
from train.step import normalize_images
from train.workdir import write_text

AXIS = "devices"

# Columns of the printed table: key, title, factor.
COLUMNS = (
    ("accuracy", "accuracy", 1),
    ("nll", "NLL", 1),
    ("box_share", "box share", 1),
    ("pointing", "pointing", 1),
    ("iou", "IoU", 1),
    ("overlap", "overlap", 1),
    ("drop", "AD %", 100),
    ("increase", "AI %", 100),
    ("area", "area", 1),
    ("matched_drop", "AD % matched", 100),
    ("matched_increase", "AI % matched", 100),
)


def evaluate_phases(config, model, states, data, workdir) -> dict:
    """Measure every phase on the test split and write what there is to see.

    Args:
      config, model: the run's; the model without an axis name.
      states: dict phase name -> TrainState.
      data: ``loop.Data``.
      workdir: gets results.json and before_after.png (from process 0).

    Returns:
      dict phase name -> dict of means (see ``measure`` for their definitions).
    """
    results = {}
    for name, state in states.items():
        values = measure_split(config, model, state.variables, data.test)
        results[name] = {k: float(np.nanmean(v)) for k, v in values.items()}
    if jax.process_index() == 0:
        workdir = Path(workdir)
        record = {"split": config.test_split, "num_images": len(data.test)}
        text = json.dumps({**record, "phases": results}, indent=2)
        write_text(workdir / "results.json", text + "\n")
        print(table(results), flush=True)
        if config.picture_phases:
            from train import figures

            figures.write_before_after(config, model, states, data, workdir)
    return results


def table(results: dict) -> str:
    """Markdown: a row per phase, the columns that were measured."""
    known = [c for c in COLUMNS if any(c[0] in row for row in results.values())]
    lines = [
        "| phase | " + " | ".join(title for _, title, _ in known) + " |",
        "|---|" + "---|" * len(known),
    ]
    for name, row in results.items():
        cells = [
            f"{row[key] * factor:.1f}" if factor == 100 else f"{row[key]:.3f}"
            for key, _, factor in known
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_split(config, model, variables, source) -> dict:
    """The measures of ``measure`` for every example of a split.

    Returns:
      dict of NumPy arrays [number of examples], NaN where a measure is undefined.
    """
    measure_fn = jax.pmap(
        functools.partial(
            measure,
            model=model,
            image_stats=image_stats(config),
            matched_area=config.matched_area,
        ),
        axis_name=AXIS,
        in_axes=(None, 0),
    )
    parts = []
    for batch in pipeline.iterate(eval_batches(config, source)):
        values = jax.device_get(measure_fn(variables, shard(batch)))
        real = batch["example_mask"] > 0
        parts.append({k: v.reshape(-1)[real] for k, v in values.items()})
    values = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    if jax.process_count() > 1:
        values = _gather(values)
    return values


def measure(variables, batch, *, model, image_stats, matched_area) -> dict:
    """Every measure of the table, per example, for the map L^c of the true class.

    Maps are upsampled bilinearly to the image. Localisation is against the box, or the
    object's mask where there is no box, and left out where there is neither.

    accuracy, nll: of the label.  box_share: share of L^c in the box.  pointing: the
    peak of L^c is in the box.  iou: of the box and the pixels above half the peak.
    overlap, cosine: of L^c and the runner-up's L^p.  drop, increase: Average Drop and
    Average Increase of the label's probability on the image times L^c / max L^c (on
    normalised pixels: hidden means mean colour).  area: mean of L^c / max L^c.
    matched_*: the same with each map raised to the power that gives ``matched_area``.
    mass_c, mass_p: the sums of L^c and L^p.  blank: L^c is all zero.

    Returns:
      dict of float32 [N], NaN where undefined.
    """
    images = normalize_images(batch["image"], **image_stats)
    labels, size = batch["label"], images.shape[1:3]
    head_fn = make_head_fn(model, variables)

    def prob_fn(images):
        features = model.apply(variables, images, method="features")
        return metrics.probability(head_fn(features), labels)

    def classes_fn(logits):
        return jnp.stack([labels, saliency.runner_up(logits, labels)], axis=1)

    features = model.apply(variables, images, method="features")
    logits, maps = saliency.logits_and_saliencies(head_fn, features, classes_fn)
    probs = metrics.probability(logits, labels)
    map_c, map_p = maps[:, 0], maps[:, 1]
    full_c = saliency.upsample(map_c, size)
    values = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels),
        "confidence": jnp.max(jax.nn.softmax(logits), axis=-1),
        "overlap": metrics.overlap(map_c, map_p),
        "cosine": metrics.cosine(map_c, map_p),
        "mass_c": metrics.mass(map_c),
        "mass_p": metrics.mass(map_p),
        "blank": (metrics.mass(map_c) <= 0).astype(jnp.float32),
        "area": metrics.map_area(full_c),
    }
    matched = metrics.match_area(full_c, matched_area)
    for prefix, weights in (("", full_c), ("matched_", matched)):
        explained = prob_fn(metrics.explanation_map(images, weights))
        values[prefix + "drop"] = metrics.drop(probs, explained)
        values[prefix + "increase"] = metrics.increase(probs, explained)
    target = None
    if "bbox" in batch:
        target = metrics.boxes_to_mask(batch["bbox"], size)
    elif "mask" in batch:
        target = batch["mask"] > 0
    if target is not None:
        for name, (score, count) in {
            "box_share": metrics.box_share(full_c, target),
            "pointing": metrics.pointing_hit(full_c, target),
            "iou": metrics.iou(full_c, target),
        }.items():
            values[name] = jnp.where(count > 0, score, jnp.nan)
    return values


def data_set_moments(config, model, variables, source, *, num_examples=1024):
    """Feature moments of the first examples of a split, in evaluation mode."""

    @jax.jit
    def update(stats, images, mask):
        images = normalize_images(images, **image_stats(config))
        features = model.apply(variables, images, method="features")
        return feature_stats.update(stats, features, mask)

    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    shape = jax.eval_shape(
        lambda x: model.apply(variables, x, method="features"), images
    ).shape
    stats = feature_stats.init(shape[1:])
    num_batches = -(-min(num_examples, len(source)) // config.batch_size)
    batches = eval_batches(config, source, shard=(0, 1))[:num_batches]
    for batch in pipeline.iterate(batches):
        stats = update(stats, batch["image"], batch["example_mask"])
    return feature_stats.moments(stats)


def eval_batches(config, source, *, shard=None):
    """The finite sequence of evaluation batches of a split, with example_mask."""
    return pipeline.make_eval_batches(
        source,
        batch_size=config.batch_size,
        transform=config.eval_transform,
        image_size=config.image_size,
        shard=shard,
    )


def image_stats(config) -> dict:
    """The mean and std of ``step.normalize_images``."""
    return {"mean": tuple(config.image_mean), "std": tuple(config.image_std)}


def shard(batch):
    """[B, ...] -> [local devices, B / devices, ...]."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)


def _gather(values):
    """Join the examples that every process measured; their number may differ."""
    from jax.experimental import multihost_utils

    size = len(next(iter(values.values())))
    sizes = multihost_utils.process_allgather(np.int32(size)).reshape(-1)
    padded = {k: np.pad(v, (0, sizes.max() - size)) for k, v in values.items()}
    gathered = multihost_utils.process_allgather(padded)
    return {
        k: np.concatenate([row[:n] for row, n in zip(v, sizes, strict=True)])
        for k, v in gathered.items()
    }
