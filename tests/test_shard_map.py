"""Loops under ``jax.shard_map``, which checks what differs from device to device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ibsgl_jax import bottleneck, feature_stats, metrics, models, perturbation

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(KEY, (4, 8, 8, 3))
MAPS = jax.random.uniform(KEY, (4, 8, 8))
HEAD = models.PooledLinear(kernel=jax.random.normal(KEY, (3, 5)), bias=jnp.zeros(5))


def information_bottleneck(images, maps):
    del maps
    stats = feature_stats.update(feature_stats.init((8, 8, 3)), IMAGES)
    labels = jnp.zeros(len(images), jnp.int32)
    return bottleneck.attribute(
        KEY, HEAD, images, labels, feature_stats.moments(stats)
    ).saliency


FUNCTIONS = {
    "match_area": lambda images, maps: metrics.match_area(maps, 0.2),
    "road": lambda images, maps: perturbation.road(
        KEY, lambda x: jnp.mean(x, axis=(1, 2, 3)), images, maps
    ),
    "bottleneck": information_bottleneck,
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_is_the_same_on_two_devices(name):
    function = FUNCTIONS[name]
    mesh = jax.make_mesh(
        (2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spread = PartitionSpec("data")
    over = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=spread, out_specs=spread
    )
    halves = [function(IMAGES[i : i + 2], MAPS[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(
        jax.jit(over(function))(IMAGES, MAPS), jnp.concatenate(halves), atol=1e-5
    )
