"""Measures of predictions: likelihood, accuracy, calibration.

The rules of ``metrics`` hold. Imports jax, chex and this library only.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax import map_measures

# How logits become probabilities: one of the classes, or each label by itself.
LINKS = ("softmax", "sigmoid")


class CalibrationBins(NamedTuple):
    """Sums per confidence bin, each [num_bins]; add them over batches and devices."""

    confidence: chex.Array
    correct: chex.Array
    count: chex.Array


def check_link(link: str) -> None:
    """ValueError unless it is one of ``LINKS``."""
    if link not in LINKS:
        raise ValueError(f"link={link!r}: choose one of {LINKS}")


def probabilities(logits: chex.Array, *, link: str = "softmax") -> chex.Array:
    """Of all classes of a head's logits [N, C]: [N, C], by ``link`` as in ``nll``."""
    check_link(link)
    return jax.nn.softmax(logits) if link == "softmax" else jax.nn.sigmoid(logits)


def probability(
    logits: chex.Array, classes: chex.Array, *, link: str = "softmax"
) -> chex.Array:
    """The probability of one class [N] per image, from logits [N, C]: [N].

    Args:
      logits: [N, C]; C may be 1 with the sigmoid.
      classes: int [N].
      link: "softmax", or "sigmoid" for a head with several labels or a single logit.
        AD and AI (``metrics.drop``, ``increase``) want the head's own.
    """
    chex.assert_rank(classes, 1)
    return jnp.exp(-nll(logits, classes, link=link))


def nll(logits: chex.Array, labels: chex.Array, *, link: str = "softmax") -> chex.Array:
    """The negative log-likelihood of the labels under logits [N, C]: [N], nats.

    Args:
      logits: [N, C].
      labels: int [N]; with ``link="sigmoid"`` the likelihood of that one label being
        there. Or, of a multi-label head, all of an image's, [N, C] in [0, 1]: the mean
        over the classes of the binary cross-entropies. A logit's gradient is then
        (p - y) / C where a softmax has p - y, and all logits at zero cost log 2, not
        log C.

    Raises:
      ValueError: unknown link; labels [N, C] under a softmax.
    """
    check_link(link)
    chex.assert_rank([logits, labels], [2, {1, 2}])
    logits = logits.astype(jnp.float32)
    if labels.ndim == 2:
        if link == "softmax":
            raise ValueError(
                "labels [N, C], of a multi-label head, under a softmax, which knows "
                "one of each image: set link='sigmoid', or give int [N]"
            )
        chex.assert_equal_shape([logits, labels])
        there = labels.astype(jnp.float32)
        log_yes, log_no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        return -jnp.mean(there * log_yes + (1.0 - there) * log_no, axis=1)
    if link == "softmax":
        log_probs = jax.nn.log_softmax(logits)
    else:
        log_probs = jax.nn.log_sigmoid(logits)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """1 where the highest logit [N, C] is the label's [N], else 0: float32 [N].

    Of equal logits the first counts; a row with a NaN is wrong. Labels [N, C] in {0, 1}
    of a multi-label head: 1 where the logits above 0 are those of the labels, all of
    them and no other (exact match).
    """
    chex.assert_rank([logits, labels], [2, {1, 2}])
    if labels.ndim == 2:
        chex.assert_equal_shape([logits, labels])
        right = jnp.all((logits > 0) == map_measures.is_positive(labels), axis=1)
    else:
        right = jnp.argmax(logits, axis=1).astype(jnp.int32) == labels.astype(jnp.int32)
    return (right & ~jnp.isnan(logits).any(axis=1)).astype(jnp.float32)


def label_accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """The share of the classes that a multi-label head answers rightly: float32 [N].

    Args:
      logits: [N, C]; above 0 says that the label is there.
      labels: [N, C] in {0, 1}.
    """
    chex.assert_equal_shape([logits, labels])
    right = (logits > 0) == map_measures.is_positive(labels)
    return jnp.mean(right.astype(jnp.float32), axis=1)


def calibration_bins(
    logits: chex.Array,
    labels: chex.Array,
    *,
    mask: chex.Array | None = None,
    num_bins: int = 15,
) -> CalibrationBins:
    """The sums behind ``calibration_error``, to be added over batches and devices.

    Args:
      logits: [N, C].
      labels: int [N].
      mask: [N], which examples count; None: all. A row with a NaN never counts.
      num_bins: equal bins of the confidence (highest probability); a value on a
        border belongs to the upper bin, 1 to the last.

    Returns:
      CalibrationBins.
    """
    chex.assert_rank([logits, labels], [2, 1])
    confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=1)
    counted = ~jnp.isnan(confidence)
    if mask is not None:
        counted &= map_measures.is_positive(mask)
    confidence = jnp.where(counted, confidence, 0.0)
    index = jnp.minimum((confidence * num_bins).astype(jnp.int32), num_bins - 1)
    member = jax.nn.one_hot(index, num_bins) * counted[:, None].astype(jnp.float32)

    def bin_sums(values):
        return jnp.sum(values[:, None] * member, axis=0)

    return CalibrationBins(
        confidence=bin_sums(confidence),
        correct=bin_sums(accuracy(logits, labels)),
        count=jnp.sum(member, axis=0),
    )


def calibration_error(bins: CalibrationBins) -> chex.Array:
    """The expected calibration error: mean over examples of |accuracy - confidence|
    of their bin.

    Args:
      bins: the summed ``calibration_bins`` of the whole split.

    Returns:
      A scalar in [0, 1]; 0 without examples.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    gap = jnp.sum(jnp.abs(bins.correct - bins.confidence))
    return map_measures.ratio(gap, jnp.sum(bins.count))
