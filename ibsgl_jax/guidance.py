"""Saliency guided localization: from features A to the features A' they should become.

Algorithm 1 of "Improving Interpretability by Information Bottleneck Saliency Guided
Localization" (BMVC 2022; "the paper"), lines 3 to 10. Everything here lives behind the
backbone, on A, so a training step needs no further pass through it: compute A once,
``guide`` it, and add ``mu * losses.feature_kl(A, A')`` to the task loss. Imports jax,
chex and this library only; does no I/O.
"""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax import bottleneck, feature_stats, losses, predictions, saliency, tokens
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.feature_stats import FeatureStats, Moments
from ibsgl_jax.saliency import HeadFn

SUPPRESSIONS = (
    "runner_up_excess",
    "runner_up_cosine",
    "runner_up_mass",
    "overlap",
    "masked_overlap",
    "background_overlap",
)
STEPS = ("relative", "plain")
GATES = ("correct", "always")
MOVES = ("all", "active")
# ||g|| ||A|| up to this is rounding: 1e-5 if a map is its own teacher, else about 1.
MIN_GRADIENT = 1e-4


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Options of the guidance; the defaults are ours, ``literal()`` the paper's.

    Attributes:
      bottleneck: options of the teacher map L^ib. By default 20 steps, because at the
        last layer 10 end before the map finds the object; 1 sample, whose map
        correlates .97 in the median with that of 100 (pooled linear head); and half of
        IBA's blur, which on 4 x 4 and 8 x 8 cells leaves the map where the object is.
      weighting: of the saliency maps, see ``saliency.class_saliency``.
      cross_entropy: kind of ``losses.saliency_cross_entropy``.
      suppression: what keeps L^p away from L^c: "runner_up_excess" (default; through
        L^p only), "runner_up_cosine" (through L^p only, whatever its mass),
        "runner_up_mass" (through L^p only, its mass inside the teacher's map),
        "overlap" (the printed formula without a mask), "masked_overlap" (with
        ``losses.soft_mask`` of L^c, the paper's ancestor), "background_overlap" (with
        the complement of L^ib as the mask).
      suppression_weight: the paper's beta, >= 0; 0 switches suppression off.
      contrast: >= 0; above 0 not L^c follows the teacher, but ReLU(M^c - contrast M^p),
        M being the maps before their ReLU.
      gate: where suppression applies: "correct" (the prediction is right; our reading
        of the paper's "c = p", which cannot hold literally) or "always"; but never
        where every class is a label and there is no runner-up.
      step: "relative" moves each example by ``step_size`` times the norm of its A
        (less what ``rectify_features`` clips away: on real images .06 to .08 of .1);
        "plain" is gradient descent with learning rate ``step_size`` on the batch mean,
        as printed, which moves A by some 3e-5 of its norm.
      step_size: > 0.
      move: elements that the step moves: "all", or "active", those above zero: behind a
        ReLU no gradient reaches the others, and what A' asks of them is asked in vain.
        The relative step is of the same length, on them.
      kl_over, kl_floor: of ``losses.feature_kl``, for whoever adds the divergence.
      rectify_features: clip A' at zero; for features behind a ReLU. False: features
        have a sign (tokens, a LayerNorm's or a GELU's output), and the divergence is
        that of ``losses.feature_kl(signed=True)``.
      link: "softmax"; or "sigmoid" for a head with several labels per image: the
        teacher keeps the label's own probability, and a prediction is right where that
        is above a half.
    """

    bottleneck: BottleneckConfig = BottleneckConfig(
        num_steps=20, num_samples=1, blur_sigma=0.5
    )
    weighting: str = "elementwise"
    cross_entropy: str = "categorical"
    suppression: str = "runner_up_excess"
    suppression_weight: float = 1.0
    contrast: float = 0.0
    gate: str = "correct"
    step: str = "relative"
    step_size: float = 0.1
    move: str = "all"
    kl_over: str = "all"
    kl_floor: float = 0.1
    rectify_features: bool = True
    link: str = "softmax"

    def __post_init__(self):
        for name, choices in (
            ("weighting", saliency.WEIGHTINGS),
            ("cross_entropy", losses.CROSS_ENTROPIES),
            ("suppression", SUPPRESSIONS),
            ("gate", GATES),
            ("step", STEPS),
            ("move", MOVES),
            ("kl_over", losses.KL_EXTENTS),
            ("link", predictions.LINKS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {choices}")
        for name in ("suppression_weight", "contrast"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value}: must not be negative")
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size}: must be positive")
        if not self.kl_floor > 0:
            raise ValueError(f"kl_floor={self.kl_floor}: must be positive")
        if self.move == "active" and not self.rectify_features:
            raise ValueError(
                "move='active': features with a sign, rectify_features=False, are all "
                "active; leave it at 'all'"
            )


def literal() -> GuidanceConfig:
    """The paper's recipe as printed, with IBA's published bottleneck options."""
    return GuidanceConfig(
        bottleneck=BottleneckConfig(),
        suppression="masked_overlap",
        suppression_weight=1.0,
        step="plain",
        step_size=1.0,
    )


class Guidance(NamedTuple):
    """What ``guide`` returns; no gradient flows through any of it.

    Attributes:
      target_features: A', float32 [N, H, W, K] or, for tokens, [N, T, D].
      logits: [N, C], of the head at A.
      runner_up: int32 [N], class p.
      saliency_c, saliency_p, teacher: float32 [N, H, W]: L^c, L^p and the map that
        L^c should follow (L^ib unless another was given).
      gate: float32 [N] in {0, 1}, whether suppression applies.
      loss: float32 [N], the saliency loss at A.
      target_loss: float32 [N], the same at A'; below ``loss`` where the step helps.
      relative_move: float32 [N], ||A' - A|| / ||A||, 0 where A is all zero.
      blank: float32 [N], 1 where L^c is all zero: such an example gets no guidance from
        the teacher.
    """

    target_features: chex.Array
    logits: chex.Array
    runner_up: chex.Array
    saliency_c: chex.Array
    saliency_p: chex.Array
    teacher: chex.Array
    gate: chex.Array
    loss: chex.Array
    target_loss: chex.Array
    relative_move: chex.Array
    blank: chex.Array


def guide(
    key: chex.PRNGKey | None,
    head_fn: HeadFn,
    features: chex.Array,
    labels: chex.Array,
    moments: Moments | None,
    *,
    config: GuidanceConfig | None = None,
    teacher: chex.Array | None = None,
    num_examples: chex.Numeric | None = None,
    positives: chex.Array | None = None,
) -> Guidance:
    """Move features one step towards a better saliency map.

    Descends ``CE(L^c, teacher) + suppression_weight * SS(L^c, L^p)`` in A, SS only
    where the gate is open, with the classes, the gate and the teacher held fixed.

    Args:
      key: for the bottleneck's noise, or keys [N]; not read if a teacher is given.
      head_fn: features [N, H, W, K] -> logits [N, C], images independent.
      features: A, [N, H, W, K], or tokens [N, T, D], whose prefix stays as it is; any
        float dtype, computed in float32.
      labels: int [N], the true class c; one of each image's in a call.
      moments, config: of the features, if no teacher is given; ``GuidanceConfig()``.
      teacher: [N, H, W], >= 0: a map to follow in place of L^ib, say the true mask.
      num_examples: of the whole batch, whose mean ``step="plain"`` takes; N if None.
      positives: under a sigmoid, [N, C] in {0, 1}: all labels, no runner-up.

    Returns:
      A ``Guidance``.

    Raises:
      ValueError: another shape, neither moments nor teacher, positives of a softmax.
    """
    config = config or GuidanceConfig()
    saliency.check_features(features)
    chex.assert_rank(labels, 1)
    labels = labels.astype(jnp.int32)
    present = _present(labels, positives, config)
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
    given, (head_fn, features, layout) = features, tokens.as_map(head_fn, features)
    if teacher is None:
        moments = moments and Moments(*(tokens.to_map(m, layout) for m in moments))
        teacher = _bottleneck_map(key, head_fn, features, labels, moments, config)
    chex.assert_shape(teacher, features.shape[:3])
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))

    def classes_fn(logits):
        return jnp.stack([labels, saliency.runner_up(logits, present)], axis=1)

    maps_fn = functools.partial(
        saliency.logits_and_saliencies, weighting=config.weighting, rectify=False
    )

    def total_loss(features):
        logits, maps = maps_fn(head_fn, features, classes_fn)
        gate = _gate(logits, labels, present, config)
        loss = saliency_loss(maps[:, 0], maps[:, 1], teacher, gate, config)
        return jnp.sum(loss), (loss, logits, maps)

    # The images are independent: the gradient of the sum is each one's own.
    gradient, (loss, logits, maps) = jax.grad(total_loss, has_aux=True)(features)
    target = _descend(features, gradient, num_examples, config)
    classes, gate = classes_fn(logits), _gate(logits, labels, present, config)
    target_c, target_p = jnp.moveaxis(maps_fn(head_fn, target, classes)[1], 1, 0)
    maps = jax.nn.relu(maps)
    guidance = Guidance(
        target_features=tokens.from_map(target, given, layout),
        logits=logits,
        runner_up=classes[:, 1],
        saliency_c=maps[:, 0],
        saliency_p=maps[:, 1],
        teacher=teacher,
        gate=gate,
        loss=loss,
        target_loss=saliency_loss(target_c, target_p, teacher, gate, config),
        relative_move=_relative_move(features, target),
        blank=(jnp.max(maps[:, 0], axis=(1, 2)) <= 0).astype(jnp.float32),
    )
    return jax.lax.stop_gradient(guidance)


def _bottleneck_map(key, head_fn, features, labels, moments, config):
    if moments is None:
        raise ValueError(
            "guide needs moments: feature_stats.moments of the features on many "
            "images; or a teacher"
        )
    return bottleneck.attribute(
        key,
        head_fn,
        features,
        labels,
        moments,
        config=config.bottleneck,
        loss=config.link,
    ).saliency


class Penalty(NamedTuple):
    """What ``penalty`` returns.

    Attributes:
      penalty: float32 [N], for the loss; its gradient flows into the features alone.
      stats: the feature statistics after this batch.
      guidance: a ``Guidance``: maps, losses and moves, to be recorded.
    """

    penalty: chex.Array
    stats: FeatureStats
    guidance: Guidance


def penalty(
    key: chex.PRNGKey,
    head_fn: HeadFn,
    features: chex.Array,
    labels: chex.Array,
    stats: FeatureStats,
    step: chex.Numeric,
    *,
    mu: float = 10.0,
    ramp: float = 100.0,
    only_right: bool = True,
    decay: float = 0.95,
    config: GuidanceConfig | None = None,
    positives: chex.Array | None = None,
) -> Penalty:
    """All of guidance for a loop of one's own: ``mu * KL(A || A')`` per example.

    It is safe on a network that has been trained. One that knows nothing yet has no map
    worth following: all of mu at once keeps it at chance.

    Args:
      key, features, labels, positives: as for ``guide``.
      head_fn: features -> logits [N, C]; stop the gradient of its
        parameters, which guidance does not move.
      stats: moving feature statistics, ``feature_stats.init(features.shape[1:])`` at
        first.
      step: from 0.
      mu: weight of the divergence, >= 0.
      ramp: steps over which it grows from 0 to mu, > 0.
      only_right: guide the examples whose prediction is right; False: all of them.
      decay: of the statistics, per batch, in [0, 1).
      config: ``GuidanceConfig()`` if None.

    Raises:
      ValueError: mu is negative, or ramp is not positive.
    """
    config = config or GuidanceConfig()
    if not (mu >= 0 and ramp > 0):
        raise ValueError(f"mu={mu}, ramp={ramp}: mu must be >= 0 and ramp > 0")
    stats = feature_stats.update_moving(
        stats, jax.lax.stop_gradient(features), decay=decay
    )
    guided = guide(
        key,
        head_fn,
        features,
        labels,
        feature_stats.moments(stats),
        config=config,
        positives=positives,
    )
    divergence = divergence_from(guided, features, config)
    share = jnp.minimum(jnp.asarray(step, jnp.float32) / ramp, 1.0)
    right = is_right(guided.logits, labels, config)
    followed = right if only_right else jnp.ones_like(right)
    weight = mu * share * followed.astype(jnp.float32)
    return Penalty(weight * divergence, stats, guided)


def divergence_from(
    guided: Guidance, features: chex.Array, config: GuidanceConfig
) -> chex.Array:
    """``losses.feature_kl(A, A')`` [N], as the configuration reads features."""
    return losses.feature_kl(
        features,
        guided.target_features,
        over=config.kl_over,
        floor=config.kl_floor,
        signed=not config.rectify_features,
    )


def is_right(
    logits: chex.Array, labels: chex.Array, config: GuidanceConfig
) -> chex.Array:
    """Whether the prediction is the label [N]; with a sigmoid, whether it says yes."""
    if config.link == "softmax":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels.astype(jnp.int32)
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0] > 0


def _present(labels, positives, config):
    """What the runner-up must not be, as ``saliency.runner_up`` takes it."""
    if positives is None:
        return labels
    if config.link == "softmax":
        raise ValueError(
            "positives, the labels of a multi-label head, under a softmax, which knows "
            "one: set GuidanceConfig(link='sigmoid'), or leave them out"
        )
    return positives


def saliency_loss(
    saliency_c: chex.Array,
    saliency_p: chex.Array,
    teacher: chex.Array,
    gate: chex.Array,
    config: GuidanceConfig,
) -> chex.Array:
    """The saliency loss per example, [N]: lines 5 to 9 of Algorithm 1.

    Args:
      saliency_c, saliency_p: [N, H, W]; below 0 only ``contrast`` reads them.
      teacher: [N, H, W], >= 0.
      gate: [N] in {0, 1}, whether suppression applies.
      config: which readings.
    """
    against = config.contrast * saliency_p if config.contrast else 0.0
    loss = losses.saliency_cross_entropy(
        jax.nn.relu(saliency_c - against), teacher, kind=config.cross_entropy
    )
    if config.suppression_weight == 0:
        return loss
    return loss + config.suppression_weight * gate * _suppression(
        jax.nn.relu(saliency_c), jax.nn.relu(saliency_p), teacher, config.suppression
    )


def _suppression(saliency_c, saliency_p, teacher, kind):
    if kind == "runner_up_excess":
        return losses.runner_up_excess(saliency_c, saliency_p)
    if kind == "runner_up_cosine":
        return losses.runner_up_cosine(saliency_c, saliency_p)
    if kind == "runner_up_mass":
        return losses.runner_up_mass(saliency_c, saliency_p, teacher)
    mask = None
    if kind == "masked_overlap":
        mask = losses.soft_mask(saliency.normalize(saliency_c))
    elif kind == "background_overlap":
        mask = 1.0 - saliency.normalize(teacher)
    return losses.saliency_suppression(saliency_c, saliency_p, mask)


def _gate(logits, labels, present, config):
    """Where suppression applies; ``present`` is ``_present``'s."""
    gate = jnp.ones(labels.shape, jnp.float32)
    if config.gate == "correct":
        gate = is_right(logits, labels, config).astype(jnp.float32)
    if present.ndim == 1:
        return gate
    return gate * jnp.any(~present.astype(bool), axis=1).astype(jnp.float32)


def _descend(features, gradient, num_examples, config):
    if config.move == "active":
        gradient = jnp.where(features > 0, gradient, 0.0)
    if config.step == "plain":
        size = (features.shape[0] or 1) if num_examples is None else num_examples
        target = features - config.step_size / size * gradient
    else:
        norm = _norm(gradient)
        # The loss does not depend on the scale of A, so this product has no unit;
        # below the bound the gradient is rounding and points nowhere.
        positive = norm * _norm(features) > MIN_GRADIENT
        direction = jnp.where(positive, gradient / jnp.where(positive, norm, 1.0), 0.0)
        target = features - config.step_size * _norm(features) * direction
    return jax.nn.relu(target) if config.rectify_features else target


def _relative_move(features, target):
    """``||A' - A|| / ||A||`` per example, [N]; 0 where A is all zero."""
    norm = _norm(features)[:, 0, 0, 0]
    move = _norm(target - features)[:, 0, 0, 0]
    return jnp.where(norm > 0, move / jnp.where(norm > 0, norm, 1.0), 0.0)


def _norm(x: chex.Array) -> chex.Array:
    """Euclidean norm per example, [N, 1, 1, 1], without overflow or underflow."""
    peak = jnp.max(jnp.abs(x), axis=(1, 2, 3), keepdims=True)
    positive = peak > 0
    scaled = x / jnp.where(positive, peak, 1.0)
    return peak * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=(1, 2, 3), keepdims=True))
