"""The boxes and masks of maps as ``explanation.json`` holds them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import metrics


def describe(
    maps: Mapping[str, np.ndarray],
    seen: tuple[float, float, float, float],
    threshold: float,
) -> dict:
    """Method -> box and mask of the largest part of its map above a threshold.

    Args:
      maps: method -> [H, W].
      seen: (left, top, right, bottom) of the part of the photo that the map covers.
      threshold: of ``metrics.boxes``.

    Returns:
      For each method "box", [left, top, right, bottom] in the photo's pixels, and
      "mask", of the map's pixels in the run lengths of COCO: "size" [H, W], and
      "counts", column by column, of zeros and ones in turns; None where the map has no
      positive value.
    """
    stack = jnp.stack([jnp.asarray(one, jnp.float32) for one in maps.values()])
    masks, bbox, found = jax.tree.map(np.asarray, _parts(stack, threshold))
    left, top, right, bottom = seen
    entries: dict[str, dict | None] = {}
    for i, method in enumerate(maps):
        if not found[i]:
            entries[method] = None
            continue
        ymin, xmin, ymax, xmax = (float(edge) for edge in bbox[i])
        box = (
            left + xmin * (right - left),
            top + ymin * (bottom - top),
            left + xmax * (right - left),
            top + ymax * (bottom - top),
        )
        entries[method] = {
            "box": [round(edge, 2) for edge in box],
            "mask": {"size": list(masks[i].shape), "counts": run_lengths(masks[i])},
        }
    return entries


@jax.jit
def _parts(maps, threshold):
    masks = metrics.largest_part(maps, threshold=threshold)
    return masks, *metrics.mask_boxes(masks)


def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of runs of zeros and ones in turns, column by column, from zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [-1]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(ends, prepend=0).astype(int).tolist()
