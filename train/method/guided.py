"""The guided step: the task loss and the divergence from features of a better map.

It makes one forward and one backward pass through the backbone, like a plain one:
saliency, bottleneck and feature update live behind it, on the features.
"""

import jax
import jax.numpy as jnp

from ibsgl_jax import bottleneck, feature_stats, guidance, losses, metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.method.state import tap
from train.method.step import penalized_step

# Whose map the saliency should follow, and how the saliency loss reaches the backbone.
TEACHERS = ("bottleneck", "frozen", "average", "mask")
ROUTES = ("target", "direct")


def guided_step(
    state,
    batch,
    teacher_variables=None,
    *,
    config,
    mu,
    decay,
    teacher="bottleneck",
    teacher_layer="",
    route="target",
    when=None,
    only_right=True,
    axis_name=None,
    **options,
):
    """One step on ``mean(task + mu * KL(A || A'))``; Algorithm 1, lines 3 to 12.

    Args:
      state: TrainState; may be donated.
      batch: image uint8 [N, H, W, 3], label int32 [N], place int32 [N] (of the example
        in the global batch; 0 .. N-1 if absent), and mask [N, H, W] for
        ``teacher="mask"``.
      teacher_variables: of the model, for ``teacher="frozen"``.
      config: GuidanceConfig.
      mu: function of the step: weight of the divergence.
      decay: of the moving feature statistics, which are those of the teacher.
      teacher: one of ``TEACHERS``. "bottleneck": of the network itself as it is at this
        step. "frozen": of ``teacher_variables``; "average": of the moving average of
        the parameters; both in evaluation mode, for one more forward pass. "mask": the
        object's true mask (an oracle).
      teacher_layer: inner layer whose bottleneck teaches (a name of
        ``tapping.layer_names``), in evaluation mode; its map is averaged down to the
        features. Costs the rest of the network, forward and backward, at every
        bottleneck step and sample, in a guided step. "": the features before the head.
      route: one of ``ROUTES``. "direct" leaves A' out and descends the saliency loss
        itself, in the head's parameters too: ``mean(task + mu * loss)``,
        second order in the head.
      when: function of the step -> bool, whether this step is guided; the others cost
        a plain step and the divergence. None: always.
      only_right: guide the examples whose prediction is right; False: all of them. A
        network that knows nothing yet has no map worth following, and following it
        keeps a training from scratch at chance.
      axis_name: pmap axis to average over; None for one device.
      **options: of ``penalized_step``.

    Returns:
      (state, metrics): metrics is a dict of (sum, count) float32 pairs.
    """
    model = options["model"]

    def penalty_fn(forward):
        frozen = jax.lax.stop_gradient(forward.features)
        head_fn = make_head_fn(model, jax.lax.stop_gradient(forward.variables))
        now = jnp.bool_(True) if when is None else when(state.step)
        seen, teacher_fn = frozen, head_fn
        tapped = teacher != "mask" and (teacher_layer or teacher != "bottleneck")
        if tapped:
            variables = {
                "bottleneck": forward.variables,
                "frozen": teacher_variables,
                "average": {
                    "params": state.ema_params,
                    "batch_stats": state.batch_stats,
                },
            }[teacher]
            features_fn, teacher_fn = tap(
                model,
                jax.lax.stop_gradient(variables),
                teacher_layer,
                forward.images.shape[1:],
            )
            images = jax.lax.stop_gradient(forward.images)
            seen = _if_guided(when, now, lambda: features_fn(images))
        stats = feature_stats.update_moving(
            forward.feature_stats, seen, decay=decay, axis_name=axis_name
        )
        if tapped:
            stats = jax.tree.map(
                lambda new, old: jnp.where(now, new, old), stats, forward.feature_stats
            )

        def guide():
            if teacher == "mask":
                given = _mask_map(forward.batch, frozen)
            else:
                moments = feature_stats.moments(
                    stats, active_threshold=config.bottleneck.active_threshold
                )
                given = bottleneck.attribute(
                    forward.keys,
                    teacher_fn,
                    seen,
                    forward.labels,
                    moments,
                    config=config.bottleneck,
                ).saliency
                given = _resized(given, frozen)
            return guidance.guide(
                None,
                head_fn,
                frozen,
                forward.labels,
                None,
                config=config,
                teacher=given,
            )

        guided = _if_guided(when, now, guide)
        weight = jnp.broadcast_to(now, forward.labels.shape)
        if only_right:
            weight &= jnp.argmax(guided.logits, axis=-1) == forward.labels
        kl = losses.feature_kl(
            forward.features,
            jnp.where(now, guided.target_features, frozen.astype(jnp.float32)),
            over=config.kl_over,
            floor=config.kl_floor,
        )
        diagnostics = {
            "kl": kl,
            "saliency_loss": guided.loss,
            "saliency_loss_at_target": guided.target_loss,
            "relative_move": guided.relative_move,
            "blank_saliency": guided.blank,
        }
        counted = jnp.broadcast_to(now, kl.shape)
        sums = {k: metrics.sum_and_count(v, counted) for k, v in diagnostics.items()}
        penalty = kl
        if route == "direct":
            _, maps = saliency.logits_and_saliencies(
                make_head_fn(model, forward.variables),
                forward.features,
                jnp.stack([forward.labels, guided.runner_up], axis=1),
                weighting=config.weighting,
            )
            penalty = guidance.saliency_loss(
                maps[:, 0], maps[:, 1], guided.teacher, guided.gate, config
            )
        return mu(state.step) * weight * penalty, stats, sums

    return penalized_step(state, batch, penalty_fn, axis_name=axis_name, **options)


def _if_guided(when, now, make):
    """make(), or zeros in its place where the step is not guided."""
    if when is None:
        return make()
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    return jax.lax.cond(now, make, lambda: nothing)


def _mask_map(batch, features):
    """The true mask at the resolution of the features, [N, H, W]."""
    return _resized(batch["mask"].astype(jnp.float32), features)


def _resized(maps, features):
    """Maps at the resolution of the features; averaged where they are finer."""
    if maps.shape == features.shape[:3]:
        return maps
    return jax.image.resize(maps, features.shape[:3], "linear")
