"""Measures of explanations that call the model on many perturbed images.

``prob_fn`` and ``logit_fn`` take images [N, H, W, C] and return [N], the softmax
probability or the logit of the class that each map explains; close them over the
parameters and the classes. Every function evaluates one perturbed batch of N images at
a time inside a ``lax`` loop: memory does not grow with the number of steps, and the
model is compiled once. Maps are [N, H, W] at the image's resolution; the order of
pixels is that of ``metrics.pixel_ranks`` (most salient first, ties row-major).

Nothing is averaged over images, so padding of a ragged batch is the caller's to leave
out. A map that is not finite gives NaN for its own image only. Imports jax, chex,
numpy and this library only.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import chunks, imputation, metrics

ImageFn = Callable[[chex.Array], chex.Array]

ORDERS = ("morf", "lerf")


class DeletionInsertion(NamedTuple):
    """Fractions [num_steps + 1], curves [N, num_steps + 1], areas under them [N]."""

    fractions: chex.Array
    deletion: chex.Array
    insertion: chex.Array
    deletion_auc: chex.Array
    insertion_auc: chex.Array


class Degradation(NamedTuple):
    """Fractions [steps + 1], curves [N, steps + 1], the area between them [N]."""

    fractions: chex.Array
    morf: chex.Array
    lerf: chex.Array
    area: chex.Array


# What replaces a pixel. Black is ``(0 - mean) / std`` in normalised images: pass it.


def mean_baseline(images: chex.Array) -> chex.Array:
    """Each image's mean colour: [N, H, W, C] -> [N, 1, 1, C]."""
    chex.assert_rank(images, 4)
    return jnp.mean(images, axis=(1, 2), keepdims=True)


def blur_baseline(
    images: chex.Array, *, sigma: float = 5.0, kernel_size: int = 11
) -> chex.Array:
    """The images under a Gaussian blur, mirrored at the border without its pixel.

    As OpenCV's GaussianBlur: weights ``exp(-d^2 / (2 sigma^2))`` normalised over the
    kernel, which at the defaults is cut off at one standard deviation.

    Args:
      images: [N, H, W, C].
      sigma: pixels.
      kernel_size: odd, pixels.

    Returns:
      [N, H, W, C] float32.

    Raises:
      ValueError: even kernel_size.
    """
    chex.assert_rank(images, 4)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} has no centre; take an odd one")
    radius = kernel_size // 2
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2.0 * sigma**2))
    weights = weights / weights.sum()
    blurred = images.astype(jnp.float32)
    for axis in (1, 2):
        length = blurred.shape[axis]
        widths = [(0, 0)] * 4
        widths[axis] = (radius, radius)
        padded = jnp.pad(blurred, widths, mode="reflect")
        blurred = sum(
            float(weight) * jax.lax.slice_in_dim(padded, i, i + length, axis=axis)
            for i, weight in enumerate(weights)
        )
    return blurred


def delete_pixels(
    images: chex.Array, maps: chex.Array, baseline: chex.Numeric, *, fraction: float
) -> chex.Array:
    """The images with the most salient share of their pixels replaced.

    Args:
      images: [N, H, W, C].
      maps: [N, H, W].
      baseline: broadcastable to images.
      fraction: in [0, 1]; ``round(fraction * H * W)`` pixels are replaced.

    Returns:
      [N, H, W, C].
    """
    chex.assert_equal_shape_prefix([images, maps], 3)
    count = round(fraction * maps.shape[1] * maps.shape[2])
    return _replace(images, baseline, metrics.pixel_ranks(maps) < count)


