"""Is the saliency where the object is? All measures return (score, count).

The rules of ``metrics`` hold. Imports jax, chex, numpy and this library only.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import map_measures, saliency

TIES = ("any", "first")


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
    positive = map_measures.positive(maps)
    total = jnp.sum(positive, axis=(1, 2))
    share = jnp.sum(jnp.where(inside, positive, 0.0), axis=(1, 2))
    return _pair(map_measures.ratio(share, total), defined)


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
        pointed = (jnp.arange(flat.shape[1])[None] == first).reshape(maps.shape)
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
    predicted = saliency.normalize(map_measures.positive(maps)) > threshold
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
    normalized = saliency.normalize(map_measures.positive(maps))
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
    map_measures.check_fraction("max_area", max_area)
    inside, defined = _check_mask(maps, box_mask)
    size = jnp.sum(inside, axis=(1, 2))
    top = map_measures.pixel_ranks(maps) < size[:, None, None]
    found = jnp.sum(top & inside, axis=(1, 2)).astype(jnp.float32)
    size = size.astype(jnp.float32)
    small = size <= max_area * maps.shape[1] * maps.shape[2]
    return _pair(map_measures.ratio(found, size), defined & small)


def _check_mask(maps, mask):
    """(the mask as bool, which examples have a finite map and a mask)."""
    chex.assert_rank(maps, 3)
    chex.assert_equal_shape([maps, mask])
    inside = map_measures.is_positive(mask)
    return inside, jnp.any(inside, axis=(1, 2)) & map_measures.is_finite(maps)


def _pair(scores, defined):
    """(score, count) with both 0 where the score is not defined."""
    where = defined.reshape(defined.shape + (1,) * (scores.ndim - 1))
    return jnp.where(where, scores, 0.0), defined.astype(jnp.float32)


def _iou(predicted, inside):
    common, either = (
        jnp.sum(pixels, axis=(1, 2)).astype(jnp.float32)
        for pixels in (predicted & inside, predicted | inside)
    )
    return map_measures.ratio(common, either)


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
