"""Losses between saliency maps and between features, one value per example.

Each is a plain function of arrays, so it fits a training loop written in anything.
Maps are non-negative [N, H, W]; features are non-negative [N, H, W, K] (after a ReLU).
Everything is computed in float32, is finite for all-zero maps, and has a finite
gradient there. Imports jax, jax.numpy, chex and ``saliency`` only; does no I/O.

"The paper" below is "Improving Interpretability by Information Bottleneck Saliency
Guided Localization", BMVC 2022.
"""

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax.saliency import normalize

CROSS_ENTROPIES = ("categorical", "bernoulli")
KL_EXTENTS = ("all", "spatial")


def saliency_cross_entropy(
    saliency: chex.Array,
    target: chex.Array,
    *,
    kind: str = "categorical",
    floor: float = 1e-3,
) -> chex.Array:
    """Cross-entropy of a saliency map against a target map.

    "categorical": both maps plus ``floor`` of their own mean, divided by their sum, are
    distributions over cells: ``-sum t log s``, in nats; smallest (the target's entropy)
    where they agree. "bernoulli": both maps divided by their own maximum are
    probabilities per cell, squeezed into [floor, 1 - floor]; the mean over cells of
    ``-t log s - (1 - t) log(1 - s)``. Neither depends on the scale of either map.

    Args:
      saliency: [N, H, W], >= 0; differentiable.
      target: [N, H, W], >= 0; a constant (no gradient flows into it).
      kind: "categorical" or "bernoulli".
      floor: > 0, keeps the logarithm finite.

    Returns:
      float32 [N]. An all-zero map counts as the uniform distribution (categorical) or
      as zero everywhere (bernoulli) and gets no gradient.

    Raises:
      ValueError: unknown kind, floor not positive.

    Reference: L_CE of the paper, Algorithm 1, lines 6 and 8. The paper does not say
    how a map becomes a distribution; both readings are ours.
    """
    if kind not in CROSS_ENTROPIES:
        raise ValueError(f"kind={kind!r}: choose one of {CROSS_ENTROPIES}")
    _check_floor(floor)
    saliency, target = _maps(saliency, jax.lax.stop_gradient(target))
    if kind == "categorical":
        s = _distribution(saliency, floor * _mean(saliency))
        t = _distribution(target, floor * _mean(target))
        return -jnp.sum(t * jnp.log(s), axis=(1, 2))
    s = floor + (1.0 - 2.0 * floor) * normalize(saliency)
    t = normalize(target)
    return -jnp.mean(t * jnp.log(s) + (1.0 - t) * jnp.log1p(-s), axis=(1, 2))


def saliency_suppression(
    saliency_c: chex.Array, saliency_p: chex.Array, mask: chex.Array | None = None
) -> chex.Array:
    """The overlap of two saliency maps: ``sum min(L^c, L^p) mask / sum (L^c + L^p)``.

    Args:
      saliency_c: [N, H, W], >= 0, of the true class.
      saliency_p: [N, H, W], >= 0, of the runner-up.
      mask: [N, H, W] in [0, 1], for instance ``soft_mask(saliency_c)``; 1 if None.

    Returns:
      float32 [N] in [0, 1/2]: 0 for disjoint maps, 1/2 for equal ones (without mask);
      0 with zero gradient where both maps are all zero.

    Reference: L_SS of the paper. Its ancestor (Wang et al., "Sharpen Focus", ICCV
    2019, attention separation) has a factor 2 that the paper does not print.
    """
    saliency_c, saliency_p = _rescaled(*_maps(saliency_c, saliency_p))
    shared = jnp.minimum(saliency_c, saliency_p)
    if mask is not None:
        chex.assert_equal_shape([shared, mask])
        shared = shared * mask.astype(jnp.float32)
    return _ratio(
        jnp.sum(shared, axis=(1, 2)), jnp.sum(saliency_c + saliency_p, axis=(1, 2))
    )


def runner_up_excess(
    saliency_c: chex.Array, saliency_p: chex.Array, *, fraction: float = 0.25
) -> chex.Array:
    """The saliency that the runner-up has where it should have next to none.

    ``sum L^p [L^p > fraction L^c] / sum (L^c + L^p)``. Only L^p in the numerator is
    differentiated: the true class's map, the selection and the denominator are
    constants, so the loss can fall only because the runner-up's map does, and never
    erodes the true class's peak.

    Args:
      saliency_c: [N, H, W], >= 0, of the true class; a constant.
      saliency_p: [N, H, W], >= 0, of the runner-up; differentiable.
      fraction: >= 0, how much of L^c the runner-up may have unpunished.

    Returns:
      float32 [N] in [0, 1]; 0 with zero gradient where both maps are all zero.

    Reference: ours; stands in for L_SS of the paper by default, because the printed
    formula with a mask that selects the object wears the object's own saliency down.
    """
    if fraction < 0:
        raise ValueError(f"fraction={fraction}: must not be negative")
    saliency_c, saliency_p = _rescaled(*_maps(saliency_c, saliency_p))
    excess = jnp.where(
        jax.lax.stop_gradient(saliency_p > fraction * saliency_c), saliency_p, 0.0
    )
    total = jnp.sum(saliency_c + saliency_p, axis=(1, 2))
    return _ratio(jnp.sum(excess, axis=(1, 2)), jax.lax.stop_gradient(total))


