"""Right for the Right Reasons, a rival: no input gradient outside of the mask."""

import jax
import jax.numpy as jnp

from ibsgl_jax import metrics
from train.method import masks
from train.method.fields import numbers
from train.method.step import training_logits


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    del context
    return make_rrr_penalty(model, **numbers(phase, weight=(0, float("inf"))))


def make_rrr_penalty(model, *, weight):
    """``weight * sum((1 - mask) g^2)`` per example, g the gradient in the image.

    g is that of the sum over all classes and images of the log probabilities, in
    training mode as the task's own pass: with BatchNorm an image has a part in what is
    said of the others too. In evaluation mode it would be that of another network,
    which its running statistics make flat while the trained one keeps its gradients.
    Its unit is one over a normalised pixel. An example without a mask (all zero) has no
    penalty.

    Args:
      model: with features and head methods.
      weight: the paper's lambda_1, which has no one value; it is chosen so that both
        losses are of one order.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Ross, Hughes and Doshi-Velez, "Right for the Right Reasons: Training
    Differentiable Models by Constraining their Explanations", IJCAI 2017, equation 1.
    Where we differ: the annotation is what is outside of the object's mask.
    """

    def penalty_fn(forward):
        def log_probs(images):
            logits = training_logits(model, forward.variables, images, forward.keys)
            return jnp.sum(jax.nn.log_softmax(logits))

        gradient = jax.grad(log_probs)(forward.images)
        wrong = masks.outside(forward.batch["mask"])[..., None] * jnp.square(gradient)
        wrong = jnp.sum(wrong, axis=(1, 2, 3))
        sums = {"gradient_outside": metrics.sum_and_count(wrong)}
        return weight * wrong, forward.feature_stats, sums

    return penalty_fn
