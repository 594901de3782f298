"""One temperature for the logits, fitted on validation: what rescaling would mend.

A guided network is less sure of itself than its control. Dividing all logits by one
number changes no prediction and no normalised saliency map, so the likelihood and the
calibration that remain after it are those that a user gets who does so (Guo et al.,
"On Calibration of Modern Neural Networks", ICML 2017).
"""

import numpy as np

from ibsgl_jax.models import make_head_fn
from train.measure import splits
from train.method import answers
from train.method.step import normalize_images

# Of the search; a network outside of it is not one that a temperature mends.
LOWEST, HIGHEST = 0.05, 20.0


def measure_split(config, model, variables, source, *, validation) -> dict:
    """``scaled_values`` of a split, at the temperature that fits validation.

    Several labels per image have it too: their NLL is the mean of the binary ones.

    A table of validation is so judged on what it was fitted on: one number from all of
    its images, which is a little too good.

    Returns:
      dict of arrays [N]; also "label", of one label per image.
    """
    fitted = fit(*split_logits(config, model, variables, validation))
    logits, labels = split_logits(config, model, variables, source)
    known = {"label": labels} if labels.ndim == 1 else {}
    return {**known, **scaled_values(logits, labels, fitted)}


def split_logits(config, model, variables, source) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32 [N, C], labels int [N], or [N, C] of several) of a split."""
    values = splits.collect(_logits, config, model, source, variables)
    return values["logits"], values["labels"]


def _logits(variables, batch, *, model, image_stats):
    images = normalize_images(batch["image"], **image_stats)
    features = model.apply(variables, images, method="features")
    logits = make_head_fn(model, variables)(features)
    return {"logits": logits, "labels": answers.all_of(batch)}


def fit(logits, labels) -> float:
    """The temperature in [LOWEST, HIGHEST] of the smallest mean NLL.

    The NLL is convex in the inverse of the temperature, so the search finds it. Images
    whose logits are not finite are left out; NaN if there is no other.
    """
    from scipy.optimize import minimize_scalar

    known = np.isfinite(logits).all(axis=1)
    if not known.any():
        return float("nan")
    logits, labels = logits[known], labels[known]
    found = minimize_scalar(
        lambda inverse: nll(logits, labels, 1.0 / inverse).mean(),
        bounds=(1.0 / HIGHEST, 1.0 / LOWEST),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(1.0 / found.x)


def nll(logits, labels, temperature: float) -> np.ndarray:
    """Negative log-likelihood of the labels, float64 [N], in nats: ``metrics.nll``."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        scaled = np.asarray(logits, np.float64) / temperature
        return np.mean(np.logaddexp(0.0, scaled) - labels * scaled, axis=1)
    log_probs = _log_softmax(logits, temperature)
    return -np.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def scaled_values(logits, labels, temperature: float) -> dict:
    """What is left after dividing the logits by a temperature, per example.

    Returns:
      dict of float64 [N]: nll_scaled, the temperature itself and, of one label per
      image, confidence_scaled.
    """
    values = {
        "nll_scaled": nll(logits, labels, temperature),
        "temperature": np.full(len(logits), temperature),
    }
    if np.ndim(labels) == 1:
        log_probs = _log_softmax(logits, temperature)
        values["confidence_scaled"] = np.exp(log_probs.max(axis=1))
    return values


def _log_softmax(logits, temperature):
    from scipy.special import log_softmax

    return log_softmax(np.asarray(logits, np.float64) / temperature, axis=1)
