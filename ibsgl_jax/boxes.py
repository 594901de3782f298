"""From maps to boxes, and how well these meet the true ones.

A box is that of the largest connected part of a thresholded map. All of it runs under
jit, on any device. The rules of ``metrics`` hold. Imports jax, chex, numpy and this
library only.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import chunks, map_measures, saliency


def boxes(maps: chex.Array, *, threshold: float = 0.5) -> tuple[chex.Array, chex.Array]:
    """The box around the largest connected part of each map above a threshold.

    Args:
      maps: [N, H, W].
      threshold: in [0, 1), of the map's maximum; above it, strictly, as of ``iou``.

    Returns:
      (bbox [N, 4], count [N]): ymin, xmin, ymax, xmax as fractions of the sides, as
      ``boxes_to_mask`` takes them; an all-zero map has no part, box 0 and count 0.

    Raises:
      ValueError: threshold outside [0, 1).
    """
    _check_threshold(threshold)
    return mask_boxes(largest_part(maps, threshold=threshold))


def largest_part(maps: chex.Array, *, threshold: chex.Numeric = 0.5) -> chex.Array:
    """The largest connected part of each map above a threshold, which ``boxes`` boxes.

    Args:
      maps: [N, H, W].
      threshold: in [0, 1), not checked; as of ``boxes``.

    Returns:
      bool [N, H, W]; all False for an all-zero map.
    """
    above = saliency.normalize(map_measures.positive(maps)) > threshold
    return largest_component(above)


def mask_boxes(mask: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The tight boxes of masks [N, H, W], as ``boxes`` returns them."""
    chex.assert_rank(mask, 3)
    mask = mask.astype(bool)

    def ends(axis):
        lines = jnp.any(mask, axis=axis)
        size = lines.shape[1]
        first = jnp.argmax(lines, axis=1)
        last = size - jnp.argmax(lines[:, ::-1], axis=1)
        return first.astype(jnp.float32) / size, last.astype(jnp.float32) / size

    (ymin, ymax), (xmin, xmax) = ends(2), ends(1)
    found = jnp.any(mask, axis=(1, 2)).astype(jnp.float32)
    return jnp.stack([ymin, xmin, ymax, xmax], axis=1) * found[:, None], found


def largest_component(mask: chex.Array) -> chex.Array:
    """The part of each mask with most pixels, of those that touch, corners included.

    Args:
      mask: [N, H, W], bool or 0/1.

    Returns:
      bool [N, H, W]; of parts of one size that of the first pixel, row by row; all
      False for an empty mask.
    """
    chex.assert_rank(mask, 3)
    return chunks.on_each_device(jax.vmap(_largest), mask.astype(bool))


def _largest(mask):
    """``largest_component`` of one mask [H, W].

    Every pixel points to one of its part that comes no later, at first to itself. In
    turns it takes the earliest that its neighbours point to, tells the pixel that it
    pointed to, and follows the pointers: a number of turns like the logarithm of the
    longest way through a part.
    """
    height, width = mask.shape
    size = height * width
    none = np.int32(size)  # where what is outside of the mask points
    cells = jnp.arange(size, dtype=jnp.int32).reshape(height, width)
    start = jnp.append(jnp.where(mask, cells, none), none)

    def turn(state):
        before, _ = state
        near = jax.lax.reduce_window(
            before[:-1].reshape(height, width),
            none,
            jax.lax.min,
            (3, 3),
            (1, 1),
            "SAME",
        )
        near = jnp.append(jnp.where(mask, near, none), none)
        now = jnp.minimum(near, before.at[before].min(near))
        return now[now], before

    pointers, _ = jax.lax.while_loop(
        lambda state: jnp.any(state[0] != state[1]), turn, turn((start, start))
    )
    counts = jnp.zeros(size + 1, jnp.int32).at[pointers].add(1)
    best = jnp.argmax(counts[:-1])  # the first of the largest
    return mask & (pointers[:-1].reshape(height, width) == best.astype(jnp.int32))


def box_iou(bbox: chex.Array, other: chex.Array) -> chex.Array:
    """Intersection over union of boxes [N, 4], as ``boxes`` has them: [N] in [0, 1]."""
    chex.assert_shape([bbox, other], (None, 4))
    bbox, other = bbox.astype(jnp.float32), other.astype(jnp.float32)

    def area(low, high):
        return jnp.prod(jnp.maximum(high - low, 0.0), axis=1)

    shared = area(
        jnp.maximum(bbox[:, :2], other[:, :2]), jnp.minimum(bbox[:, 2:], other[:, 2:])
    )
    total = area(bbox[:, :2], bbox[:, 2:]) + area(other[:, :2], other[:, 2:])
    return map_measures.ratio(shared, total - shared)


def corloc(
    maps: chex.Array, bbox: chex.Array, *, threshold: float = 0.5, least: float = 0.5
) -> tuple[chex.Array, chex.Array]:
    """Whether the map's box meets the true one: the mean is CorLoc.

    Args:
      maps: [N, H, W].
      bbox: [N, 4], the true box, as fractions.
      threshold: of ``boxes``.
      least: IoU from which a box is right.

    Returns:
      (score 0 or 1, count), both [N]. A map without a part misses and counts; a true
      box without an area, and a map that is not finite, do not count.

    Reference: Deselaers, Alexe, Ferrari, "Localizing Objects while Learning Their
    Appearance", ECCV 2010.
    """
    _check_threshold(threshold)
    scores, count = _hits(maps, bbox, [threshold], least)
    return scores[:, 0], count


def box_accuracy_curve(
    maps: chex.Array,
    bbox: chex.Array,
    *,
    num_thresholds: int = 20,
    least: float = 0.5,
) -> tuple[chex.Array, chex.Array]:
    """``corloc`` at the thresholds k / num_thresholds: the best mean is MaxBoxAcc.

    Args:
      maps, bbox, least: as of ``corloc``.
      num_thresholds: at least 1.

    Returns:
      (scores [N, num_thresholds], count [N]). Average over the images that count, then
      take the largest: one threshold for all images. The mean of that over ``least`` of
      .3, .5 and .7 is what MaxBoxAccV2 is with one box an image.

    Reference: Choe et al., "Evaluating Weakly Supervised Object Localization Methods
    Right", CVPR 2020. Where we differ: a map is divided by its maximum, and its
    negative values count as zero; theirs is scaled from its minimum.
    """
    thresholds = [k / num_thresholds for k in range(num_thresholds)]
    return _hits(maps, bbox, thresholds, least)


def _hits(maps, bbox, thresholds, least):
    chex.assert_rank(maps, 3)
    chex.assert_shape(bbox, (maps.shape[0], 4))

    def at(threshold):
        found, _ = mask_boxes(largest_part(maps, threshold=threshold))
        return (box_iou(found, bbox) >= least).astype(jnp.float32)

    scores = jax.lax.map(at, jnp.asarray(thresholds, jnp.float32))
    sides = bbox[:, 2:] - bbox[:, :2]
    counted = jnp.all(sides > 0, axis=1) & map_measures.is_finite(maps)
    count = counted.astype(jnp.float32)
    return scores.T * count[:, None], count


def _check_threshold(threshold):
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold} selects nothing; take one in [0, 1)")
