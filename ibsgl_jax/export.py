"""Attribution as one file that runs without this package. May do I/O.

``jax.export`` needs the package flatbuffers to write the file.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")

RECIPE = """\
import pathlib, jax, jax.export
f = jax.export.deserialize(bytearray(pathlib.Path({path!r}).read_bytes()))
maps, logits = f.call(images, classes)  # float32 [n, {size}, {size}, 3], int32 [n]
"""


def export_attribution(
    attribution_fn: Callable,
    logits_fn: Callable,
    *,
    image_shape: tuple[int, int, int],
    platforms: tuple[str, ...] = PLATFORMS,
) -> bytes:
    """A self-contained attribution function, weights included, as bytes.

    The function is (images float32 [n, H, W, 3], classes int32 [n]) -> (maps
    [n, H, W], logits [n, C]) for any n; a negative class stands for the predicted one.
    Load it with ``jax.export.deserialize(bytearray(...)).call``; that process needs a
    jax at least as new as this one, and nothing else.

    Args:
      attribution_fn: (images, classes) -> maps, from
        ``attribution.make_attribution_fn``. All n images are worked on at once.
      logits_fn: images -> logits.
      image_shape: (H, W, 3).
      platforms: what the file can run on.
    """
    explain_fn = jax.jit(make_explain_fn(attribution_fn, logits_fn))
    (n,) = export.symbolic_shape("n")
    exported = export.export(explain_fn, platforms=platforms)(
        jax.ShapeDtypeStruct((n, *image_shape), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )
    return bytes(exported.serialize())


def make_explain_fn(attribution_fn: Callable, logits_fn: Callable) -> Callable:
    """The function of the file: (images, classes) -> (maps, logits)."""

    def explain(images, classes):
        logits = logits_fn(images)
        predicted = jnp.argmax(logits, axis=-1).astype(classes.dtype)
        classes = jnp.where(classes < 0, predicted, classes)
        return attribution_fn(images, classes), logits

    return explain


def beside(path) -> Path:
    """Where ``write`` puts the description of a function at ``path``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def write(path, blob: bytes, description: dict) -> Path:
    """Writes the function, and beside it ``<path>.json`` with what its images need.

    Raises:
      OSError: a file cannot be written.
    """
    Path(path).write_bytes(blob)
    beside(path).write_text(json.dumps(description, indent=2) + "\n")
    return beside(path)
