"""Rand-R4, a rival: no input gradient outside of the mask, nor near the image."""

import jax
import jax.numpy as jnp
import optax

from ibsgl_jax import metrics
from train.method import masks
from train.method.fields import numbers
from train.method.step import training_logits


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    del context
    ranges = dict(weight=(0, float("inf")), epsilon=(0, 100), num_samples=(1, 1000))
    options = numbers(phase, **ranges)
    options["num_samples"] = int(options["num_samples"])
    return make_rand_r4_penalty(model, **options)


def make_rand_r4_penalty(model, *, weight, epsilon, num_samples):
    """``weight * ||(1 - mask) max_d |g(x + d)| ||_2`` per example.

    g is the gradient of the batch's cross-entropy in the image, in training mode (see
    ``rrr``), d = 0 or a uniform draw in [0, epsilon] on the pixels outside of the mask,
    and the maximum that of each pixel and channel. BatchNorm sees the batch of one draw
    at a time. An example without a mask (all zero) has no penalty.

    Args:
      model: with features and head methods.
      weight: of the norm.
      epsilon: in normalised pixels.
      num_samples: draws d beside 0.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Ghitu, Piratla and Wicker, "Model Guidance via Robust Feature
    Attribution", TMLR 2025: the largest gradient of R4, sampled. Where we differ: their
    published code takes ``|g(x + d) - g(x)|``, which a gradient that is the same
    everywhere passes; the norm is of each image and not divided by its pixels.
    """

    def penalty_fn(forward):
        images = forward.images
        outside = masks.outside(forward.batch["mask"])[..., None]

        dropout_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(forward.keys)

        def cross_entropy(images):
            logits = training_logits(model, forward.variables, images, dropout_keys)
            return jnp.sum(
                optax.softmax_cross_entropy_with_integer_labels(logits, forward.labels)
            )

        draws = jax.vmap(
            lambda key: jax.random.uniform(key, (num_samples, *images.shape[1:])),
            out_axes=1,
        )(forward.keys)
        near = jnp.concatenate(
            [images[None], images[None] + epsilon * outside[None] * draws]
        )
        # Side by side: on a CPU a loop over the draws takes many times as long.
        gradients = jnp.abs(jax.vmap(jax.grad(cross_entropy))(near))
        wrong = outside * jnp.max(gradients, axis=0)
        # The root has no derivative at 0, where an example has no mask.
        norm = jnp.sqrt(jnp.sum(jnp.square(wrong), axis=(1, 2, 3)) + 1e-12)
        sums = {"largest_outside": metrics.sum_and_count(norm)}
        return weight * norm, forward.feature_stats, sums

    return penalty_fn
