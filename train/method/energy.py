"""The energy loss, a rival: the saliency's share outside of the mask."""

import jax.numpy as jnp

from ibsgl_jax import metrics, saliency
from train.method import masks
from train.method.fields import numbers


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    del model, context
    return make_energy_penalty(**numbers(phase, weight=(0, float("inf"))))


def make_energy_penalty(*, weight):
    """``weight * (1 - share of L^c inside the mask)`` per example.

    L^c is the positive saliency of the true class on the features, in training mode as
    the task's own pass (see ``rrr``). The gradient flows through it into backbone and
    head, so it is of second order in the head. An example without a mask (all zero) has
    no penalty; one whose map is blank costs 1.

    Args:
      weight: of the localisation loss.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Rao et al., "Studying How to Effectively and Efficiently Guide Models
    with Explanations", ICCV 2023, section 3.3 (energy loss). Where we differ: the
    attribution is this library's L^c, and the mask stands in for the box, a cell of
    the features counting by its share in it.
    """

    def penalty_fn(forward):
        _, maps = saliency.logits_and_saliencies(
            forward.head_fn, forward.features, forward.labels[:, None]
        )
        mask = forward.batch["mask"]
        inside = masks.resized(mask, maps.shape[2:])
        total = jnp.sum(maps[:, 0], axis=(1, 2))
        positive = total > 1e-7
        share = jnp.sum(maps[:, 0] * inside, axis=(1, 2)) / jnp.where(
            positive, total, 1.0
        )
        outside = jnp.where(masks.known(mask), 1.0 - jnp.where(positive, share, 0.0), 0)
        sums = {"saliency_outside": metrics.sum_and_count(outside)}
        return weight * outside, forward.feature_stats, sums

    return penalty_fn
