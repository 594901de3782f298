"""Run a function over every example of a split, on all devices.

May import jax, numpy, ``ibsgl_jax``, and ``train``'s pipeline, step and measures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import feature_stats
from train.data import pipeline
from train.measures import measure
from train.step import normalize_images

AXIS = "devices"


def measure_split(config, model, variables, source, *, progress=None) -> dict:
    """The measures of ``measures.measure`` for every example of a split.

    Args:
      config, model, variables: of one phase.
      source: sequence of examples.
      progress: called after every batch.

    Returns:
      dict of NumPy arrays [number of examples, ...] in the order of the split, NaN
      where a measure is undefined.
    """
    step = compiled(measure, config, model, matched_area=config.matched_area)
    return map_split(
        config, source, lambda batch: step(variables, batch), progress=progress
    )


def compiled(step, config, model, *, num_carried: int = 1, **options):
    """``step(variables, ..., batch)`` over all devices, compiled once per options."""
    return _compiled(
        step,
        model,
        tuple(config.image_mean),
        tuple(config.image_std),
        num_carried,
        tuple(sorted(options.items())),
    )


@functools.lru_cache(maxsize=64)
def _compiled(step, model, mean, std, num_carried, options):
    return jax.pmap(
        functools.partial(
            step, model=model, image_stats={"mean": mean, "std": std}, **dict(options)
        ),
        axis_name=AXIS,
        in_axes=(None,) * num_carried + (0,),
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
        values = {**fn(shard(batch)), "place": batch["place"]}
        values = jax.device_get(values)
        real = batch["example_mask"] > 0
        parts.append({k: _unshard(v, len(real))[real] for k, v in values.items()})
        if progress:
            progress()
    values = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    if jax.process_count() > 1:
        values = _gather(values)
    order = np.argsort(values.pop("place"))
    return {k: v[order] for k, v in values.items()}


def placed_batches(config, source):
    """The evaluation batches of a source with ``place`` [B] int32."""
    size = config.batch_size // jax.process_count()
    local = np.arange(size) * jax.process_count() + jax.process_index()
    batches = pipeline.iterate(eval_batches(config, source))
    for number, batch in enumerate(batches):
        place = (number * config.batch_size + local).astype(np.int32)
        yield {**batch, "place": place}


def _unshard(values, size):
    return np.asarray(values).reshape(size, *values.shape[2:]) if size else values


class Examples:
    """Some examples of a source, by index."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"no example {index}")
        return self._source[int(self._indices[index])]


def first_examples(source, number: int | None):
    """The first examples of a source; all of it if number is None or more."""
    if number is None or number >= len(source):
        return source
    return Examples(source, range(number))


def data_set_moments(config, model, variables, source):
    """``feature_stats.moments`` of ``data_set_stats``."""
    return feature_stats.moments(data_set_stats(config, model, variables, source))


def data_set_stats(config, model, variables, source, *, num_examples=1024):
    """FeatureStats of the first examples of a split, in evaluation mode."""
    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    shape = jax.eval_shape(
        lambda x: model.apply(variables, x, method="features"), images
    ).shape
    stats = feature_stats.init(shape[1:])
    num_batches = -(-min(num_examples, len(source)) // config.batch_size)
    batches = eval_batches(config, source, shard=(0, 1))[:num_batches]
    for batch in pipeline.iterate(batches):
        stats = _update_stats(
            variables,
            stats,
            batch["image"],
            batch["example_mask"],
            model=model,
            image_stats=tuple(image_stats(config).items()),
        )
    return stats


@functools.partial(jax.jit, static_argnames=("model", "image_stats"))
def _update_stats(variables, stats, images, mask, *, model, image_stats):
    images = normalize_images(images, **dict(image_stats))
    features = model.apply(variables, images, method="features")
    return feature_stats.update(stats, features, mask)


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
    padded = {
        k: np.pad(v, [(0, sizes.max() - size)] + [(0, 0)] * (v.ndim - 1))
        for k, v in values.items()
    }
    gathered = multihost_utils.process_allgather(padded)
    return {
        k: np.concatenate([row[:n] for row, n in zip(v, sizes, strict=True)])
        for k, v in gathered.items()
    }
