"""Means with bootstrap intervals, on the host; imports numpy only."""

from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 20  # values drawn at once


class Interval(NamedTuple):
    """A mean and the two ends of its interval."""

    mean: float
    low: float
    high: float


def mean_and_interval(
    values,
    counts=None,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The mean of per-example values and its bootstrap interval, on the host.

    The percentile interval. NumPy, so not for use under jit.

    Args:
      values: [N], of all the examples of a split.
      counts: [N], which of them count; None: all.
      seed: of NumPy's generator; the same seed gives the same interval.
      num_resamples: draws of N examples with replacement.
      level: in (0, 1).

    Returns:
      Interval of floats. Without any example all three are NaN; with one, equal. A
      NaN that counts makes all three NaN: leave it out through counts and say so.

    Raises:
      ValueError: level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is no probability; take one in (0, 1)")
    values = np.asarray(values, np.float64)
    if counts is not None:
        values = values[np.asarray(counts) > 0]
    if values.size == 0 or np.isnan(values).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // values.size)  # of a chunk; the draws do not depend on it
    means = np.concatenate(
        [
            values[generator.integers(values.size, size=(count, values.size))].mean(1)
            for start in range(0, num_resamples, rows)
            for count in [min(rows, num_resamples - start)]
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