def deletion_insertion(
    prob_fn: ImageFn,
    images: chex.Array,
    maps: chex.Array,
    baseline: chex.Numeric,
    *,
    num_steps: int = 20,
) -> DeletionInsertion:
    """Probability while the most salient pixels are deleted, or inserted, in turn.

    Step k replaces (deletion) or restores (insertion) the first
    ``min(k * ceil(H * W / num_steps), H * W)`` pixels. The area is the trapezoid rule
    over the fractions actually replaced; it is not divided by the probability of the
    whole image, so a less confident model has lower curves.

    Args:
      prob_fn: images [N, H, W, C] -> probability [N].
      images: [N, H, W, C].
      maps: [N, H, W].
      baseline: broadcastable to images: black, ``mean_baseline``, ``blur_baseline``.
      num_steps: at least 1.

    Returns:
      DeletionInsertion. A good map has a small deletion and a large insertion area.

    Reference: Petsiuk et al., "RISE", BMVC 2018. There deletion takes a
    constant and insertion starts from the blurred image; name the baseline you took.
    """
    chex.assert_equal_shape_prefix([images, maps], 3)
    num_pixels = maps.shape[1] * maps.shape[2]
    per_step = -(-num_pixels // num_steps)
    counts = np.minimum(np.arange(num_steps + 1) * per_step, num_pixels)
    ranks = metrics.pixel_ranks(maps)
    # Inserting the first k is deleting the last H*W - k, in the reverse order.
    deletion, insertion = _removal_curves(
        prob_fn,
        images,
        baseline,
        jnp.stack([ranks, num_pixels - 1 - ranks]),
        np.stack([counts, num_pixels - counts]),
        finite=metrics.is_finite(maps),
    )
    fractions = jnp.asarray(counts / num_pixels, jnp.float32)
    return DeletionInsertion(
        fractions=fractions,
        deletion=deletion,
        insertion=insertion,
        deletion_auc=_area(deletion, fractions),
        insertion_auc=_area(insertion, fractions),
    )


def degradation(
    prob_fn: ImageFn,
    images: chex.Array,
    maps: chex.Array,
    baseline: chex.Numeric,
    *,
    tile: int = 8,
    num_steps: int = 20,
) -> Degradation:
    """Probability while tiles are replaced, most (MoRF) or least (LeRF) relevant first.

    A tile's relevance is the mean of the map over it; tiles at the right and bottom
    border are smaller where the size is no multiple of the tile. Ties: row-major.

    Args:
      prob_fn: images [N, H, W, C] -> probability [N].
      images: [N, H, W, C].
      maps: [N, H, W].
      baseline: broadcastable to images; the paper's is ``mean_baseline``.
      tile: pixels; the paper takes 8 and 14 at 224 x 224.
      num_steps: of equal numbers of tiles as nearly as rounding allows; at most one
        per tile. The paper's curves have 100 points.

    Returns:
      Degradation; fractions are of tiles. ``area`` = integral of LeRF - MoRF, larger
      is better, 0 for an order without information. For the paper's scale divide the
      mean area by (mean probability on the images - mean on the baseline), which are
      the first and last points of the curves.

    Reference: Schulz et al., "Restricting the Flow", ICLR 2020.
    """
    chex.assert_equal_shape_prefix([images, maps], 3)
    height, width = maps.shape[1:]
    rows, columns = -(-height // tile), -(-width // tile)
    num_tiles = rows * columns
    tile_of = np.arange(height)[:, None] // tile * columns + np.arange(width) // tile
    sizes = np.bincount(tile_of.ravel()).astype(np.float32)
    flat = maps.reshape(maps.shape[0], -1).astype(jnp.float32)
    relevance = chunks.on_each_device(
        jax.vmap(lambda x: jax.ops.segment_sum(x, tile_of.ravel(), num_tiles) / sizes),
        flat,
    )
    tile_ranks = metrics.pixel_ranks(relevance.reshape(-1, rows, columns))
    ranks = tile_ranks.reshape(-1, num_tiles)[:, tile_of]
    counts = np.rint(np.linspace(0, num_tiles, min(num_steps, num_tiles) + 1))
    morf, lerf = _removal_curves(
        prob_fn,
        images,
        baseline,
        jnp.stack([ranks, num_tiles - 1 - ranks]),
        np.stack([counts, counts]),
        finite=metrics.is_finite(maps),
    )
    fractions = jnp.asarray(counts / num_tiles, jnp.float32)
    return Degradation(fractions, morf, lerf, _area(lerf - morf, fractions))


def road(
    key: chex.PRNGKey,
    prob_fn: ImageFn,
    images: chex.Array,
    maps: chex.Array,
    *,
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    order: str = "morf",
    noise: float = 0.01,
    num_iterations: int = 100,
) -> chex.Array:
    """Probability after pixels are removed so that their shape leaks no class (ROAD).

    Removed pixels are imputed by ``noisy_linear_imputation``.

    Args:
      key: one PRNG key; all images see the same noise, so a batch equals its singles.
      prob_fn: images [N, H, W, C] -> probability [N]; for the paper's accuracy return
        1 where the prediction is right.
      images: [N, H, W, C].
      maps: [N, H, W].
      fractions: of the pixels, each in [0, 1]; ``round(fraction * H * W)`` go.
      order: "morf" removes the most salient first, "lerf" the least.
      noise, num_iterations: as in ``noisy_linear_imputation``.

    Returns:
      [N, len(fractions)]. Good maps fall fast in MoRF, slowly in LeRF; pytorch-grad-cam
      combines them as the mean over fractions of (LeRF - MoRF) / 2.

    Raises:
      ValueError: unknown order.

    Reference: Rong et al., "A Consistent and Efficient Evaluation Strategy for
    Attribution Methods", ICML 2022.
    """
    chex.assert_equal_shape_prefix([images, maps], 3)
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is unknown; take one of {ORDERS}")
    num_pixels = maps.shape[1] * maps.shape[2]
    ranks = metrics.pixel_ranks(maps)
    if order == "lerf":
        ranks = num_pixels - 1 - ranks
    counts = jnp.asarray([round(f * num_pixels) for f in fractions], jnp.int32)

    def step(key_and_count):
        step_key, count = key_and_count
        imputed = noisy_linear_imputation(
            step_key, images, ranks < count, noise=noise, num_iterations=num_iterations
        )
        return prob_fn(imputed)

    keys = jax.random.split(key, len(fractions))
    curve = jax.lax.map(step, (keys, counts)).T
    return jnp.where(metrics.is_finite(maps)[:, None], curve, jnp.nan)


def noisy_linear_imputation(
    key: chex.PRNGKey,
    images: chex.Array,
    removed: chex.Array,
    *,
    noise: float = 0.01,
    num_iterations: int = 100,
) -> chex.Array:
    """Removed pixels become the weighted mean of their neighbours, plus a little noise.

    Each removed pixel satisfies ``x_i = sum_n w_n x_n / sum_n w_n`` over its up to
    eight neighbours in the image, with weight 1/6 to the four next to it and 1/12 to
    the diagonal ones; all removed pixels are solved for together (``imputation``).

    Args:
      key: one PRNG key; all images see the same noise.
      images: [N, H, W, C].
      removed: bool [N, H, W].
      noise: standard deviation of what is added to removed pixels, in the images' unit.
      num_iterations: at most so many; it stops at a relative residual of 1e-6, after 10
        to 20 for a hole of any size.

    Returns:
      [N, H, W, C] float32. Removed pixels of an image without any other are pure noise.

    Reference: Rong et al., ICML 2022. Solved iteratively instead of by a
    sparse factorisation.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape_prefix([images, removed], 3)
    images = images.astype(jnp.float32)
    imputed, _ = imputation.solve(images, removed, num_iterations=num_iterations)
    draws = noise * jax.random.normal(key, images.shape[1:], jnp.float32)
    return jnp.where(removed[..., None], imputed + draws[None], images)


def sensitivity_n(
    key: chex.PRNGKey,
    logit_fn: ImageFn,
    images: chex.Array,
    maps: chex.Array,
    *,
    num_features: chex.Numeric,
    num_masks: int = 100,
    baseline: chex.Numeric = 0.0,
) -> chex.Array:
    """Correlation of the saliency of a random set of n pixels with the logit it costs.

    Over num_masks random sets S of n pixels: Pearson's correlation between
    ``sum of the map over S`` and ``logit(image) - logit(image with S replaced)``.

    Args:
      key: one PRNG key; all images see the same sets, so a batch equals its singles.
      logit_fn: images [N, H, W, C] -> logit [N].
      images: [N, H, W, C].
      maps: [N, H, W], signed or not.
      num_features: n, the pixels in a set; may be traced, so that ``jax.lax.map`` over
        ``sensitivity_sizes`` compiles once.
      num_masks: sets, at least 2.
      baseline: broadcastable to images; the original's is zero.

    Returns:
      [N] in [-1, 1]; 0 where all sets have the same saliency (a constant map) or cost.

    Reference: Ancona et al., "Towards Better Understanding of Gradient-based
    Attribution Methods", ICLR 2018.
    """
    chex.assert_equal_shape_prefix([images, maps], 3)
    # Centred first: the correlation is the same, a constant map gives exactly 0, and
    # float32 sums of n values of a common size do not hide their differences.
    centred = maps.astype(jnp.float32)
    mean = jnp.mean(centred, axis=(1, 2), keepdims=True)
    lowest = jnp.min(centred, axis=(1, 2), keepdims=True)
    constant = jnp.max(centred, axis=(1, 2), keepdims=True) == lowest
    centred = jnp.where(constant, 0.0, centred - mean)

    def step(step_key):
        draws = jax.random.uniform(step_key, (1, *maps.shape[1:]))
        chosen = metrics.pixel_ranks(draws) < num_features
        attributed = jnp.sum(jnp.where(chosen, centred, 0.0), axis=(1, 2))
        return attributed, -logit_fn(_replace(images, baseline, chosen))

    attributed, cost = jax.lax.map(step, jax.random.split(key, num_masks))
    correlation = metrics.pearson(attributed.T, cost.T)
    return jnp.where(metrics.is_finite(maps), correlation, jnp.nan)


def sensitivity_sizes(
    num_pixels: int, *, num_sizes: int = 16, largest: float = 0.8
) -> np.ndarray:
    """Sizes n for ``sensitivity_n``, logarithmic from 1 pixel to a share of the image.

    Returns:
      int [at most num_sizes], increasing, repetitions left out.
    """
    sizes = np.geomspace(1, max(largest * num_pixels, 1), num_sizes)
    return np.unique(np.rint(sizes).astype(int))


def _replace(images, baseline, removed):
    return jnp.where(removed[..., None], baseline, images)


def _removal_curves(prob_fn, images, baseline, ranks, counts, *, finite):
    """[M, N, S] values of prob_fn with the first counts[m, s] of ranks[m] replaced.

    ranks [M, N, H, W], counts [M, S]; NaN where not finite [N].
    """
    num_orders, num_counts = counts.shape

    def step(index_and_count):
        index, count = index_and_count
        return prob_fn(_replace(images, baseline, ranks[index] < count))

    indices = jnp.repeat(jnp.arange(num_orders), num_counts)
    values = jax.lax.map(step, (indices, jnp.asarray(counts, jnp.int32).reshape(-1)))
    if values.shape[1:] != images.shape[:1]:
        raise ValueError(
            f"prob_fn gives {list(values.shape[1:])} of {len(images)} images: give the "
            "probability of each, [N]"
        )
    curves = values.reshape(num_orders, num_counts, -1).swapaxes(1, 2)
    return jnp.where(finite[None, :, None], curves, jnp.nan)


def _area(curves, fractions):
    return jnp.trapezoid(curves, fractions[None], axis=-1)