def runner_up_cosine(saliency_c: chex.Array, saliency_p: chex.Array) -> chex.Array:
    """The cosine of the two maps, lowered through the runner-up's alone.

    Unlike an overlap it does not depend on the scale of either map, so it cannot fall
    because L^p fades: L^p has to move to other cells.

    Args:
      saliency_c: [N, H, W], >= 0, of the true class; a constant.
      saliency_p: [N, H, W], >= 0, of the runner-up; differentiable.

    Returns:
      float32 [N] in [0, 1]; 0 with zero gradient where either map is all zero.

    Reference: ours, another reading of "moves away from the wrong class".
    """
    saliency_c, saliency_p = _maps(jax.lax.stop_gradient(saliency_c), saliency_p)
    saliency_c, saliency_p = normalize(saliency_c), normalize(saliency_p)
    dot = jnp.sum(saliency_c * saliency_p, axis=(1, 2))
    square = jnp.sum(saliency_c**2, axis=(1, 2)) * jnp.sum(saliency_p**2, axis=(1, 2))
    positive = square > 0
    return jnp.where(positive, dot / jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def runner_up_mass(
    saliency_c: chex.Array, saliency_p: chex.Array, teacher: chex.Array
) -> chex.Array:
    """The saliency that the runner-up has where the teacher says that the object is.

    ``sum L^p T / max T / sum (L^c + L^p)``, lowered through the numerator's L^p alone.
    Where the object looks like both classes the maps cannot part; that L^p lose mass
    there while L^c keeps its own is what can be asked.

    Args:
      saliency_c: [N, H, W], >= 0, of the true class; a constant.
      saliency_p: [N, H, W], >= 0, of the runner-up; differentiable.
      teacher: [N, H, W], >= 0, T; a constant.

    Returns:
      float32 [N] in [0, 1]; 0 with zero gradient where both maps or T are all zero.

    Reference: ours, another reading of L_SS of the paper.
    """
    chex.assert_equal_shape([saliency_c, teacher])
    saliency_c, saliency_p = _rescaled(*_maps(saliency_c, saliency_p))
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    inside = saliency_p * normalize(teacher)
    total = jnp.sum(saliency_c + saliency_p, axis=(1, 2))
    return _ratio(jnp.sum(inside, axis=(1, 2)), jax.lax.stop_gradient(total))


def soft_mask(
    saliency: chex.Array, *, omega: float = 100.0, threshold: float = 0.55
) -> chex.Array:
    """A soft indicator of a map's peak: ``sigmoid(omega (L - threshold max L))``.

    Args:
      saliency: [N, H, W]. Divide by the maximum first (``saliency.normalize``) for an
        omega that means the same for every map: on a map of maximum 1 the mask rises
        from .1 to .9 over 4.4 / omega.
      omega: steepness, in units of 1 / saliency.
      threshold: share of each map's own maximum.

    Returns:
      float32 [N, H, W] in [0, 1]; differentiable, the maximum being a constant.

    Reference: Mask_r of the paper, after Wang et al. 2019, equation 4. Their code
    takes the maximum over the whole batch, so that one image's mask depends on its
    neighbours; here it is each map's own.
    """
    chex.assert_rank(saliency, 3)
    saliency = saliency.astype(jnp.float32)
    peak = jax.lax.stop_gradient(jnp.max(saliency, axis=(1, 2), keepdims=True))
    return jax.nn.sigmoid(omega * (saliency - threshold * peak))


def feature_kl(
    features: chex.Array,
    target_features: chex.Array,
    *,
    over: str = "all",
    floor: float = 0.1,
    signed: bool = False,
) -> chex.Array:
    """Kullback-Leibler divergence of features from target features, ``KL(A || A')``.

    Both get the same floor added and are divided by their sum. With ``over="all"`` the
    sum runs over (h, w, k): one distribution per example. With ``"spatial"`` it runs
    over (h, w): one per channel, and the divergences are averaged over channels.

    Features with a sign are no distribution over places. ``signed=True`` reads each
    element as a Gaussian around its value, all of one variance, A's mean square, a
    constant ("spatial": one for each channel, its own mean square over (h, w) plus
    ``floor`` of A's): ``mean (A - A')^2 / (2 variance)``. A step of relative length r
    then costs r^2 / 2, and of the same order without the sign.

    Args:
      features: A, [N, H, W, K] or tokens [N, T, D], whose T is the place;
        differentiable. Of both, negative values count as 0 unless signed.
      target_features: A', of A's shape; a constant (no gradient flows into it).
      over: "all" or "spatial".
      floor: share of A's mean activation, per example, that is added to every element;
        a constant in the gradient, > 0.
      signed: of both, negative values are values.

    Returns:
      float32 [N], nats (signed: per element), >= 0 and exactly 0 where A = A'. Each
      element contributes
      ``q - p - p log(q / p)``, which is never negative in float32 either: the plain sum
      of ``p log(p / q)`` drowns a small divergence in rounding. Where A is all zero
      the floor is 1: A counts as uniform and the divergence stays finite.

    Reference: D_KL(A^k || A^k') of the paper, Algorithm 1, line 11. The paper does
    not say how features become distributions; both readings are ours.
    """
    if over not in KL_EXTENTS:
        raise ValueError(f"over={over!r}: choose one of {KL_EXTENTS}")
    _check_floor(floor)
    chex.assert_rank([features, target_features], {3, 4})
    chex.assert_equal_shape([features, target_features])
    a = features.astype(jnp.float32)
    b = jax.lax.stop_gradient(target_features.astype(jnp.float32))
    everything = tuple(range(1, a.ndim))
    if signed:
        return _gaussian_kl(a, b, None if over == "all" else everything[:-1], floor)
    # A maximum would halve the gradient where a feature is exactly zero.
    a, b = (jnp.where(each < 0, 0.0, each) for each in (a, b))
    level = jax.lax.stop_gradient(floor * jnp.mean(a, axis=everything, keepdims=True))
    level = jnp.where(level > 0, level, 1.0)
    axes = everything if over == "all" else everything[:-1]
    p, q = _distribution(a, level, axes), _distribution(b, level, axes)
    divergence = jnp.sum(_kl_terms(p, q), axis=axes)
    return divergence if over == "all" else jnp.mean(divergence, axis=-1)


def _gaussian_kl(a, b, axes, floor):
    """``mean (a - b)^2 / (2 variance)`` per example; the variance over all, or axes."""
    everything = tuple(range(1, a.ndim))
    # By the largest value first, whose square may overflow.
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=everything, keepdims=True))
    peak = jnp.where(peak > 0, peak, 1.0)
    a, b = a / peak, b / peak
    square = jnp.square(jax.lax.stop_gradient(a))
    variance = jnp.mean(square, axis=everything, keepdims=True)
    if axes is not None:
        variance = floor * variance + jnp.mean(square, axis=axes, keepdims=True)
    variance = jnp.where(variance > 0, variance, 1.0)
    return jnp.mean(jnp.square(a - b) / (2.0 * variance), axis=everything)


