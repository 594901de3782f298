"""The Gaussian blur of the bottleneck, as matrix products.

Imports jax, chex, numpy and ``chunks`` only.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import chunks

# Cells up to which a TPU blurs in one matrix product.
MAX_FLAT_CELLS = 256


def make_blur(
    size: tuple[int, int], sigma: float | None, *, platform: str | None = None
) -> Callable[[chex.Array], chex.Array]:
    """A Gaussian blur of [H, W, ...] over its first two axes.

    The kernel is cut at ``2 round(2 sigma) + 1`` cells and normalised, the border
    reflected without repeating the edge, as in IBA's code; here as two small matrix
    products, which compile to less than a convolution of every channel. A CPU is
    fastest where all further axes are merged into one. A TPU takes one product, over
    all cells: axes that are merged would change every array's layout; over several
    devices, they would send each all images.

    Args:
      size: (H, W).
      sigma: standard deviation in cells, or None for the identity.
      platform: "tpu", "cpu", ...: the form of one platform; None: each its own, when
        it is compiled.
    """
    if sigma is None:
        return lambda maps: maps
    rows, columns_once = (_blur_matrix(length, sigma) for length in size)
    num_cells = size[0] * size[1]
    # One copy of the matrix per row: a product of a batch is faster than the same
    # product after moving axes.
    columns = np.broadcast_to(columns_once, (size[0], *columns_once.shape))
    each_row = (((2,), (1,)), ((0,), (0,)))

    def by_axes(maps):
        maps = jnp.tensordot(rows, maps, 1, precision="highest")
        return jax.lax.dot_general(columns, maps, each_row, precision="highest")

    def by_matrices(maps):
        flat = jnp.matmul(rows, maps.reshape(size[0], -1), precision="highest")
        flat = flat.reshape(*size, -1)
        return jnp.matmul(columns, flat, precision="highest").reshape(maps.shape)

    def at_once(maps):
        cells = maps.reshape(num_cells, *maps.shape[2:])
        matrix = np.kron(rows, columns_once)
        return jnp.tensordot(matrix, cells, 1, precision="highest").reshape(maps.shape)

    forms = {"cpu": by_matrices}
    if num_cells <= MAX_FLAT_CELLS:
        forms["tpu"] = at_once

    def blur(maps):
        if chunks.has_spread_axis(maps):
            return by_axes(maps)
        if platform is None:
            return jax.lax.platform_dependent(maps, **forms, default=by_axes)
        return forms.get(platform, by_axes)(maps)

    return blur


def _blur_matrix(length: int, sigma: float) -> np.ndarray:
    """[length, length], row i the weights of output cell i."""
    radius = int(round(2 * sigma))
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    weights /= weights.sum()
    sources = np.pad(np.arange(length), radius, mode="reflect")
    matrix = np.zeros((length, length))
    for i in range(length):
        np.add.at(matrix[i], sources[i : i + 2 * radius + 1], weights)
    return matrix.astype(np.float32)
