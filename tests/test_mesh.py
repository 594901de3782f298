"""Images spread over a mesh, whose axes ``jax.make_mesh`` makes ``Explicit``."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ibsgl_jax import (
    attribution,
    bottleneck,
    boxes,
    chunks,
    feature_stats,
    guidance,
    localization,
    losses,
    metrics,
    models,
    perturbation,
)

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(KEY, (8, 12, 12, 3))
MAPS = jax.random.uniform(KEY, (8, 12, 12))
LABELS = jnp.arange(8) % 5
WEIGHTS = jax.random.normal(KEY, (3, 3, 3, 4))
KERNEL = jax.random.normal(KEY, (4, 5))
POOLED = models.PooledLinear(kernel=KERNEL, bias=jnp.zeros(5))


def convolve(images, weights):
    return jax.nn.relu(
        jax.lax.conv_general_dilated(
            images, weights, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )


def features_fn(images):
    return convolve(images, WEIGHTS)


def inner_head(features):
    weights = jnp.concatenate([WEIGHTS, WEIGHTS[:, :, :1]], axis=2)
    return jnp.mean(convolve(features, weights), axis=(1, 2)) @ KERNEL


def prob_fn(images):
    return jax.nn.softmax(inner_head(features_fn(images)))[:, 0]


FEATURES = features_fn(IMAGES)
STATS = feature_stats.update(feature_stats.init(FEATURES.shape[1:]), FEATURES)
MOMENTS = feature_stats.moments(STATS)
CONFIG = bottleneck.BottleneckConfig(num_steps=3, num_samples=2)


def attribute(method, head_fn=inner_head, **options):
    def maps(images, labels):
        return attribution.attribute(
            method, features_fn, head_fn, images, labels, chunk_size=3, **options
        )

    return maps, (IMAGES, LABELS)


def many_attribute(method, **options):
    """Two chunks on each device."""
    one, (images, labels) = attribute(method, POOLED, **options)
    return one, (jnp.tile(images, (2, 1, 1, 1)), jnp.tile(labels, 2))


def solved(head_fn, key):
    def maps(features, labels):
        return bottleneck.attribute(
            key, head_fn, features, labels, MOMENTS, config=CONFIG
        )

    return maps, (FEATURES, LABELS)


def penalty_gradient(features, labels):
    config = guidance.GuidanceConfig(bottleneck=CONFIG)

    def total(features):
        return jnp.sum(
            guidance.penalty(
                KEY, inner_head, features, labels, STATS, 100, config=config
            ).penalty
        )

    return jax.grad(total)(features)


IB = {"key": KEY, "moments": MOMENTS, "config": CONFIG}
BASELINE = jnp.zeros((1, 1, 3))
CASES = {
    "ib": attribute("ib", **IB),
    "ib, chunks": many_attribute("ib", **IB),
    "hirescam": attribute("hirescam"),
    "hirescam, chunks": many_attribute("hirescam"),
    "integrated_gradients": attribute("integrated_gradients", num_steps=3),
    "bottleneck, any head": solved(inner_head, KEY),
    "bottleneck, pooled head": solved(POOLED, KEY),
    "bottleneck, keys": solved(POOLED, jax.random.split(KEY, 8)),
    "penalty's gradient": (penalty_gradient, (FEATURES, LABELS)),
    "feature_kl": (lambda x: losses.feature_kl(x, 1.1 * x), (FEATURES,)),
    "keep_top": (
        lambda images, maps: metrics.keep_top(images, maps, fraction=0.2),
        (IMAGES, MAPS),
    ),
    "rank correlation": (
        lambda maps: metrics.rank_correlation(maps, maps[:, ::-1]),
        (MAPS,),
    ),
    "boxes": (boxes.boxes, (MAPS,)),
    "pointing": (
        lambda maps: localization.pointing_hit(maps, maps > 0.9)[0],
        (MAPS,),
    ),
    "road": (
        lambda images, maps: perturbation.road(KEY, prob_fn, images, maps),
        (IMAGES, MAPS),
    ),
    "degradation": (
        lambda images, maps: perturbation.degradation(
            prob_fn, images, maps, BASELINE, tile=4
        ),
        (IMAGES, MAPS),
    ),
    "deletion_insertion": (
        lambda images, maps: perturbation.deletion_insertion(
            prob_fn, images, maps, BASELINE
        ),
        (IMAGES, MAPS),
    ),
}


def spread_over(mesh, *arrays):
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("name", list(CASES))
def test_explicit_axes(name):
    function, arrays = CASES[name]
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,))
    compiled = jax.jit(function)
    want = compiled(*arrays)
    got = compiled(*spread_over(mesh, *arrays))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


# With Auto axes a CPU merges those of the bottleneck's maps, wherever they are.
@pytest.mark.parametrize(
    ("method", "axes"),
    [("ib", AxisType.Explicit)]
    + list(
        itertools.product(("hirescam", "gradient"), (AxisType.Auto, AxisType.Explicit))
    ),
)
def test_no_image_leaves_its_device(method, axes):
    """Each device has its own maps in the end, and ran the network on its own alone."""
    options = IB if method == "ib" else {}
    function, arrays = many_attribute(method, **options)
    mesh = jax.make_mesh((4,), ("data",), (axes,))
    images, labels = spread_over(mesh, *arrays)
    maps = function(images, labels)
    assert maps.sharding.is_equivalent_to(images.sharding, maps.ndim)
    lowered = functools.partial(
        attribution._attribute.lower,
        chunks.as_pytree(features_fn),
        POOLED,
        None,
        images,
        labels,
        options.get("key"),
        options.get("moments"),
        method=method,
        channels="abs_sum",
        chunk_size=3,
        options=(("config", CONFIG),) if method == "ib" else (),
    )
    assert not _collectives(lowered(num_shards=4))
    if axes == AxisType.Auto:  # what it took when the chunks were cut across devices
        assert _collectives(lowered(num_shards=1))


def _collectives(lowered):
    return re.findall(r"all-(?:gather|to-all|reduce)\w*\(", lowered.compile().as_text())
