"""Measures of explanations and predictions that need no further call of the model.

Every function is pure, jittable and per example: maps [N, H, W] at the image's
resolution, masks [N, H, W] (bool or 0/1), results float32 [N]. Nothing is averaged
here, and no image is dropped: reduce with ``sum_and_count``, divide once at the end.

Three rules hold throughout:

* Maps are saliency, larger = more important. Where a share or an area is measured,
  negative values count as zero; where only the order matters they keep their place.
* A measure that is undefined for some finite input (an empty mask) returns the pair
  ``(score, count)``, both [N]: count is 1 where the score is defined, else both are 0.
  Its mean is ``score.sum() / count.sum()``.
* A map with a NaN or an infinity has count 0 in such a pair, and gives NaN *for that
  example alone* in every other function; ``is_finite`` finds these maps. Nothing else
  gives NaN: an all-zero map, an empty mask and a zero probability all have a value,
  named in the docstring.

Imports jax, chex, numpy and ibsgl_jax.saliency only.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import saliency

NORMALIZATIONS = ("max", "min-max", "none")
TIES = ("any", "first")


class CalibrationBins(NamedTuple):
    """Sums per confidence bin, each [num_bins]; add them over batches and devices."""

    confidence: chex.Array
    correct: chex.Array
    count: chex.Array


class Interval(NamedTuple):
    """A mean and the two ends of its interval."""

    mean: float
    low: float
    high: float


# Reduction and small common pieces.


def sum_and_count(
    values: chex.Array, counts: chex.Array | None = None
) -> tuple[chex.Array, chex.Array]:
    """The (sum, count) of per-example values; add both over batches, then divide.

    Args:
      values: [N].
      counts: [N] bool or 0/1, which examples count (the example mask of a ragged
        batch, the count of a metric, ``is_finite``, or a product of them). A value
        that does not count is never read, so it may be NaN. None: all count.

    Returns:
      Two float32 scalars. The count may be 0; the division is the caller's.
    """
    values = values.astype(jnp.float32)
    if counts is None:
        counts = jnp.ones_like(values)
    chex.assert_equal_shape([values, counts])
    used = counts > 0
    return jnp.sum(jnp.where(used, values, 0.0)), jnp.sum(used.astype(jnp.float32))


def is_finite(maps: chex.Array) -> chex.Array:
    """Which maps [N, H, W] are free of NaN and infinity: bool [N]."""
    return jnp.all(jnp.isfinite(maps), axis=(-2, -1))


def pixel_ranks(maps: chex.Array) -> chex.Array:
    """The place of every pixel in its map, from the most salient (0) down.

    Equal values keep row-major order, so that constant maps have an order too.

    Args:
      maps: [N, H, W].

    Returns:
      int32 [N, H, W], in each map a permutation of 0 .. H*W - 1.
    """
    chex.assert_rank(maps, 3)
    flat = maps.reshape(maps.shape[0], -1)
    order = jnp.argsort(-flat, axis=-1, stable=True)
    places = jnp.broadcast_to(jnp.arange(flat.shape[1], dtype=jnp.int32), flat.shape)
    ranks = jnp.put_along_axis(places, order, places, axis=-1, inplace=False)
    return ranks.reshape(maps.shape)


def boxes_to_mask(bbox: chex.Array, size: tuple[int, int]) -> chex.Array:
    """Masks of the pixels whose centre lies in a box.

    Args:
      bbox: [N, 4] ymin, xmin, ymax, xmax as fractions of the image in [0, 1], as tfds
        stores them. Half-open, so a box between pixel borders is exact.
      size: (H, W).

    Returns:
      bool [N, H, W]; all False for a box that holds no pixel centre, is turned
      inside out or has a NaN.
    """
    chex.assert_shape(bbox, (None, 4))
    ymin, xmin, ymax, xmax = jnp.split(bbox.astype(jnp.float32), 4, axis=-1)
    y = (jnp.arange(size[0], dtype=jnp.float32) + 0.5) / size[0]
    x = (jnp.arange(size[1], dtype=jnp.float32) + 0.5) / size[1]
    rows = (y[None] >= ymin) & (y[None] < ymax)
    columns = (x[None] >= xmin) & (x[None] < xmax)
    return rows[:, :, None] & columns[:, None, :]


# Average Drop, Average Increase and the images they are measured on.


def explanation_map(
    images: chex.Array,
    maps: chex.Array,
    *,
    normalization: str = "max",
    baseline: chex.Numeric = 0.0,
) -> chex.Array:
    """The image seen through its map: ``m * image + (1 - m) * baseline``.

    Args:
      images: [N, H, W, C] as the model takes them. With baseline 0 a normalised image
        fades to the mean colour (as torch-cam and pytorch-grad-cam have it), an
        unnormalised one to black.
      maps: [N, H, W].
      normalization: how a map becomes m: "max" divides by its maximum, an all-zero
        map stays 0; "min-max" also subtracts the minimum first, a constant map
        becomes 0; "none" takes the map as it is.
      baseline: broadcastable to images.

    Returns:
      [N, H, W, C] float32; NaN for the image of a map that is not finite.

    Raises:
      ValueError: unknown normalization.

    Reference: Chattopadhay et al., "Grad-CAM++", WACV 2018.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape_prefix([images, maps], 3)
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization {normalization!r} is unknown; take one of {NORMALIZATIONS}"
        )
    finite = is_finite(maps)
    maps = maps.astype(jnp.float32)
    if normalization == "min-max":
        maps = maps - jnp.min(maps, axis=(1, 2), keepdims=True)
    if normalization != "none":
        maps = saliency.normalize(maps)
    weights = _nan_unless(finite, maps)[..., None]
    return weights * images + (1.0 - weights) * baseline


