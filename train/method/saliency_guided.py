"""Saliency Guided Training, a rival: the same answer without the unimportant pixels."""

import jax
import jax.numpy as jnp

from ibsgl_jax import metrics
from train.method.fields import numbers
from train.method.step import training_logits


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    del context
    return make_saliency_guided_penalty(
        model, **numbers(phase, mask_fraction=(0, 1), weight=(0, float("inf")))
    )


def make_saliency_guided_penalty(model, *, mask_fraction, weight):
    """``weight * KL(f(x) || f(x~))`` per example.

    x~ is x with its ``round(mask_fraction * H * W)`` least important pixels replaced.
    The importance of a pixel is the magnitude of the gradient of the label's logit,
    summed over channels and taken in evaluation mode, so that images do not interact.
    A pixel is replaced in all its channels, each by a uniform draw between that
    channel's minimum and maximum in the image. The gradient flows through f(x) and
    f(x~), not through the choice of pixels. Both passes use the statistics of their
    batch; the running statistics are those of x.

    Args:
      model: with features and head methods.
      mask_fraction: in (0, 1).
      weight: lambda of the divergence.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Ismail et al., "Improving Deep Learning Interpretability by Saliency
    Guided Training", NeurIPS 2021, Algorithm 1. Where we differ: magnitudes, where the
    paper's gradients keep their sign; whole pixels.
    """

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
        logits = training_logits(model, forward.variables, masked, dropout_keys)
        kl = prediction_kl(forward.logits, logits)
        return (
            weight * kl,
            forward.feature_stats,
            {"prediction_kl": metrics.sum_and_count(kl)},
        )

    return penalty_fn


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
