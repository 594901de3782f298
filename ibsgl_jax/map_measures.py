"""Measures of maps by themselves and against each other, and the pieces of all others.

The rules of ``metrics`` hold. Imports jax, chex and ibsgl_jax.saliency only.
"""

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax import chunks, saliency


def is_finite(maps: chex.Array) -> chex.Array:
    """Which maps [N, H, W] are free of NaN and infinity: bool [N]."""
    return jnp.all(jnp.isfinite(maps), axis=(-2, -1))


def pixel_ranks(maps: chex.Array) -> chex.Array:
    """The place of every pixel in its map, from the most salient (0) down.

    Equal values keep row-major order, so that constant maps have an order too.

    Args:
      maps: [N, H, W]; of whole numbers or bool too.

    Returns:
      int32 [N, H, W], in each map a permutation of 0 .. H*W - 1.
    """
    chex.assert_rank(maps, 3)
    if not jnp.issubdtype(maps.dtype, jnp.floating):  # -x of an unsigned x wraps
        maps = maps.astype(jnp.float32)
    flat = maps.reshape(maps.shape[0], maps.shape[1] * maps.shape[2])
    order = jnp.argsort(-flat, axis=-1, stable=True)
    places = jnp.arange(flat.shape[1], dtype=jnp.int32)
    # One map at a time: a batch that is spread over a mesh stays where it is.
    ranks = jax.vmap(lambda order: places.at[order].set(places))(order)
    return ranks.reshape(maps.shape)


def overlap(saliency_c: chex.Array, saliency_p: chex.Array) -> chex.Array:
    """How much of two maps coincides: ``2 sum(min(c, p)) / sum(c + p)``.

    1 for equal maps, 0 for maps without a common pixel; twice the printed
    suppression term (``losses.saliency_suppression``), which ends at 1/2. It falls
    also when one map only loses mass: read it beside ``cosine`` and ``mass``.

    Args:
      saliency_c, saliency_p: [N, H, W]; not normalised, the scales matter.

    Returns:
      [N] in [0, 1]; 0 where both maps are all-zero.
    """
    chex.assert_rank(saliency_c, 3)
    chex.assert_equal_shape([saliency_c, saliency_p])
    c, p = positive(saliency_c), positive(saliency_p)
    common = jnp.sum(jnp.minimum(c, p), axis=(1, 2))
    score = ratio(2.0 * common, jnp.sum(c + p, axis=(1, 2)))
    return nan_unless(is_finite(saliency_c) & is_finite(saliency_p), score)


def cosine(saliency_c: chex.Array, saliency_p: chex.Array) -> chex.Array:
    """The cosine of the angle between two maps, whatever their scales.

    Args:
      saliency_c, saliency_p: [N, H, W]; negative values keep their sign.

    Returns:
      [N] in [-1, 1]; 0 where a map is all-zero.
    """
    chex.assert_rank(saliency_c, 3)
    chex.assert_equal_shape([saliency_c, saliency_p])
    score = _cosine(_flat(saliency_c), _flat(saliency_p))
    return nan_unless(is_finite(saliency_c) & is_finite(saliency_p), score)


def mass(maps: chex.Array) -> chex.Array:
    """The sum of each map [N, H, W] over its pixels: [N], in the map's unit."""
    chex.assert_rank(maps, 3)
    return nan_unless(is_finite(maps), jnp.sum(positive(maps), axis=(1, 2)))


def map_area(maps: chex.Array) -> chex.Array:
    """The mean of each map [N, H, W] divided by its maximum: [N] in [0, 1].

    The share of the image that ``explanation_map`` lets through, which Average Drop
    rewards: report the two together. 0 for an all-zero map, 1 for a constant one.
    """
    chex.assert_rank(maps, 3)
    area = jnp.mean(saliency.normalize(positive(maps)), axis=(1, 2))
    return nan_unless(is_finite(maps), area)


