"""A small case for the tests of guidance: two right predictions and two wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import bottleneck, guidance, saliency
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.guidance import GuidanceConfig
from ibsgl_jax.models import PooledLinear

FEW = bottleneck.BottleneckConfig(num_steps=2, num_samples=1)


def small_case(seed=0, n=4, shape=(3, 4, 5), num_classes=3):
    """(head, features, labels, teacher): two right predictions, two wrong."""
    draw = np.random.default_rng(seed)
    head = PooledLinear(
        jnp.asarray(draw.normal(0.7, 1.0, (shape[-1], num_classes)), jnp.float32),
        jnp.zeros(num_classes),
    )
    features = jnp.asarray(draw.gamma(1.0, 1.0, (n, *shape)), jnp.float32)
    predicted = jnp.argmax(head(features), axis=-1)
    labels = predicted.at[2:].set((predicted[2:] + 1) % num_classes)
    teacher = jnp.asarray(draw.gamma(1.0, 1.0, (n, *shape[:2])), jnp.float32)
    return head, features, labels, teacher


def small_moments(features):
    return Moments(
        mean=jnp.mean(features, axis=0),
        std=jnp.std(features, axis=0),
        active=jnp.ones(features.shape[1:], bool),
    )


@functools.partial(jax.jit, static_argnames="config")
def guide_to(head, features, labels, teacher, config=None):
    """Guided by a given teacher: neither key nor moments are needed."""
    return guidance.guide(
        None, head, features, labels, None, config=config, teacher=teacher
    )


@jax.jit
def guide_few(key, head, features, labels, moments):
    return guidance.guide(
        key, head, features, labels, moments, config=GuidanceConfig(bottleneck=FEW)
    )


def maps_of(head, features, labels):
    other = saliency.runner_up(head(features), labels)
    return (
        saliency.class_saliency(head, features, labels),
        saliency.class_saliency(head, features, other),
    )
