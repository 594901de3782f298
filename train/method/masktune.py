"""MaskTune, a rival: one more epoch on images without what a network looked at."""

import jax
import jax.numpy as jnp

from ibsgl_jax import metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.method.step import training_logits


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for.

    Raises:
      ValueError: the phase's ``teacher`` is no phase.
    """
    if phase.get("teacher") not in context.phases:
        raise ValueError(
            f"teacher={phase.get('teacher')!r}: name the phase whose maps are hidden, "
            f"of {', '.join(context.phases)}"
        )
    return make_masktune_penalty(model)


def make_masktune_penalty(model):
    """``task(masked) - task(image)`` per example: the step then learns the masked ones.

    The saliency of the label, L^c of the frozen ``Forward.teacher_variables``, is
    brought to the size of the image; what is above the mean and two standard deviations
    of its positive values is hidden (each channel's minimum in the image). There is no
    weight to choose, but the phase's length and its learning rate.

    Args:
      model: with features and head methods.

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.

    Reference: Asgari et al., "MaskTune: Mitigating Spurious Correlations by Forcing to
    Explore", NeurIPS 2022, section 2. Where we differ: L^c of the label for xGradCAM of
    the predicted class; what is hidden has each channel's minimum, not 0; the running
    moments of BatchNorm are those of whole images, as at test; no selective
    classification.
    """

    def penalty_fn(forward):
        frozen = jax.lax.stop_gradient(forward.teacher_variables)
        labels = forward.labels
        _, maps = saliency.logits_and_saliencies(
            make_head_fn(model, frozen),
            model.apply(frozen, forward.images, method="features"),
            labels[:, None],
        )
        maps = saliency.upsample(maps[:, 0], forward.images.shape[1:3])
        hidden = most_salient(maps)
        lowest = jnp.min(forward.images, axis=(1, 2), keepdims=True)
        without = jnp.where(hidden[..., None], lowest, forward.images)
        logits = training_logits(model, forward.variables, without, forward.keys)
        task = forward.task_fn(logits)
        sums = {
            "masked_task_loss": metrics.sum_and_count(task),
            "hidden": metrics.sum_and_count(jnp.mean(hidden, axis=(1, 2))),
        }
        penalty = task - forward.task_fn(forward.logits)
        return penalty, forward.feature_stats, sums

    return penalty_fn


def most_salient(maps):
    """bool [N, H, W]: above mean + 2 std of each map's positive values."""
    positive = maps > 0
    mean = jnp.mean(maps, axis=(1, 2), where=positive, keepdims=True)
    std = jnp.std(maps, axis=(1, 2), where=positive, keepdims=True)
    return positive & (maps > mean + 2.0 * std)