def keep_top(
    images: chex.Array,
    maps: chex.Array,
    *,
    fraction: float = 0.5,
    baseline: chex.Numeric = 0.0,
) -> chex.Array:
    """The image with only its most salient pixels kept, unscaled.

    Score-CAM's variant of the explanation map for Average Drop and Increase: half of
    the pixels are muted, the others are left as they are. Exactly
    ``round(fraction * H * W)`` pixels are kept, ties in row-major order.

    Args:
      images: [N, H, W, C].
      maps: [N, H, W].
      fraction: of the pixels, in [0, 1].
      baseline: what the other pixels become, broadcastable to images.

    Returns:
      [N, H, W, C] float32; NaN for the image of a map that is not finite.

    Reference: Wang et al., "Score-CAM", CVPR Workshops 2020. The paper leaves open
    whether the kept pixels are still weighted by the map: here they are not.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape_prefix([images, maps], 3)
    _check_fraction("fraction", fraction)
    count = round(fraction * maps.shape[1] * maps.shape[2])
    kept = (pixel_ranks(maps) < count)[..., None]
    return _nan_unless(is_finite(maps), jnp.where(kept, images, baseline))


def drop(prob: chex.Array, prob_explained: chex.Array) -> chex.Array:
    """The relative drop ``max(p - o, 0) / p``; its mean is Average Drop (a fraction).

    Args:
      prob: p [N], softmax probability of the class on the whole image, in [0, 1].
      prob_explained: o [N], the same on the explanation map.

    Returns:
      [N] in [0, 1]; 0 where p is 0. Images that did not drop stay in, as 0.

    Reference: Chattopadhay et al., "Grad-CAM++", WACV 2018. Percent there,
    fractions here; no epsilon in the denominator.
    """
    chex.assert_equal_shape([prob, prob_explained])
    lost = absolute_drop(prob, prob_explained)
    whole = jnp.where(prob == 0, 1.0, prob)
    return jnp.where(prob == 0, lost * 0.0, lost / whole)


def absolute_drop(prob: chex.Array, prob_explained: chex.Array) -> chex.Array:
    """``max(p - o, 0)``, not divided by p: pytorch-grad-cam's "drop in confidence".

    Args:
      prob, prob_explained: [N], probabilities or logits.

    Returns:
      [N], in the unit of the arguments.
    """
    chex.assert_equal_shape([prob, prob_explained])
    return jnp.maximum(prob - prob_explained, 0.0)


def increase(prob: chex.Array, prob_explained: chex.Array) -> chex.Array:
    """1 where the explanation map scores strictly higher than the image, else 0.

    Its mean is Average Increase (a fraction; also "increase in confidence").

    Args:
      prob, prob_explained: [N], probabilities or logits.

    Returns:
      float32 [N]; NaN where an argument is NaN.

    Reference: Chattopadhay et al., "Grad-CAM++", WACV 2018.
    """
    chex.assert_equal_shape([prob, prob_explained])
    known = ~(jnp.isnan(prob) | jnp.isnan(prob_explained))
    return _nan_unless(known, (prob_explained > prob).astype(jnp.float32))


# Localisation: is the saliency where the object is? All return (score, count).


def box_share(maps: chex.Array, box_mask: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The share of the saliency that lies in the mask (energy pointing game).

    ``sum(map * mask) / sum(map)``; Quantus calls it relevance mass accuracy.

    Args:
      maps: [N, H, W].
      box_mask: [N, H, W].

    Returns:
      (score in [0, 1], count), both [N]. An all-zero map scores 0 and counts.

    Reference: Wang et al., "Score-CAM", CVPR Workshops 2020.
    """
    inside, defined = _check_mask(maps, box_mask)
    positive = _positive(maps)
    total = jnp.sum(positive, axis=(1, 2))
    share = jnp.sum(jnp.where(inside, positive, 0.0), axis=(1, 2))
    return _pair(_ratio(share, total), defined)


