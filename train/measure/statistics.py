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


def summarize(values: dict) -> dict:
    """Per measure: the mean, its bootstrap 95 % interval, n and what is undefined.

    Args:
      values: dict of per-example arrays, as from ``measure_split``.

    Returns:
      dict measure -> {mean, low, high, n, undefined}, for the keys of ``MEASURES``.
    """
    values = dict(values)
    summary = {}
    if "iou_curve" in values:
        curve = values.pop("iou_curve")
        means = np.array([finite_mean(column) for column in curve.T])
        best = 0 if np.isnan(means).all() else int(np.nanargmax(means))
        values["iou_best"] = curve[:, best]
    for key in MEASURES:
        if key in values:
            known = np.isfinite(values[key])
            interval = metrics.mean_and_interval(values[key], known)
            summary[key] = {
                **interval._asdict(),
                "n": int(known.sum()),
                "undefined": int((~known).sum()),
            }
    if "iou_best" in summary:
        summary["iou_best"]["threshold"] = best / NUM_THRESHOLDS
    for key, confidence in CALIBRATIONS.items():
        if confidence in values:
            summary[key] = _calibration(values[confidence], values["accuracy"])
    return summary


def _calibration(confidence, correct, num_resamples=200):
    known = np.isfinite(confidence)
    confidence, correct = confidence[known], correct[known]
    n = len(confidence)
    generator = np.random.default_rng(0)
    resampled = [
        calibration_error(confidence[i], correct[i])
        for i in (
            generator.integers(n, size=n) for _ in range(num_resamples if n else 0)
        )
    ]
    low, high = np.quantile(resampled, [0.025, 0.975]) if n else (math.nan, math.nan)
    mean = calibration_error(confidence, correct) if n else math.nan
    return {
        "mean": mean,
        "low": float(low),
        "high": float(high),
        "n": n,
        "undefined": int((~known).sum()),
    }


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


def summarize_means(values: dict) -> dict:
    """Means of what ``MEASURES`` names, over the examples where it is defined.

    Args:
      values: dict of per-example arrays.

    Returns:
      {means, undefined}: dict measure -> mean (None where no example defines it), and
      dict measure -> number of examples that do not, where there are any.
    """
    values = dict(values)
    if "iou_curve" in values:
        curve = values.pop("iou_curve")
        means = np.array([finite_mean(column) for column in curve.T])
        values["iou_best"] = curve[:, np.argmax(np.nan_to_num(means, nan=-1.0))]
    known = {key: values[key] for key in MEASURES if key in values}
    means = {key: finite_mean(value) for key, value in known.items()}
    for key, confidence in CALIBRATIONS.items():
        if confidence in values:
            means[key] = calibration_error(values[confidence], values["accuracy"])
    counts = {key: int((~np.isfinite(value)).sum()) for key, value in known.items()}
    return {
        "means": {k: v if np.isfinite(v) else None for k, v in means.items()},
        "undefined": {key: count for key, count in counts.items() if count},
    }


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
