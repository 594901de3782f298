"""Values of examples summed up: means, bootstrap intervals, paired differences."""

import math

import jax.numpy as jnp
import numpy as np

from ibsgl_jax import metrics
from train.measure.catalogue import MEASURES, NUM_BINS, NUM_THRESHOLDS

# Measures of a whole split: the per-example confidence that each is made of.
CALIBRATIONS = {
    "calibration_error": "confidence",
    "calibration_scaled": "confidence_scaled",
}

# Measures at one threshold for all images: their curves over thresholds.
CURVES = {"iou_best": "iou_curve", "max_box_acc": "box_curve"}


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
    for key, confidence in CALIBRATIONS.items():
        if key in keys and confidence in values:
            pair = values[confidence], values["accuracy"]
            summary[key] = _calibration(*pair, num_resamples=200 * intervals)
    return summary


def _entry(values, intervals):
    known = np.isfinite(values)
    if intervals:
        entry = metrics.mean_and_interval(values, known)._asdict()
    else:
        entry = {"mean": finite_mean(values)}
    return {**entry, "n": int(known.sum()), "undefined": int((~known).sum())}


def _calibration(confidence, correct, *, num_resamples):
    """The entry of a calibration error, with its interval if it is resampled."""
    known = np.isfinite(confidence)
    entry = {"n": int(known.sum()), "undefined": int((~known).sum())}
    confidence, correct = confidence[known], correct[known]
    if not entry["n"]:
        ends = {"low": math.nan, "high": math.nan} if num_resamples else {}
        return {"mean": math.nan, **ends, **entry}
    mean = calibration_error(confidence, correct)
    if not num_resamples:
        return {"mean": mean, **entry}
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(num_resamples):
        i = generator.integers(len(correct), size=len(correct))
        resampled.append(calibration_error(confidence[i], correct[i]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high), **entry}


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