def pointing_hit(
    maps: chex.Array, mask: chex.Array, *, tolerance: int = 0, ties: str = "any"
) -> tuple[chex.Array, chex.Array]:
    """Whether the most salient pixel lies in the mask (pointing game).

    Args:
      maps: [N, H, W].
      mask: [N, H, W].
      tolerance: pixels; a miss by a distance strictly below it still hits, as in
        TorchRay (whose benchmark takes 15). 0 and 1 both ask for the pixel itself.
      ties: "any": one of several equal maxima in the mask is enough (Quantus);
        "first": only the first maximum in row-major order counts (TorchRay).

    Returns:
      (score 0 or 1, count), both [N]. A constant map, the all-zero one among them,
      points nowhere: a miss that counts. An empty mask does not count.

    Raises:
      ValueError: unknown ties, negative tolerance.

    Reference: Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV
    2018. The mean here is over images, there over classes.
    """
    if ties not in TIES:
        raise ValueError(f"ties {ties!r} is unknown; take one of {TIES}")
    if tolerance < 0:
        raise ValueError(f"tolerance {tolerance} is negative; take 0 or more pixels")
    inside, defined = _check_mask(maps, mask)
    accepted = _dilate(inside, tolerance) if tolerance > 1 else inside
    peak = jnp.max(maps, axis=(1, 2), keepdims=True)
    if ties == "any":
        pointed = maps == peak
    else:
        flat = maps.reshape(maps.shape[0], -1)
        first = jnp.argmax(flat, axis=1, keepdims=True)
        pointed = (jnp.arange(flat.shape[1]) == first).reshape(maps.shape)
    varies = peak[:, 0, 0] > jnp.min(maps, axis=(1, 2))
    hit = varies & jnp.any(pointed & accepted, axis=(1, 2))
    return _pair(hit.astype(jnp.float32), defined)