def _check_floor(floor):
    if not floor > 0:
        raise ValueError(f"floor={floor}: must be positive, it keeps logarithms finite")


def _kl_terms(p: chex.Array, q: chex.Array) -> chex.Array:
    # p log(p/q) - p + q = p (t - log1p(t)) with t = (q - p) / p; log1p(t) <= t also
    # after rounding, and -p + q adds up to nothing over a distribution. Where q is
    # far below p, t rounds to -1; there the plain logarithm has nothing to cancel.
    t = (q - p) / p
    near = t > -0.5
    log_ratio = jnp.where(
        near, jnp.log1p(jnp.where(near, t, 0.0)), jnp.log(q) - jnp.log(p)
    )
    return p * (t - log_ratio)


def _distribution(x: chex.Array, level: chex.Array, axes=(1, 2)) -> chex.Array:
    """x + level divided by its sum over axes; uniform where x and level are zero."""
    x = x + level
    total = jax.lax.stop_gradient(jnp.sum(x, axis=axes, keepdims=True))
    positive = total > 0
    # First by a constant: the derivative of x / y has y^-2, which overflows at 1e-20.
    x = jnp.where(positive, x / jnp.where(positive, total, 1.0), 1.0)
    return x / jnp.sum(x, axis=axes, keepdims=True)


def _mean(maps: chex.Array) -> chex.Array:
    return jnp.mean(maps, axis=(1, 2), keepdims=True)


def _maps(*maps: chex.Array) -> list[chex.Array]:
    chex.assert_rank(list(maps), 3)
    chex.assert_equal_shape(maps)
    return [each.astype(jnp.float32) for each in maps]


def _rescaled(*maps: chex.Array) -> list[chex.Array]:
    """The maps divided by their common peak, a constant: see _distribution."""
    peak = jnp.max(jnp.stack(maps), axis=(0, 2, 3), keepdims=True)[0]
    peak = jax.lax.stop_gradient(jnp.where(peak > 0, peak, 1.0))
    return [each / peak for each in maps]


def _ratio(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
