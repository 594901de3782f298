"""Tokens [N, T, D] read as a map [N, h, w, D], with the tokens before it kept aside.

A transformer's layer gives T = prefix + h w tokens: first those of no place (class,
registers), then the image's, row by row. Every function here that takes features and a
``head_fn`` takes such a layer too: its maps are [N, h, w], noise and steps move the
image's tokens, and the prefix passes to the head unchanged. The grid is the one that a
``TokenHead`` names (``tapping`` makes one), else the square that T admits. Imports jax,
flax and chex only.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

# Tokens before the image's that are looked for: a class token and registers.
MAX_PREFIX = 16


class Layout(NamedTuple):
    """Where the image's tokens lie.

    Attributes:
      grid: (h, w), in tokens.
      prefix: number of tokens before them.
    """

    grid: tuple[int, int]
    prefix: int


# Compared by identity, so that jax.jit(head) can hold it as a function.
@struct.dataclass(eq=False)
class TokenHead:
    """A head on tokens that knows their grid; made by ``on_grid``.

    A pytree of ``head_fn``'s arrays, so it passes through jit as an argument.

    Attributes:
      head_fn: features [N, T, D] -> logits [N, C]; a pytree.
      layout: of the tokens.
    """

    head_fn: Any
    layout: Layout = struct.field(pytree_node=False)

    def __call__(self, features: jax.Array) -> jax.Array:
        """What ``head_fn`` returns."""
        return self.head_fn(features)


def on_grid(head_fn: Callable, *, grid: tuple[int, int], prefix: int = 0) -> TokenHead:
    """A head whose tokens are ``prefix`` ones of no place and an image's (h, w).

    Args:
      head_fn: features [N, T, D] -> logits [N, C], T = prefix + h w.
      grid: (h, w), >= 1.
      prefix: class token, registers; >= 0.

    Raises:
      ValueError: a grid or prefix that cannot be.
    """
    layout = _checked(grid, prefix)
    if jax.tree_util.all_leaves([head_fn]):  # a plain function
        head_fn = jax.tree_util.Partial(head_fn)
    return TokenHead(head_fn, layout)


def find(
    num_tokens: int,
    image_size: tuple[int, int] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Layout:
    """The grid of a number of tokens.

    Args:
      num_tokens: T.
      image_size: (H', W') in pixels: the grid is that of some square patch, those that
        divide both sides first; None: the grid is square.
      grid: (h, w), if it is known; then it is only checked.
      prefix: number of the tokens before the grid, if it is known; else the smallest
        up to ``MAX_PREFIX`` that leaves a grid.

    Returns:
      A ``Layout``.

    Raises:
      ValueError: there is no such grid, or the one given does not multiply to T.
    """
    if prefix is not None and prefix > num_tokens:
        raise ValueError(f"prefix={prefix}: the layer has only {num_tokens} tokens")
    if grid is not None:
        return _fitting(num_tokens, grid, prefix)
    found = []
    for (height, width), exact in _grids(num_tokens, image_size):
        rest = num_tokens - height * width
        wanted = rest <= MAX_PREFIX if prefix is None else rest == prefix
        if rest >= 0 and wanted and height * width > 1:
            found.append((not exact, rest, (height, width)))
    if not found:
        of = "" if image_size is None else f" of {image_size[0]} x {image_size[1]} "
        aside = f"up to {MAX_PREFIX}" if prefix is None else prefix
        kind = f"no grid of an image{of.rstrip()}" if of else "no square"
        raise ValueError(
            f"{num_tokens} tokens are {kind} with {aside} before it: "
            "give tapping, or tokens.on_grid, grid=(h, w) and prefix="
        )
    _, rest, size = min(found)
    return Layout(size, rest)


def _grids(num_tokens, image_size):
    """((h, w), whether its patches fill the image) of every square patch."""
    if image_size is None:
        side = math.isqrt(num_tokens)
        return [((side - less, side - less), True) for less in range(side)]
    height, width = image_size
    return [
        ((height // patch, width // patch), not (height % patch or width % patch))
        for patch in range(1, min(height, width) + 1)
    ]


def _fitting(num_tokens, grid, prefix) -> Layout:
    layout = _checked(grid, prefix or 0)
    cells = layout.grid[0] * layout.grid[1]
    if prefix is None and cells <= num_tokens:
        return layout._replace(prefix=num_tokens - cells)
    if cells + layout.prefix != num_tokens:
        aside = f" and a prefix of {layout.prefix}" if layout.prefix else ""
        raise ValueError(
            f"grid={layout.grid}{aside} make {cells + layout.prefix} tokens, the layer "
            f"has {num_tokens}: give h * w + prefix = {num_tokens}"
        )
    return layout


def _checked(grid, prefix) -> Layout:
    sizes = tuple(grid) if isinstance(grid, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"grid={grid!r}: give (h, w), two positive integers")
    if not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"prefix={prefix!r}: give a number of tokens, >= 0")
    return Layout((sizes[0], sizes[1]), prefix)


def layout_of(
    head_fn: Callable, features, image_size: tuple[int, int] | None = None
) -> Layout | None:
    """Where the image's tokens lie in features [N, T, D]; None for maps.

    Raises:
      ValueError: T is not what the head names, or admits no grid.
    """
    if len(features.shape) != 3:
        return None
    num_tokens = features.shape[1]
    if isinstance(head_fn, TokenHead):
        return find(num_tokens, grid=head_fn.layout.grid, prefix=head_fn.layout.prefix)
    return find(num_tokens, image_size)


def map_size(head_fn: Callable, features) -> tuple[int, int]:
    """(h, w) of the maps that features [N, h, w, K] or [N, T, D] have."""
    layout = layout_of(head_fn, features)
    return tuple(features.shape[1:3]) if layout is None else layout.grid


def as_map(
    head_fn: Callable, features: chex.Array
) -> tuple[Callable, chex.Array, Layout | None]:
    """A head and its features as those of a map.

    Args:
      head_fn: on ``features``.
      features: [N, T, D], or [N, h, w, K], which pass as they are.

    Returns:
      The head on maps [S N, h, w, D] (S copies of the batch, one after the other), the
      map [N, h, w, D], and its layout, None where it was one. The head puts the
      features' own prefix before each copy, which is no part of what is differentiated
      in the map.
    """
    layout = layout_of(head_fn, features)
    if layout is None:
        return head_fn, features, None
    prefix = features[:, : layout.prefix]

    def map_head_fn(maps):
        copies = maps.shape[0] // prefix.shape[0]
        before = jnp.tile(prefix.astype(maps.dtype), (copies, 1, 1))
        after = maps.reshape(*maps.shape[:-3], -1, maps.shape[-1])
        return head_fn(jnp.concatenate([before, after], axis=1))

    return map_head_fn, to_map(features, layout), layout


def to_map(values: chex.Array, layout: Layout | None) -> chex.Array:
    """[..., T, D] -> [..., h, w, D], without the prefix; as it is where layout is None.

    For features and for their moments.
    """
    if layout is None:
        return values
    cells = values[..., layout.prefix :, :]
    return cells.reshape(*values.shape[:-2], *layout.grid, values.shape[-1])


def from_map(
    maps: chex.Array, features: chex.Array, layout: Layout | None
) -> chex.Array:
    """Features [N, T, D] with the image's tokens replaced by maps [N, h, w, D]."""
    if layout is None:
        return maps
    prefix = features[:, : layout.prefix].astype(maps.dtype)
    cells = maps.reshape(maps.shape[0], -1, maps.shape[-1])
    return jnp.concatenate([prefix, cells], axis=1)
