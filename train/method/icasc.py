"""ICASC's attention separation, a rival: the maps of two classes apart in place."""

import jax
import jax.numpy as jnp

from ibsgl_jax import losses, metrics, saliency, tokens
from train.method.fields import numbers


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    del model, context
    positive = (0, float("inf"))
    return make_icasc_penalty(
        **numbers(phase, weight=positive, omega=positive, threshold=(0, 1))
    )


def make_icasc_penalty(*, weight, omega, threshold):
    """``weight * separation`` per example.

    The separation of ``attention_separation`` at the tapped layer, in training mode as
    the task's own pass (see ``rrr``). The gradient flows through the maps into backbone
    and head, so it is of second order in the head.

    Args:
      weight: of the separation; the paper's is 1.
      omega, threshold: of the soft mask, see ``losses.soft_mask``.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Wang et al., "Sharpen Focus: Learning with Attention Separability and
    Consistency", ICCV 2019. Its separation at an inner layer and its consistency
    between layers are left out.
    """

    def penalty_fn(forward):
        head_fn, features, _ = tokens.as_map(forward.head_fn, forward.features)
        separation = attention_separation(
            head_fn,
            features,
            forward.labels,
            saliency.runner_up(forward.logits, forward.labels),
            omega=omega,
            threshold=threshold,
        )
        diagnostics = {"attention_separation": metrics.sum_and_count(separation)}
        return weight * separation, forward.feature_stats, diagnostics

    return penalty_fn


def attention_separation(head_fn, features, labels, others, *, omega, threshold):
    """``2 sum(min(A_t, A_o) M) / sum(A_t + A_o)``, the overlap within A_t's soft mask.

    Args:
      head_fn, features: as in ``attention``.
      labels, others: int [N], the true class t and the one it is confused with, o.
      omega, threshold: M is ``losses.soft_mask`` of A_t divided by its maximum.

    Returns:
      [N] in [0, 1]; 0 where both maps are all zero.

    Reference: Wang et al. 2019, equations 3 and 4. Where we differ: the threshold is in
    the unit of the map over each image's maximum, whose minimum is not taken off.
    """
    target = attention(head_fn, features, labels)
    other = attention(head_fn, features, others)
    mask = losses.soft_mask(
        saliency.normalize(target), omega=omega, threshold=threshold
    )
    return 2.0 * losses.saliency_suppression(target, other, mask)


def attention(head_fn, features, classes):
    """ICASC's map: ``ReLU(sum_k mean_hw(ReLU(dy/dA_k)) A_k)``.

    Args:
      head_fn: features [N, H, W, K] -> logits [N, C].
      features: [N, H, W, K].
      classes: int [N].

    Returns:
      [N, H, W], differentiable in the features and in what head_fn holds.
    """

    def class_logits(features):
        logits = head_fn(features)
        return jnp.sum(jnp.take_along_axis(logits, classes[:, None], axis=1))

    gradient = jax.grad(class_logits)(features)
    weights = jnp.mean(jax.nn.relu(gradient), axis=(1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * features, axis=-1))
