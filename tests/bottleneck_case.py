"""Small and golden cases of the bottleneck, for the tests of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import bottleneck, targets
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.models import PooledLinear
from tests import golden_net

MODEL = golden_net.load("net1_model")
STATS = golden_net.load("net1_iba_stats")
IBA = golden_net.load("net1_iba")
SHORT = BottleneckConfig(num_steps=4, num_samples=3)
SOFTMAX = targets.make_loss_fn("softmax")


def golden_moments(tap):
    names = ("mean", "std", "active")
    return Moments(*(jnp.asarray(STATS[f"{name}_{tap}"]) for name in names))


def cells_first(maps):
    """[N, H, W, K] as the loop inside ``attribute`` holds it: [H, W, N, K]."""
    return jnp.moveaxis(jnp.asarray(maps), 0, 2)


def loop_arguments(features, labels, moments):
    """The arguments of ``attribute`` in the layout of its loop."""
    return (
        cells_first(features),
        labels,
        Moments(*(m[:, :, None] for m in moments)),
    )


def small_case(n=3, size=(3, 4), channels=5, num_classes=3, seed=0):
    """(head, features, labels, moments) with one inactive and one constant channel."""
    draw = np.random.default_rng(seed)
    shape = (*size, channels)
    head = PooledLinear(
        jnp.asarray(3 * draw.normal(size=(channels, num_classes)), jnp.float32),
        jnp.asarray(draw.normal(size=num_classes), jnp.float32),
    )
    features = jnp.asarray(draw.gamma(1.0, 1.0, (n, *shape)), jnp.float32)
    std = draw.uniform(0.3, 1.5, shape).astype(np.float32)
    active = np.ones(shape, bool)
    if channels > 1:
        std[..., 0] = 0.0  # clamped to min_std
        active[..., -1] = False
    moments = Moments(
        mean=jnp.asarray(draw.uniform(0.5, 1.5, shape), jnp.float32),
        std=jnp.asarray(std),
        active=jnp.asarray(active),
    )
    return head, features, jnp.asarray(np.arange(n) % num_classes), moments


def generic(head):
    """The same head behind a function, which hides that it is pooled and linear."""
    return lambda a: head(a)


@functools.partial(jax.jit, static_argnames=("config", "pooled"))
def _run_small(key, head, features, labels, moments, alpha, config, pooled):
    return bottleneck.attribute(
        key,
        head if pooled else generic(head),
        features,
        labels,
        moments,
        config=dataclasses.replace(config, initial_alpha=alpha),
    )


def run_small(
    key, head, features, labels, moments, *, alpha=5.0, config=SHORT, pooled=True
):
    return _run_small(key, head, features, labels, moments, alpha, config, pooled)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(leaf))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
