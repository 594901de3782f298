"""Streaming moments of features: what the bottleneck's noise is drawn from.

One state serves the exact statistics of a data set, the sum over devices and the
moving average of a training run: a moving average is the same merge with the old
weight decayed. Of tokens [N, T, D] the statistics are [T, D]. Imports jax, chex and
``saliency`` only; does no I/O.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax.saliency import check_features


class FeatureStats(NamedTuple):
    """Weight, mean and summed squared deviation of features, per element.

    Attributes:
      count: float32 [], the (possibly decayed) number of examples seen.
      mean: float32 [H, W, K].
      m2: float32 [H, W, K], sum of squared deviations from the mean.
      nonzero: float32 [H, W, K], the number of examples in which the element was not
        zero, decayed like count.
    """

    count: chex.Array
    mean: chex.Array
    m2: chex.Array
    nonzero: chex.Array


class Moments(NamedTuple):
    """What ``bottleneck.attribute`` takes: [H, W, K] each.

    Attributes:
      mean: float32.
      std: float32, unbiased (divisor n - 1), not clamped from below.
      active: bool, non-zero in more than the threshold share of the examples.
    """

    mean: chex.Array
    std: chex.Array
    active: chex.Array


def init(shape: tuple[int, ...]) -> FeatureStats:
    """Statistics of no example at all, for features of shape [H, W, K]."""
    # Three arrays, not one thrice: a caller may donate the state.
    mean, m2, nonzero = (jnp.zeros(shape, jnp.float32) for _ in range(3))
    return FeatureStats(jnp.zeros((), jnp.float32), mean, m2, nonzero)


def merge(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """The statistics of the union of two sets of examples.

    Reference: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979.
    """
    count = a.count + b.count
    # Two empty states: every weight is zero and the result must stay empty.
    share = b.count / jnp.where(count > 0, count, 1.0)
    delta = b.mean - a.mean
    return FeatureStats(
        count=count,
        mean=a.mean + delta * share,
        m2=a.m2 + b.m2 + jnp.square(delta) * a.count * share,
        nonzero=a.nonzero + b.nonzero,
    )


def update(
    state: FeatureStats,
    features: chex.Array,
    mask: chex.Array | None = None,
    *,
    axis_name: str | None = None,
) -> FeatureStats:
    """Add one batch.

    Args:
      state: statistics so far.
      features: [N, H, W, K], any float dtype (accumulated in float32).
      mask: float or bool [N], 0 leaves an example out (padding).
      axis_name: inside pmap or shard_map, the axis over which every device's batch
        is counted; the result is then the same on all of them.

    Returns:
      The statistics of everything seen, exact up to float32 rounding.

    Raises:
      ValueError: features that are neither [N, H, W, K] nor [N, T, D].
    """
    check_features(features)
    chex.assert_shape(state.mean, features.shape[1:])
    batch = _of_batch(features, mask)
    if axis_name is not None:
        batch = merge_across(batch, axis_name)
    return merge(state, batch)


def update_moving(
    state: FeatureStats,
    features: chex.Array,
    mask: chex.Array | None = None,
    *,
    decay: float = 0.95,
    axis_name: str | None = None,
) -> FeatureStats:
    """Add one batch to an exponentially forgetting average.

    The old examples keep ``decay`` of their weight, so after many batches of N the
    average rests on about N / (1 - decay) examples, and the first batch counts fully
    (there is no bias towards the initial zeros to correct).

    Args:
      state, features, mask, axis_name: as in ``update``.
      decay: in [0, 1); 0 keeps the last batch only.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay}: a moving average needs 0 <= decay < 1")
    faded = FeatureStats(
        count=decay * state.count,
        mean=state.mean,
        m2=decay * state.m2,
        nonzero=decay * state.nonzero,
    )
    return update(faded, features, mask, axis_name=axis_name)


def merge_across(state: FeatureStats, axis_name: str) -> FeatureStats:
    """The union over the devices of a pmap or shard_map axis, on every one of them."""
    count = jax.lax.psum(state.count, axis_name)
    safe_count = jnp.where(count > 0, count, 1.0)
    mean = jax.lax.psum(state.mean * state.count, axis_name) / safe_count
    deviation = jnp.square(state.mean - mean) * state.count
    return FeatureStats(
        count=count,
        mean=mean,
        m2=jax.lax.psum(state.m2 + deviation, axis_name),
        nonzero=jax.lax.psum(state.nonzero, axis_name),
    )


def moments(state: FeatureStats, *, active_threshold: float = 0.01) -> Moments:
    """Mean, standard deviation and activity of every element.

    Args:
      state: statistics of at least one example.
      active_threshold: an element is active if the share of the examples in which it
        was not zero exceeds this (strictly, as in the reference code).

    Returns:
      Moments of [H, W, K] arrays; std is 0 where fewer than two examples were seen.

    Reference: Schulz et al., "Restricting the Flow", ICLR 2020, and its published
    code, which takes the same divisor n - 1 and clamps std only when it is used.
    """
    several = state.count > 1
    variance = state.m2 / jnp.where(several, state.count - 1, 1.0)
    share = state.nonzero / jnp.where(state.count > 0, state.count, 1.0)
    return Moments(
        mean=state.mean,
        std=jnp.where(several, jnp.sqrt(variance), 0.0),
        active=share > active_threshold,
    )


def _of_batch(features: chex.Array, mask: chex.Array | None) -> FeatureStats:
    features = features.astype(jnp.float32)
    if mask is None and features.shape[0] == 0:  # a mean of nothing is NaN
        mask = jnp.zeros(0, bool)
    if mask is None:
        count = jnp.float32(features.shape[0])
        mean = jnp.mean(features, axis=0)
        m2 = jnp.sum(jnp.square(features - mean[None]), axis=0)
        nonzero = jnp.sum(features != 0, axis=0, dtype=jnp.float32)
        return FeatureStats(count, mean, m2, nonzero)
    chex.assert_shape(mask, (features.shape[0],))
    keep = mask.astype(bool).reshape(-1, *[1] * (features.ndim - 1))
    count = jnp.sum(mask.astype(bool), dtype=jnp.float32)
    # where, not a product: a padded example may hold anything, NaN included.
    mean = jnp.sum(jnp.where(keep, features, 0.0), axis=0) / jnp.maximum(count, 1.0)
    m2 = jnp.sum(jnp.where(keep, jnp.square(features - mean[None]), 0.0), axis=0)
    nonzero = jnp.sum(keep & (features != 0), axis=0, dtype=jnp.float32)
    return FeatureStats(count, mean, m2, nonzero)