def match_area(
    maps: chex.Array, area: chex.Numeric, *, num_iterations: int = 30
) -> chex.Array:
    """Each map raised to the power that gives it a common area.

    The maps become ``(map / max)^e`` with ``mean = area``, so that Average Drop and
    Increase compare where the saliency lies and not how much of it there is. The
    area falls with e: e is found by bisection on its logarithm within 2^-8 .. 2^8.

    Args:
      maps: [N, H, W].
      area: the wanted ``map_area``, scalar or [N], in (0, 1).
      num_iterations: of the bisection; 30 place e within 1e-8 of itself.

    Returns:
      [N, H, W] in [0, 1]. An all-zero map stays 0 and a constant one becomes 1: no
      power changes them. An area beyond reach (larger than the share of positive
      pixels, or smaller than that of maximal pixels) gives the nearest that the
      range of exponents allows.
    """
    chex.assert_rank(maps, 3)
    normalized = saliency.normalize(positive(maps))
    above = normalized > 0
    log_map = jnp.log(jnp.where(above, normalized, 1.0))

    def power(log2_exponent):
        exponent = jnp.exp2(log2_exponent)[:, None, None]
        return jnp.where(above, jnp.exp(exponent * log_map), 0.0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2.0
        too_large = jnp.mean(power(middle), axis=(1, 2)) > area
        return jnp.where(too_large, middle, low), jnp.where(too_large, high, middle)

    low = jnp.full_like(normalized[:, 0, 0], -8.0)
    ends = low, -low
    low, high = jax.lax.fori_loop(0, num_iterations, halve, ends)
    return nan_unless(is_finite(maps), power((low + high) / 2.0))


def rank_correlation(a: chex.Array, b: chex.Array) -> chex.Array:
    """Spearman's rank correlation of two maps; equal values share their mean rank.

    For the sanity check by randomised weights: the maps of a trained and of a
    re-initialised network should not rank the pixels alike.

    Args:
      a, b: [N, H, W].

    Returns:
      [N] in [-1, 1]; 0 where a map is constant, NaN where one is not finite.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018.
    """
    chex.assert_rank(a, 3)
    chex.assert_equal_shape([a, b])
    correlation = pearson(_mean_ranks(_flat(a)), _mean_ranks(_flat(b)))
    return nan_unless(is_finite(a) & is_finite(b), correlation)


def pearson(a: chex.Array, b: chex.Array) -> chex.Array:
    """Pearson's correlation along the last axis of two arrays [N, M].

    Returns:
      [N] in [-1, 1]; 0 where an array is constant.
    """
    chex.assert_equal_shape([a, b])
    return _cosine(_centre(a), _centre(b))


def _cosine(a, b):
    """Cosine of rows [N, M]; rows are scaled first so that squares of 1e-20 survive."""
    a = a / _one_if_zero(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    b = b / _one_if_zero(jnp.max(jnp.abs(b), axis=-1, keepdims=True))
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    return jnp.clip(ratio(jnp.sum(a * b, axis=-1), norms), -1.0, 1.0)


def _centre(x):
    """Rows less their mean; exactly 0 for a constant row, however its mean rounds."""
    constant = jnp.max(x, axis=-1, keepdims=True) == jnp.min(x, axis=-1, keepdims=True)
    return jnp.where(constant, 0.0, x - jnp.mean(x, axis=-1, keepdims=True))


def _one_if_zero(x):
    return jnp.where(x == 0, 1.0, x)


def _mean_ranks(flat):
    """Ranks in [0, 1] of the rows [N, M]; equal values share their mean rank."""

    def row(x):
        ordered = jnp.sort(x)
        first = jnp.searchsorted(ordered, x, side="left")
        last = jnp.searchsorted(ordered, x, side="right") - 1
        return (first + last).astype(jnp.float32) / (2.0 * max(x.shape[0] - 1, 1))

    return chunks.on_each_device(jax.vmap(row), flat)


def _flat(maps):
    return maps.reshape(maps.shape[0], -1).astype(jnp.float32)


def positive(maps):
    """The maps in float32, negative values as zero."""
    return jnp.maximum(maps.astype(jnp.float32), 0.0)


def is_positive(mask):
    """Where a mask of bools or of numbers is set."""
    return (mask.astype(jnp.int32) if mask.dtype == bool else mask) > 0


def ratio(part, whole):
    """The ratio part / whole, 0 where the whole is 0 (NaN passes)."""
    empty = whole == 0
    return jnp.where(empty, 0.0, part / jnp.where(empty, 1.0, whole))


def nan_unless(valid, values):
    """The values [N, ...] of valid examples [N], NaN for the others."""
    valid = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
    return jnp.where(valid, values, jnp.nan)


def check_fraction(name, value):
    """ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is no share; take one in [0, 1]")
