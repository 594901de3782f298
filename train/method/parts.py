"""The guided part of a step, on a CPU some examples at a time, which costs nothing."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from ibsgl_jax.chunks import map_chunks

# Images of a part: few enough that a guided step needs little more memory than one that
# is not, and enough that it is no slower (benchmarks/NOTES.md).
SIZE = 16


class Part(NamedTuple):
    """Some of a step's examples, which do not depend on the others.

    Attributes:
      keys, labels: as in ``step.Forward``.
      features: of it, without a gradient.
      seen: [n, h, w, K], the teacher's features.
      answers: dict of what the batch says of each example: mask and positives, if any.
    """

    keys: jax.Array
    labels: jax.Array
    features: jax.Array
    seen: jax.Array
    answers: dict


def part_of(forward, seen) -> Part:
    """All examples of a ``step.Forward``; ``seen`` by the teacher."""
    answers = {k: v for k, v in forward.batch.items() if k in ("mask", "positives")}
    features = jax.lax.stop_gradient(forward.features)
    return Part(forward.keys, forward.labels, features, seen, answers)


def in_parts(fn: Callable, everyone: Part, *, platform: str | None = None):
    """``fn(Part)`` of all examples, a pytree of [N, ...].

    On a CPU ``fn`` sees ``SIZE`` examples, then the next ones, if that divides N; the
    results are the same but for rounding.

    Args:
      fn: each example's results must not depend on the others.
      everyone: all of the step's examples.
      platform: that it is compiled for; None for any, for which ``fn`` is traced twice.
    """
    if len(everyone.labels) % SIZE or platform not in ("cpu", None):
        return fn(everyone)
    by_parts = functools.partial(map_chunks, fn, chunk_size=SIZE)
    if platform == "cpu":
        return by_parts(everyone)
    return jax.lax.platform_dependent(everyone, cpu=by_parts, default=fn)
