"""Means over examples, their bootstrap intervals, and differences between phases.

May import numpy, ``ibsgl_jax.metrics`` and ``train.measures``.
"""

import math

import numpy as np

from ibsgl_jax import metrics
from train import measures
from train.measures import MEASURES

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
        summary["iou_best"]["threshold"] = best / measures.NUM_THRESHOLDS
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
        measures.calibration_error(confidence[i], correct[i])
        for i in (
            generator.integers(n, size=n) for _ in range(num_resamples if n else 0)
        )
    ]
    low, high = np.quantile(resampled, [0.025, 0.975]) if n else (math.nan, math.nan)
    mean = measures.calibration_error(confidence, correct) if n else math.nan
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