def iou(
    maps: chex.Array, mask: chex.Array, *, threshold: float = 0.5
) -> tuple[chex.Array, chex.Array]:
    """Intersection over union of the mask and the pixels above a share of the maximum.

    A pixel is predicted where ``map / max(map) > threshold``, strictly, so that an
    all-zero map predicts nothing at any threshold.

    Args:
      maps: [N, H, W].
      mask: [N, H, W].
      threshold: in [0, 1).

    Returns:
      (score in [0, 1], count), both [N]. An all-zero map scores 0 and counts.

    Raises:
      ValueError: threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold} selects nothing; take one in [0, 1)")
    inside, defined = _check_mask(maps, mask)
    predicted = saliency.normalize(_positive(maps)) > threshold
    return _pair(_iou(predicted, inside), defined)


def iou_curve(
    maps: chex.Array, mask: chex.Array, *, num_thresholds: int = 20
) -> tuple[chex.Array, chex.Array]:
    """``iou`` at the thresholds k / num_thresholds, k = 0 .. num_thresholds - 1.

    The maximum of the *mean* over images is the score at the best common threshold
    (as WSOL benchmarks report it); ``best_iou`` lets every image choose its own.

    Args:
      maps: [N, H, W].
      mask: [N, H, W].
      num_thresholds: at least 1.

    Returns:
      (scores [N, num_thresholds], count [N]).
    """
    inside, defined = _check_mask(maps, mask)
    normalized = saliency.normalize(_positive(maps))
    thresholds = jnp.arange(num_thresholds, dtype=jnp.float32) / num_thresholds
    scores = jax.lax.map(lambda t: _iou(normalized > t, inside), thresholds)
    return _pair(scores.T, defined)


def best_iou(
    maps: chex.Array, mask: chex.Array, *, num_thresholds: int = 20
) -> tuple[chex.Array, chex.Array]:
    """The best ``iou`` of each image over a grid of thresholds (an oracle's choice).

    Args and thresholds as in ``iou_curve``.

    Returns:
      (score in [0, 1], count), both [N]. An all-zero map scores 0 and counts.
    """
    scores, count = iou_curve(maps, mask, num_thresholds=num_thresholds)
    return jnp.max(scores, axis=1), count


def bounding_box_ratio(
    maps: chex.Array, box_mask: chex.Array, *, max_area: float = 0.33
) -> tuple[chex.Array, chex.Array]:
    """The share of the n most salient pixels that lie in the box of n pixels.

    Args:
      maps: [N, H, W]; ties are broken in row-major order.
      box_mask: [N, H, W].
      max_area: boxes larger than this share of the image do not count; 1 takes all
        (then this is Quantus' relevance rank accuracy).

    Returns:
      (score in [0, 1], count), both [N].

    Reference: Schulz et al., "Restricting the Flow", ICLR 2020.
    """
    _check_fraction("max_area", max_area)
    inside, defined = _check_mask(maps, box_mask)
    size = jnp.sum(inside, axis=(1, 2))
    top = pixel_ranks(maps) < size[:, None, None]
    found = jnp.sum(top & inside, axis=(1, 2))
    small = size <= max_area * maps.shape[1] * maps.shape[2]
    return _pair(_ratio(found, size), defined & small)


# Maps by themselves and against each other.


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
    c, p = _positive(saliency_c), _positive(saliency_p)
    common = jnp.sum(jnp.minimum(c, p), axis=(1, 2))
    score = _ratio(2.0 * common, jnp.sum(c + p, axis=(1, 2)))
    return _nan_unless(is_finite(saliency_c) & is_finite(saliency_p), score)


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
    return _nan_unless(is_finite(saliency_c) & is_finite(saliency_p), score)


def mass(maps: chex.Array) -> chex.Array:
    """The sum of each map [N, H, W] over its pixels: [N], in the map's unit."""
    chex.assert_rank(maps, 3)
    return _nan_unless(is_finite(maps), jnp.sum(_positive(maps), axis=(1, 2)))


def map_area(maps: chex.Array) -> chex.Array:
    """The mean of each map [N, H, W] divided by its maximum: [N] in [0, 1].

    The share of the image that ``explanation_map`` lets through, which Average Drop
    rewards: report the two together. 0 for an all-zero map, 1 for a constant one.
    """
    chex.assert_rank(maps, 3)
    area = jnp.mean(saliency.normalize(_positive(maps)), axis=(1, 2))
    return _nan_unless(is_finite(maps), area)


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
    normalized = saliency.normalize(_positive(maps))
    positive = normalized > 0
    log_map = jnp.log(jnp.where(positive, normalized, 1.0))

    def power(log2_exponent):
        exponent = jnp.exp2(log2_exponent)[:, None, None]
        return jnp.where(positive, jnp.exp(exponent * log_map), 0.0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2.0
        too_large = jnp.mean(power(middle), axis=(1, 2)) > area
        return jnp.where(too_large, middle, low), jnp.where(too_large, high, middle)

    ends = jnp.full(maps.shape[0], -8.0), jnp.full(maps.shape[0], 8.0)
    low, high = jax.lax.fori_loop(0, num_iterations, halve, ends)
    return _nan_unless(is_finite(maps), power((low + high) / 2.0))


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
    return _nan_unless(is_finite(a) & is_finite(b), correlation)


def pearson(a: chex.Array, b: chex.Array) -> chex.Array:
    """Pearson's correlation along the last axis of two arrays [N, M].

    Returns:
      [N] in [-1, 1]; 0 where an array is constant.
    """
    chex.assert_equal_shape([a, b])
    return _cosine(_centre(a), _centre(b))


# Predictions.


def probability(logits: chex.Array, classes: chex.Array) -> chex.Array:
    """The softmax probability of one class [N] per image, from logits [N, C]: [N]."""
    return jnp.exp(-nll(logits, classes))


def nll(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """The negative log-likelihood of the labels [N] under logits [N, C]: [N], nats."""
    chex.assert_rank([logits, labels], [2, 1])
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """1 where the highest logit [N, C] is the label's [N], else 0: float32 [N].

    Of equal logits the first counts; a row with a NaN is wrong.
    """
    chex.assert_rank([logits, labels], [2, 1])
    right = (jnp.argmax(logits, axis=1) == labels) & ~jnp.isnan(logits).any(axis=1)
    return right.astype(jnp.float32)


def calibration_bins(
    logits: chex.Array,
    labels: chex.Array,
    *,
    mask: chex.Array | None = None,
    num_bins: int = 15,
) -> CalibrationBins:
    """The sums behind ``calibration_error``, to be added over batches and devices.

    Args:
      logits: [N, C].
      labels: int [N].
      mask: [N], which examples count; None: all. A row with a NaN never counts.
      num_bins: equal bins of the confidence (highest probability); a value on a
        border belongs to the upper bin, 1 to the last.

    Returns:
      CalibrationBins.
    """
    chex.assert_rank([logits, labels], [2, 1])
    confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=1)
    counted = ~jnp.isnan(confidence)
    if mask is not None:
        counted &= mask > 0
    confidence = jnp.where(counted, confidence, 0.0)
    index = jnp.minimum((confidence * num_bins).astype(jnp.int32), num_bins - 1)
    member = jax.nn.one_hot(index, num_bins) * counted[:, None]

    def bin_sums(values):
        return jnp.sum(values[:, None] * member, axis=0)

    return CalibrationBins(
        confidence=bin_sums(confidence),
        correct=bin_sums(accuracy(logits, labels)),
        count=jnp.sum(member, axis=0),
    )


def calibration_error(bins: CalibrationBins) -> chex.Array:
    """The expected calibration error: mean over examples of |accuracy - confidence|
    of their bin.

    Args:
      bins: the summed ``calibration_bins`` of the whole split.

    Returns:
      A scalar in [0, 1]; 0 without examples.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    gap = jnp.sum(jnp.abs(bins.correct - bins.confidence))
    return _ratio(gap, jnp.sum(bins.count))


def mean_and_interval(
    values,
    counts=None,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The mean of per-example values and its bootstrap interval, on the host.

    The percentile interval. NumPy, so not for use under jit.

    Args:
      values: [N], of all the examples of a split.
      counts: [N], which of them count; None: all.
      seed: of NumPy's generator; the same seed gives the same interval.
      num_resamples: draws of N examples with replacement.
      level: in (0, 1).

    Returns:
      Interval of floats. Without any example all three are NaN; with one, equal. A
      NaN that counts makes all three NaN: leave it out through counts and say so.

    Raises:
      ValueError: level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is no probability; take one in (0, 1)")
    values = np.asarray(values, np.float64)
    if counts is not None:
        values = values[np.asarray(counts) > 0]
    if values.size == 0 or np.isnan(values).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(values.size, size=values.size)].mean()
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _positive(maps):
    return jnp.maximum(maps.astype(jnp.float32), 0.0)


def _flat(maps):
    return maps.reshape(maps.shape[0], -1).astype(jnp.float32)


def _ratio(part, whole):
    """part / whole, 0 where the whole is 0 (NaN passes)."""
    empty = whole == 0
    return jnp.where(empty, 0.0, part / jnp.where(empty, 1.0, whole))


def _nan_unless(valid, values):
    """The values [N, ...] of valid examples [N], NaN for the others."""
    valid = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
    return jnp.where(valid, values, jnp.nan)


def _check_mask(maps, mask):
    """(the mask as bool, which examples have a finite map and a mask)."""
    chex.assert_rank(maps, 3)
    chex.assert_equal_shape([maps, mask])
    inside = mask > 0
    return inside, jnp.any(inside, axis=(1, 2)) & is_finite(maps)


def _pair(scores, defined):
    """(score, count) with both 0 where the score is not defined."""
    where = defined.reshape(defined.shape + (1,) * (scores.ndim - 1))
    return jnp.where(where, scores, 0.0), defined.astype(jnp.float32)


def _iou(predicted, inside):
    common = jnp.sum(predicted & inside, axis=(1, 2))
    return _ratio(common, jnp.sum(predicted | inside, axis=(1, 2)))


def _dilate(inside, tolerance):
    """Pixels at a distance strictly below the tolerance from a pixel of the mask."""
    offsets = np.arange(1 - tolerance, tolerance)
    near = offsets[:, None] ** 2 + offsets[None] ** 2 < tolerance**2
    neighbours = jax.lax.conv_general_dilated(
        inside[:, None].astype(jnp.float32),
        jnp.asarray(near, jnp.float32)[None, None],
        window_strides=(1, 1),
        padding="SAME",
    )
    return neighbours[:, 0] > 0.5  # sums of zeros and ones


def _cosine(a, b):
    """Cosine of rows [N, M]; rows are scaled first so that squares of 1e-20 survive."""
    a = a / _one_if_zero(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    b = b / _one_if_zero(jnp.max(jnp.abs(b), axis=-1, keepdims=True))
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    return jnp.clip(_ratio(jnp.sum(a * b, axis=-1), norms), -1.0, 1.0)


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
        return (first + last) / (2.0 * max(x.shape[0] - 1, 1))

    return jax.vmap(row)(flat)


def _check_fraction(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is no share; take one in [0, 1]")
