"""Guidance as a penalty: the divergence from features of a better saliency map.

Saliency, teacher and feature update live behind the backbone, on its features, so a
guided step makes one forward and one backward pass through it, like a plain one. A
teacher at an inner layer, or another network's, costs what its docstring says.
"""

import functools

import jax
import jax.numpy as jnp

from ibsgl_jax import guidance, metrics, saliency, tokens
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_head_fn
from train.method import answers
from train.method.parts import in_parts, part_of
from train.method.teacher import if_guided, is_guided, make_teacher

# How the saliency loss reaches the backbone.
ROUTES = ("target", "direct")


def from_phase(model, phase, context):
    """The penalty that a phase of the configuration asks for."""
    warmup = max(1, round(phase.mu_warmup_epochs * context.steps_per_epoch))
    last = context.num_steps - round(phase.release * context.num_steps)
    when = None
    if phase.every > 1 or last < context.num_steps:

        def when(step):
            return (step % phase.every == 0) & (step < last)

    config = guidance_config(phase, model, context.link)
    is_phase = phase.teacher in context.phases
    teacher_fn = make_teacher(
        model,
        teacher="frozen" if is_phase else phase.teacher,
        method=phase.get("teacher_method", "bottleneck"),
        layer=phase.teacher_layer,
        power=phase.get("teacher_power", 1.0),
        mask_first=phase.get("mask_first", False),
        config=config.bottleneck,
        # Per part of a batch, so that a step forgets as much as in one piece.
        decay=phase.stats_decay ** (1.0 / context.accumulate_steps),
        when=when,
        axis_name=context.axis_name,
    )
    return make_guided_penalty(
        model,
        config=config,
        mu=lambda step: phase.mu * jnp.minimum(1.0, (step + 1) / warmup),
        route=phase.route,
        when=when,
        only_right=phase.only_right,
        teacher_fn=teacher_fn,
        platform=context.platform,
    )


def guidance_config(phase, model, link="softmax") -> guidance.GuidanceConfig:
    """The guidance options of a phase as the library takes them.

    Features of a model that says ``signed_features`` are not clipped.

    Raises:
      ValueError: an option that cannot be, a phase that asks to clip them or that has
        another link than its data.
    """
    options = dict(phase.guidance)
    if options.setdefault("link", link) != link:
        raise ValueError(
            f"guidance.link={options['link']!r} where the data's is {link!r}: set "
            "--config.link, and leave this out"
        )
    if getattr(model, "signed_features", False):
        if options.setdefault("rectify_features", False):
            raise ValueError(
                "guidance.rectify_features=True would clip the signed features of "
                f"{type(model).__name__}: leave it out, or set False"
            )
    return guidance.GuidanceConfig(
        bottleneck=BottleneckConfig(**phase.bottleneck), **options
    )


def make_guided_penalty(
    model,
    *,
    config,
    mu,
    route="target",
    when=None,
    only_right=True,
    teacher_fn,
    platform=None,
):
    """``mu * KL(A || A')`` per example; Algorithm 1, lines 3 to 12.

    Args:
      model: with features and head methods.
      config: GuidanceConfig, with the link of the batches.
      mu: function of the step: weight of the divergence.
      route: one of ``ROUTES``. "direct" leaves A' out and descends the saliency loss
        itself, in training mode and in the head's parameters too:
        ``mean(task + mu * loss)``, second order in the head.
      when: function of the step -> bool, whether this step is guided; the others cost
        a plain step. None: always.
      only_right: guide the examples whose prediction is right; False: all of them. A
        network that knows nothing yet has no map worth following, and following it
        keeps a training from scratch at chance.
      teacher_fn: of ``teacher.make_teacher``; its map is averaged down to the features.
        An example whose map is all zero, as without a mask, is not guided.
      platform: that the step is compiled for; None for any. On a CPU a step that may
        be guided or not takes some examples at a time (``parts``).

    Returns:
      ``penalty_fn(Forward)`` for ``train_step``.
    """

    def penalty_fn(forward):
        now = is_guided(when, forward)
        head_fn = make_head_fn(model, jax.lax.stop_gradient(forward.variables))
        map_fn, seen, stats = teacher_fn(forward, head_fn)

        def guide(part):
            size = tokens.map_size(head_fn, part.features)
            guided = guidance.guide(
                None,
                head_fn,
                part.features,
                part.labels,
                None,
                config=config,
                teacher=_resized(map_fn(part), size),
                num_examples=forward.num_examples,
                positives=part.answers.get("positives"),
            )
            # The divergence's slope is found here, so that other steps pay for neither.
            kl, slope_of = jax.vjp(
                lambda features: guidance.divergence_from(guided, features, config),
                part.features.astype(jnp.float32),
            )
            (slope,) = slope_of(jnp.ones_like(kl))
            return guided._replace(target_features=None), kl, slope

        take = guide
        if when is not None:  # in a condition a loop costs nothing more
            take = functools.partial(in_parts, guide, platform=platform)
        everyone = part_of(forward, seen)
        guided, kl, slope = if_guided(when, forward, lambda: take(everyone))
        weight = jnp.broadcast_to(now, forward.labels.shape)
        weight = answers.counted(weight, forward.batch)
        weight &= jnp.any(guided.teacher > 0, axis=(1, 2))  # else nothing is taught
        if only_right:
            weight &= guidance.is_right(guided.logits, forward.labels, config)
        if route == "target":
            penalty = _with_slope(kl, slope, forward.features)
        else:
            penalty = _direct(forward, guided, config)
        penalty = mu(forward.state.step) * weight.astype(jnp.float32) * penalty
        return penalty, stats, _diagnostics(guided, kl, now, forward.batch)

    return penalty_fn


@jax.custom_vjp
def _with_slope(value, slope, features):
    """The value [N], whose gradient in the features [N, ...] is the slope."""
    return value


def _keep_slope(value, slope, features):
    return value, (slope, jnp.zeros((), features.dtype))


def _apply_slope(kept, cotangent):
    slope, zero = kept
    cotangent = cotangent.reshape(-1, *(1,) * (slope.ndim - 1))
    return None, None, (cotangent * slope).astype(zero.dtype)


_with_slope.defvjp(_keep_slope, _apply_slope)


def _direct(forward, guided, config):
    """The saliency loss [N] itself, with its gradient into features and head."""
    _, maps = saliency.logits_and_saliencies(
        forward.head_fn,
        forward.features,
        jnp.stack([forward.labels, guided.runner_up], axis=1),
        weighting=config.weighting,
        rectify=False,
    )
    return guidance.saliency_loss(
        maps[:, 0], maps[:, 1], guided.teacher, guided.gate, config
    )


def _diagnostics(guided, kl, now, batch):
    counted = answers.counted(jnp.broadcast_to(now, kl.shape), batch)
    values = {
        "kl": kl,
        "saliency_loss": guided.loss,
        "saliency_loss_at_target": guided.target_loss,
        "relative_move": guided.relative_move,
        "blank_saliency": guided.blank,
    }
    return {k: metrics.sum_and_count(v, counted) for k, v in values.items()}


def _resized(maps, size):
    """Maps at the resolution of the features; averaged where they are finer."""
    if maps.shape[1:] == size:
        return maps
    return jax.image.resize(maps, (len(maps), *size), "linear")
