"""Parameters from a table of a source's names: regex -> (our parameter, transform).

Every row whose regex matches a tensor's whole name makes a parameter of it, so that one
tensor may fill several (a fused projection) and each parameter is filled by one.
``fill`` collects all that does not fit and raises once. Imports jax and numpy only;
does no I/O.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax.tensor_pickle import printable

_NUMBERS = (jnp.floating, jnp.integer, jnp.bool_)
# Mismatches that a message names; it counts the others.
_NAMED = 4


class Row(NamedTuple):
    """One rule.

    Attributes:
      pattern: of the tensor's whole name.
      parameter: path of our parameter, "block{0}/fc1/kernel" with the pattern's groups.
      transform: tensor -> parameter.
    """

    pattern: str
    parameter: str
    transform: Callable[[np.ndarray], np.ndarray]


class Table(NamedTuple):
    """The rules of one source.

    Attributes:
      rows: of ``Row``.
      head: name of the tensor whose first axis is the number of classes.
      ignored: regexes of names that no model here has a place for.
    """

    rows: Sequence[Row]
    head: str
    ignored: Sequence[str] = ()


def same(tensor):
    """As it is."""
    return tensor


def dense(tensor):
    """[out, in] -> [in, out]; a 1x1 convolution counts as a dense layer."""
    return tensor.reshape(tensor.shape[0], -1).T


def conv(tensor):
    """[out, in, height, width] -> [height, width, in, out]."""
    return tensor.transpose(2, 3, 1, 0)


def flat(tensor):
    """[..., K] with leading ones -> [K]."""
    return tensor.reshape(-1)


def fill(table: Table, tensors: Mapping[str, np.ndarray], shapes: Mapping) -> dict:
    """Our parameters from a source's tensors.

    Args:
      table: of the source.
      tensors: name -> array.
      shapes: "block0/fc1/kernel" -> shape, of every parameter.

    Returns:
      Path -> float32 array, of every path in ``shapes``.

    Raises:
      ValueError: one line with every kind of mismatch: tensors without a place,
        parameters without a tensor, shapes that differ, numbers that are none.
    """
    filled, wrong, unused = {}, [], []
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in table.ignored):
            continue
        rows = [(m, row) for row in table.rows if (m := re.fullmatch(row[0], name))]
        used = False
        for match, row in rows:
            path = row.parameter.format(*match.groups())
            if path not in shapes:
                continue
            used = True
            found = _transformed(tensor, row.transform, shapes[path])
            if isinstance(found, str):
                wrong.append(f"'{printable(name)}' {found}")
            filled[path] = found
        if not used:
            unused.append(f"'{printable(name)}'")
    missing = [f"'{path}'" for path in shapes if path not in filled]
    faults = [
        f"{kind} {_listed(some)}"
        for kind, some in (
            ("no tensor for", missing),
            ("no place for", unused),
            ("tensor", wrong),
        )
        if some
    ]
    if faults:
        raise ValueError("; ".join(faults))
    return {path: jnp.asarray(array) for path, array in filled.items()}


def _listed(some: list[str]) -> str:
    more = f" and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
    return ", ".join(some[:_NAMED]) + more


def _transformed(tensor, transform, shape) -> np.ndarray | str:
    """The parameter, or what is wrong with the tensor."""
    tensor = np.asarray(tensor)
    if not any(jnp.issubdtype(tensor.dtype, kind) for kind in _NUMBERS):
        return f"holds {printable(tensor.dtype.name)}, which are no real numbers"
    with np.errstate(over="ignore", invalid="ignore"):  # both are refused below
        tensor = tensor.astype(np.float32)
    try:
        array = transform(tensor)
    except (ValueError, IndexError):
        return f"has shape {tensor.shape}, not one for {tuple(shape)}"
    if array.shape != tuple(shape):
        return f"has shape {tensor.shape}, not one for {tuple(shape)}"
    if not np.isfinite(array).all():
        return "holds NaN or infinite values"
    return np.ascontiguousarray(array)


def shapes_of(model, image_shape) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a model's parameters; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }


def choose(tables: Sequence[Table], head: str, names: Sequence[str]) -> Table:
    """Of the tables with this classifier the one that knows most names."""

    def known(table):
        patterns = [*(row.pattern for row in table.rows), *table.ignored]
        return sum(any(re.fullmatch(p, name) for p in patterns) for name in names)

    return max((t for t in tables if t.head == head), key=known)


def position_cells(table: Table, tensors: Mapping[str, np.ndarray]) -> int | None:
    """The number of patches that a transformer's file has positions for."""
    for row in table.rows:
        for name, tensor in tensors.items():
            if row.parameter == "position" and re.fullmatch(row.pattern, name):
                found = row.transform(np.asarray(tensor))
                return found.shape[1] if found.ndim == 3 else None
    return None


def resize_positions(
    position: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]
) -> jax.Array:
    """Positions [1, h w, D] at another grid: bicubic, smoothed where it is coarser.

    As timm and Hugging Face have PyTorch do it.
    """
    width = position.shape[-1]
    cells = position.reshape(*grid, width)
    resized = jax.image.resize(cells, (*new_grid, width), "cubic", antialias=True)
    return resized.reshape(1, -1, width)
