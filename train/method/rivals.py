"""Rivals to train against: Saliency Guided Training and ICASC's attention separation.

Pure steps with the signature of ``step.plain_step``, so that ``python -m train`` runs
them as phases.
"""

import jax
import jax.numpy as jnp

from ibsgl_jax import losses, metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.method.step import penalized_step


def saliency_guided_step(state, batch, *, mask_fraction, weight, **options):
    """One step on ``mean(CE(f(x), y) + weight * KL(f(x) || f(x~)))``.

    x~ is x with its ``round(mask_fraction * H * W)`` least important pixels replaced.
    The importance of a pixel is the magnitude of the gradient of the label's logit,
    summed over channels and taken in evaluation mode, so that images do not interact.
    A pixel is replaced in all its channels, each by a uniform draw between that
    channel's minimum and maximum in the image. The gradient flows through f(x) and
    f(x~), not through the choice of pixels. Both passes use the statistics of their
    batch; the running statistics are those of x.

    Args:
      state, batch, **options: as in ``guided.guided_step``.
      mask_fraction: in (0, 1).
      weight: lambda of the divergence.

    Returns:
      (state, metrics), as ``guided.guided_step``.

    Reference: Ismail et al., "Improving Deep Learning Interpretability by Saliency
    Guided Training", NeurIPS 2021, Algorithm 1. Where we differ: magnitudes, where the
    paper's gradients keep their sign; whole pixels.
    """
    model = options["model"]

    def penalty_fn(forward):
        frozen = jax.lax.stop_gradient(forward.variables)

        def label_logits(images):
            logits = model.apply(frozen, images)
            return jnp.sum(jnp.take_along_axis(logits, forward.labels[:, None], axis=1))

        importance = jnp.sum(jnp.abs(jax.grad(label_logits)(forward.images)), axis=-1)
        noise_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(forward.keys)
        masked = mask_least_important(
            noise_keys, forward.images, importance, fraction=mask_fraction
        )
        masked_logits, _ = model.apply(
            forward.variables,
            masked,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_keys[0]},
        )
        kl = prediction_kl(forward.logits, masked_logits)
        return (
            weight * kl,
            state.feature_stats,
            {"prediction_kl": metrics.sum_and_count(kl)},
        )

    return penalized_step(state, batch, penalty_fn, **options)


def mask_least_important(keys, images, importance, *, fraction):
    """The images with their least important pixels replaced by uniform noise.

    Args:
      keys: [N].
      images: [N, H, W, C].
      importance: [N, H, W]; of equal values the later in row-major order goes first.
      fraction: ``round(fraction * H * W)`` pixels are replaced.

    Returns:
      [N, H, W, C]; a constant, no gradient flows into the arguments.
    """
    images, importance = jax.lax.stop_gradient((images, importance))
    num_pixels = importance.shape[1] * importance.shape[2]
    kept = num_pixels - round(fraction * num_pixels)
    removed = (metrics.pixel_ranks(importance) >= kept)[..., None]
    low = jnp.min(images, axis=(1, 2), keepdims=True)
    high = jnp.max(images, axis=(1, 2), keepdims=True)
    draws = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return jnp.where(removed, low + (high - low) * draws, images)


def prediction_kl(logits, other_logits):
    """``KL(softmax(logits) || softmax(other))`` per image [N], in nats."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def icasc_step(state, batch, *, weight, omega, threshold, **options):
    """One step on ``mean(CE(f(x), y) + weight * separation)``.

    The separation of ``attention_separation`` at the tapped layer. The gradient flows
    through the maps into backbone and head, so it is of second order in the head.

    Args:
      state, batch, **options: as in ``guided.guided_step``.
      weight: of the separation; the paper's is 1.
      omega, threshold: of the soft mask, see ``losses.soft_mask``.

    Returns:
      (state, metrics), as ``guided.guided_step``.

    Reference: Wang et al., "Sharpen Focus: Learning with Attention Separability and
    Consistency", ICCV 2019. Its separation at an inner layer and its consistency
    between layers are left out.
    """
    model = options["model"]

    def penalty_fn(forward):
        separation = attention_separation(
            make_head_fn(model, forward.variables),
            forward.features,
            forward.labels,
            saliency.runner_up(forward.logits, forward.labels),
            omega=omega,
            threshold=threshold,
        )
        diagnostics = {"attention_separation": metrics.sum_and_count(separation)}
        return weight * separation, state.feature_stats, diagnostics

    return penalized_step(state, batch, penalty_fn, **options)


def attention_separation(head_fn, features, labels, others, *, omega, threshold):
    """``2 sum(min(A_t, A_o) M) / sum(A_t + A_o)``, the overlap within A_t's soft mask.

    Args:
      head_fn, features: as in ``attention``.
      labels, others: int [N], the true class t and the one it is confused with, o.
      omega, threshold: M is ``losses.soft_mask`` of A_t divided by its maximum.

    Returns:
      [N] in [0, 1]; 0 where both maps are all zero.

    Reference: Wang et al. 2019, equations 3 and 4. Where we differ: minimum and
    maximum are each image's own, and the threshold is in the unit of the scaled map.
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


STEPS = {"saliency_guided": saliency_guided_step, "icasc": icasc_step}

# The fields that a phase has beside those of a plain one, and where they may lie.
FIELDS = {
    "saliency_guided": {"mask_fraction": (0, 1), "weight": (0, float("inf"))},
    "icasc": {
        "weight": (0, float("inf")),
        "omega": (0, float("inf")),
        "threshold": (0, 1),
    },
}


def options(phase) -> dict:
    """The options of the step of a phase, from its section of the config.

    Raises:
      ValueError: a field that is absent or out of range.
    """
    values = {}
    for field, (low, high) in FIELDS[phase.method].items():
        value = phase.get(field)
        if value is None or not low <= value <= high:
            raise ValueError(f"{field}={value}: give a number in [{low}, {high}]")
        values[field] = float(value)
    return values
