"""Run a function over every example of a split, on all devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import feature_stats
from train import devices
from train.data import dataset
from train.data.batches import iterate
from train.measure.batch import measure
from train.method.step import normalize_images


def measure_split(config, model, variables, source, *, progress=None) -> dict:
    """The measures of ``batch.measure`` for every example of a split.

    Args:
      config, model, variables: of one phase.
      source: sequence of examples.
      progress: called after every batch.

    Returns:
      dict of NumPy arrays [number of examples, ...] in the order of the split, NaN
      where a measure is undefined.
    """
    return collect(
        measure,
        config,
        model,
        source,
        variables,
        progress=progress,
        matched_area=config.matched_area,
    )


def collect(step, config, model, source, *carried, progress=None, **options) -> dict:
    """The values that a step of ``batch`` gives for every example of a split.

    Args:
      step: function (*carried, batch, model, image_stats, **options) -> dict.
      config, model: of the run.
      source: sequence of examples.
      carried: what every device gets all of; variables, and moments.
      progress: called after every batch.
      options: hashable; the step is compiled once for each.

    Returns:
      as ``map_split``.
    """
    fn = devices.compiled(step, config, model, num_carried=len(carried), **options)
    return map_split(
        config, source, lambda batch: fn(*carried, batch), progress=progress
    )


def map_split(config, source, fn, *, progress=None) -> dict:
    """Apply ``fn(batch on devices) -> dict of [devices, n, ...]`` to a whole split.

    Batches carry ``place``, each example's index in the source.

    Returns:
      dict of NumPy arrays [number of examples, ...], in the order of the source, of
      all processes.
    """
    parts = []
    for batch in placed_batches(config, source):
        values = {**fn(devices.shard(batch)), "place": batch["place"]}
        values = jax.device_get(values)
        real = batch["example_mask"] > 0
        parts.append(
            {k: devices.unshard(v, len(real))[real] for k, v in values.items()}
        )
        if progress:
            progress()
    values = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    if jax.process_count() > 1:
        values = devices.gather(values)
    order = np.argsort(values.pop("place"))
    return {k: v[order] for k, v in values.items()}


def placed_batches(config, source):
    """The evaluation batches of a source with ``place`` [B] int32."""
    size = config.batch_size // jax.process_count()
    local = np.arange(size) * jax.process_count() + jax.process_index()
    batches = iterate(dataset.eval_batches(config, source))
    for number, batch in enumerate(batches):
        place = (number * config.batch_size + local).astype(np.int32)
        yield {**batch, "place": place}


def data_set_moments(config, model, variables, source, **options):
    """``feature_stats.moments`` of ``data_set_stats``."""
    stats = data_set_stats(config, model, variables, source, **options)
    return feature_stats.moments(stats)


def data_set_stats(config, model, variables, source, *, num_examples=1024):
    """FeatureStats of the first examples of a split, mixed, in evaluation mode."""
    source = dataset.mixed(source)
    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    shape = jax.eval_shape(
        lambda x: model.apply(variables, x, method="features"), images
    ).shape
    stats = feature_stats.init(shape[1:])
    num_batches = -(-min(num_examples, len(source)) // config.batch_size)
    batches = dataset.eval_batches(config, source, shard=(0, 1))[:num_batches]
    for batch in iterate(batches):
        stats = _update_stats(
            variables,
            stats,
            batch["image"],
            batch["example_mask"],
            model=model,
            image_stats=tuple(dataset.image_stats(config).items()),
        )
    return stats


@functools.partial(jax.jit, static_argnames=("model", "image_stats"))
def _update_stats(variables, stats, images, mask, *, model, image_stats):
    images = normalize_images(images, **dict(image_stats))
    features = model.apply(variables, images, method="features")
    return feature_stats.update(stats, features, mask)
