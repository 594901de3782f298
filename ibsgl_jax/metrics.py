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

Average Drop and Increase stand here; the others in ``localization``, ``boxes``,
``map_measures``, ``predictions`` and, on the host, ``bootstrap``, all to be had from
here. Imports jax, chex and this library only.
"""

import chex
import jax.numpy as jnp

from ibsgl_jax import map_measures, saliency
from ibsgl_jax.bootstrap import (
    Interval,
    mean_and_interval,
)
from ibsgl_jax.boxes import (
    box_accuracy_curve,
    box_iou,
    boxes,
    corloc,
    largest_component,
    largest_part,
    mask_boxes,
)
from ibsgl_jax.localization import (
    TIES,
    best_iou,
    bounding_box_ratio,
    box_share,
    boxes_to_mask,
    iou,
    iou_curve,
    pointing_hit,
)
from ibsgl_jax.map_measures import (
    cosine,
    is_finite,
    map_area,
    mass,
    match_area,
    overlap,
    pearson,
    pixel_ranks,
    rank_correlation,
)
from ibsgl_jax.predictions import (
    CalibrationBins,
    accuracy,
    calibration_bins,
    calibration_error,
    label_accuracy,
    nll,
    probabilities,
    probability,
)

__all__ = [
    "NORMALIZATIONS",
    "TIES",
    "CalibrationBins",
    "Interval",
    "absolute_drop",
    "accuracy",
    "best_iou",
    "bounding_box_ratio",
    "box_accuracy_curve",
    "box_iou",
    "box_share",
    "boxes",
    "boxes_to_mask",
    "calibration_bins",
    "calibration_error",
    "corloc",
    "cosine",
    "drop",
    "explanation_map",
    "increase",
    "iou",
    "iou_curve",
    "is_finite",
    "keep_top",
    "label_accuracy",
    "largest_component",
    "largest_part",
    "map_area",
    "mask_boxes",
    "mass",
    "match_area",
    "mean_and_interval",
    "nll",
    "overlap",
    "pearson",
    "pixel_ranks",
    "pointing_hit",
    "probabilities",
    "probability",
    "rank_correlation",
    "sum_and_count",
]

NORMALIZATIONS = ("max", "min-max", "none")


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
    used = map_measures.is_positive(counts)
    return jnp.sum(jnp.where(used, values, 0.0)), jnp.sum(used.astype(jnp.float32))


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
      normalization: how a map becomes m: "max" divides by its maximum, negative
        values count as zero and an all-zero map stays 0; "min-max" subtracts the
        minimum first instead, a constant map becomes 0; "none" takes the map as it is.
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
    if normalization == "max":
        maps = map_measures.positive(maps)
    if normalization == "min-max":
        maps = maps - jnp.min(maps, axis=(1, 2), keepdims=True)
    if normalization != "none":
        maps = saliency.normalize(maps)
    weights = map_measures.nan_unless(finite, maps)[..., None]
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
    map_measures.check_fraction("fraction", fraction)
    count = round(fraction * maps.shape[1] * maps.shape[2])
    kept = (pixel_ranks(maps) < count)[..., None]
    return map_measures.nan_unless(is_finite(maps), jnp.where(kept, images, baseline))


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
    return map_measures.nan_unless(known, (prob_explained > prob).astype(jnp.float32))
