"""Pixels in a hole as the weighted mean of their neighbours, all solved for together.

Conjugate gradients with a multigrid preconditioner: the number of iterations hardly
grows with the hole; without the coarser grids it would grow with its width. Imports
jax, chex and ``chunks`` only.

Reference of the equations: Rong et al., "A Consistent and Efficient Evaluation Strategy
for Attribution Methods", ICML 2022.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax import chunks

# Steps (down, right) to four of the eight neighbours, each with its weight; the other
# four are opposite.
STEPS = (((0, 1), 1 / 6), ((1, 0), 1 / 6), ((1, 1), 1 / 12), ((1, -1), 1 / 12))
# Of the smoothing steps: below 2 over the largest eigenvalue on every grid.
DAMPING = 0.8
# A block of four cells is as stiff as one cell; moving together, they look twice so.
STIFFNESS = 0.5
# Cells across, and smoothing steps, of the coarsest grid.
COARSEST, COARSEST_SWEEPS = 8, 20


class _Grid(NamedTuple):
    """The equations ``diagonal x - sum of weights times neighbours`` of one grid.

    diagonal [1, H, W], 0 outside the hole; weights, eight of that shape, of the edges
    from a cell to those one of STEPS ahead and then behind it, 0 unless both are in the
    hole.
    """

    diagonal: chex.Array
    weights: tuple[chex.Array, ...]


def solve(
    images: chex.Array,
    hole: chex.Array,
    *,
    tolerance: float = 1e-6,
    num_iterations: int = 100,
) -> tuple[chex.Array, chex.Array]:
    """The images with the pixels of their holes solved for.

    Each satisfies ``x_i = sum_n w_n x_n / sum_n w_n`` over its up to eight neighbours
    in the image, with weight 1/6 to the four next to it and 1/12 to the diagonal ones.

    Args:
      images: float32 [N, H, W, C].
      hole: bool [N, H, W]; a hole that is the whole image becomes 0.
      tolerance: of the residual, relative to the right-hand side, in each image.
      num_iterations: at most so many; 10 to 20 reach the tolerance.

    Returns:
      (float32 [N, H, W, C], int32 [N] iterations).
    """
    # Channels first: the rows of pixels are what a processor takes at a time.
    found, count = chunks.on_each_device(
        jax.vmap(lambda image, hole: _solve(image, hole, tolerance, num_iterations)),
        jnp.moveaxis(images, 3, 1),
        hole,
    )
    return jnp.moveaxis(found, 1, 3), count


def _solve(image, hole, tolerance, num_iterations):
    hole = hole[None]  # in every channel
    kind = image.dtype
    everywhere = _both_ways(
        jnp.where(_ahead(jnp.ones(hole.shape, bool), step), kind.type(weight), 0.0)
        for step, weight in STEPS
    )
    degree = _neighbour_sum(everywhere, jnp.ones(hole.shape, kind))
    known = jnp.where(hole, 0.0, image)
    rhs = jnp.where(hole, _neighbour_sum(everywhere, known), 0.0)
    grids = [
        _Grid(
            jnp.where(hole, degree, 0.0),
            _both_ways(
                jnp.where(hole & _ahead(hole, step), kind.type(weight), 0.0)
                for step, weight in STEPS
            ),
        )
    ]
    while max(grids[-1].diagonal.shape) > COARSEST:
        grids.append(_coarser(grids[-1]))
    limit = tolerance**2 * jnp.sum(rhs * rhs)

    def unfinished(state):
        _, residual, _, _, count = state
        return (jnp.sum(residual * residual) > limit) & (count < num_iterations)

    def iterate(state):
        x, residual, direction, product, count = state
        step = _cycle(grids, residual)
        new = jnp.sum(residual * step)
        direction = step + _ratio(new, product) * direction
        image = _apply(grids[0], direction)
        length = _ratio(new, jnp.sum(direction * image))
        x, residual = x + length * direction, residual - length * image
        return x, residual, direction, new, count + 1

    nothing = jnp.zeros_like(rhs)
    start = nothing, rhs, nothing, jnp.zeros_like(limit), jnp.int32(0)
    x, *_, count = jax.lax.while_loop(unfinished, iterate, start)
    return known + x, count


def _cycle(grids, rhs):
    """One V-cycle: smooth, correct on the coarser grid, smooth; symmetric in rhs."""
    grid, *coarser = grids
    inverse = _ratio(1.0, grid.diagonal)
    if not coarser:
        return jax.lax.fori_loop(
            0,
            COARSEST_SWEEPS,
            lambda _, x: x + DAMPING * inverse * (rhs - _apply(grid, x)),
            jnp.zeros_like(rhs),
        )
    x = DAMPING * inverse * rhs
    correction = _cycle(coarser, _gathered(rhs - _apply(grid, x)))
    x = x + _spread(correction, grid.diagonal)
    return x + DAMPING * inverse * (rhs - _apply(grid, x))


def _apply(grid, x):
    return grid.diagonal * x - _neighbour_sum(grid.weights, x)


def _both_ways(weights):
    """Weights of the edges ahead, and of the same edges seen from their other ends."""
    ahead = tuple(weights)
    back = (
        _ahead(weight, (-down, -right))
        for weight, ((down, right), _) in zip(ahead, STEPS, strict=True)
    )
    return *ahead, *back


def _neighbour_sum(weights, x):
    """Sum over the neighbours in x [..., H, W], times the weights of their edges."""
    steps = [step for step, _ in STEPS]
    steps += [(-down, -right) for down, right in steps]
    padded = _framed(x)
    return sum(
        weight * _shifted(padded, step)
        for weight, step in zip(weights, steps, strict=True)
    )


def _ahead(x, step):
    """x [..., H, W] at one step from each cell, 0 outside."""
    return _shifted(_framed(x), step)


def _framed(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)])


def _shifted(framed, step):
    height, width = framed.shape[-2] - 2, framed.shape[-1] - 2
    down, right = 1 + step[0], 1 + step[1]
    return framed[..., down : down + height, right : right + width]


def _coarser(grid):
    """The equations of blocks of 2 x 2 cells that move together."""
    diagonal, right, down, right_down, left_down = (
        _even(x) for x in (grid.diagonal, *grid.weights[: len(STEPS)])
    )

    def at(x, row, column):
        return x[..., row::2, column::2]

    within = at(right, 0, 0) + at(right, 1, 0) + at(down, 0, 0) + at(down, 0, 1)
    within += at(right_down, 0, 0) + at(left_down, 0, 1)
    to_right = at(right, 0, 1) + at(right, 1, 1) + at(right_down, 0, 1)
    # The edge from the next block's first cell leads left and down into this one.
    to_right += _ahead(at(left_down, 0, 0), (0, 1))
    to_down = at(down, 1, 0) + at(down, 1, 1)
    to_down += at(right_down, 1, 0) + at(left_down, 1, 1)
    weights = to_right, to_down, at(right_down, 1, 1), at(left_down, 1, 0)
    return _Grid(
        STIFFNESS * (_gathered(diagonal) - 2.0 * within),
        _both_ways(STIFFNESS * weight for weight in weights),
    )


def _even(x):
    """x [..., H, W] with a row and a column of zeros where their number is odd."""
    height, width = x.shape[-2:]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, height % 2), (0, width % 2)])


def _gathered(x):
    """Sums over blocks of 2 x 2 cells."""
    x = _even(x)
    height, width = x.shape[-2:]
    x = x.reshape(*x.shape[:-2], height // 2, 2, width).sum(-2)
    return x.reshape(*x.shape[:-1], width // 2, 2).sum(-1)


def _spread(x, diagonal):
    """Each block's value to its cells in the hole; the transpose of ``_gathered``."""
    height, width = diagonal.shape[-2:]
    x = jnp.repeat(jnp.repeat(x, 2, axis=-2), 2, axis=-1)[..., :height, :width]
    return jnp.where(diagonal > 0, x, 0.0)


def _ratio(a, b):
    """a / b, 0 where b is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
