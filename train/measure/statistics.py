"""Values of examples summed up: means, bootstrap intervals, paired differences."""

import math

import jax.numpy as jnp
import numpy as np

from ibsgl_jax import metrics
from train.measure import classes, precision
from train.measure.catalogue import MEASURES, NUM_BINS, NUM_THRESHOLDS

# Measures at one threshold for all images: their curves over thresholds.
CURVES = {"iou_best": "iou_curve", "max_box_acc": "box_curve"}


def calibration_error(confidence, correct) -> float:
    """``metrics.calibration_error`` of NumPy arrays [N] over a whole split."""
    index = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)

    def bin_sums(weights):
        return np.bincount(index, weights, NUM_BINS)

    bins = metrics.CalibrationBins(
        confidence=bin_sums(confidence),
        correct=bin_sums(correct),
        count=bin_sums(np.ones(len(index))),
    )
    gap = np.abs(bins.correct - bins.confidence).sum()
    return float(gap / max(bins.count.sum(), 1))


def ratio(numerator, denominator) -> float:
    """The ratio of the sums of arrays [N]; NaN where there is nothing to divide by."""
    total = denominator.sum(dtype=np.float64)
    return float(numerator.sum(dtype=np.float64) / total) if total > 0 else math.nan


# Measures that are no means of examples: the statistic, and the values it is made of.
WHOLE = {
    "balanced_accuracy": (classes.balanced, ("label", "accuracy")),
    "worst_class": (classes.worst, ("label", "accuracy")),
    "calibration_error": (calibration_error, ("confidence", "accuracy")),
    "calibration_scaled": (calibration_error, ("confidence_scaled", "accuracy")),
    "mean_ap": (precision.mean_average_precision, ("logits", "positives")),
    "top_label": (precision.top_label, ("logits", "positives")),
    "mass_ratio": (ratio, ("mass_p", "mass_c")),
    "p_on_object": (ratio, ("mass_p_inside", "mass_c")),
}


def summarize(values: dict, *, keys=tuple(MEASURES), intervals: bool = False) -> dict:
    """The mean of every measure over the examples where it is defined.

    Args:
      values: dict of per-example arrays, as from ``splits.collect``.
      keys: the measures that are wanted, of those that the values hold or make up.
      intervals: bootstrap 95 % intervals too, and float64 means.

    Returns:
      dict measure -> {mean, n, undefined}, with intervals also low and high: the mean
      (NaN for nothing), and how many examples define the measure and how many do not.
      Those of ``CURVES`` also have their threshold.
    """
    values = dict(values)
    thresholds = {}
    for key, name in CURVES.items():
        if name in values and key in keys:
            curve = values[name]
            means = np.array([finite_mean(column) for column in curve.T])
            best = 0 if np.isnan(means).all() else int(np.nanargmax(means))
            values[key], thresholds[key] = curve[:, best], best / NUM_THRESHOLDS
    summary = {key: _entry(values[key], intervals) for key in keys if key in values}
    for key, threshold in thresholds.items():
        summary[key]["threshold"] = threshold
    if "p_box_share" in values:  # NaN without a box or an L^p
        values["mass_p_inside"] = values["mass_p"] * values["p_box_share"]
    for key, (statistic, names) in WHOLE.items():
        if key in keys and all(name in values for name in names):
            arrays = [values[name] for name in names]
            summary[key] = _split_entry(statistic, arrays, 200 * intervals)
    return summary


def _entry(values, intervals):
    known = np.isfinite(values)
    if intervals:
        entry = metrics.mean_and_interval(values, known)._asdict()
    else:
        entry = {"mean": finite_mean(values)}
    return {**entry, "n": int(known.sum()), "undefined": int((~known).sum())}


def _split_entry(statistic, arrays, num_resamples: int) -> dict:
    """The entry of a statistic of the whole split, with its interval if resampled."""
    finite = [np.isfinite(a).all(axis=tuple(range(1, a.ndim))) for a in arrays]
    known = np.all(finite, axis=0)
    arrays = [array[known] for array in arrays]
    n = int(known.sum())
    entry = {"mean": statistic(*arrays) if n else math.nan}
    if num_resamples:
        generator = np.random.default_rng(0)
        resampled = [math.nan]
        if n:
            draws = (generator.integers(n, size=n) for _ in range(num_resamples))
            resampled = [statistic(*(a[i] for a in arrays)) for i in draws]
        low, high = np.quantile(resampled, [0.025, 0.975])
        entry |= {"low": float(low), "high": float(high)}
    return {**entry, "n": n, "undefined": int((~known).sum())}


def differences(values: dict, reference: dict) -> dict:
    """Paired: the mean of value - reference per example, with its interval."""
    rows = {}
    for key in MEASURES:
        if key in values and key in reference:
            gap = values[key] - reference[key]
            known = np.isfinite(gap)
            interval = metrics.mean_and_interval(gap, known)
            rows[key] = {**interval._asdict(), "n": int(known.sum())}
    return rows


def finite_mean(values) -> float:
    """The mean of what is defined, NaN for nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def map_change(maps, other_maps) -> np.ndarray:
    """How little maps change between two networks: rank correlation [N].

    1 for maps that are equal up to scale, constant ones among them, which have no
    rank correlation; NaN where a map is not finite.
    """
    correlation = metrics.rank_correlation(maps, other_maps)
    same = jnp.all(
        jnp.isclose(_scaled(maps), _scaled(other_maps), atol=1e-6), axis=(1, 2)
    )
    return np.asarray(jnp.where(same, 1.0, correlation))


def _scaled(maps):
    peak = jnp.max(jnp.abs(maps), axis=(1, 2), keepdims=True)
    return maps / jnp.where(peak == 0, 1.0, peak)
