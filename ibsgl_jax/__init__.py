"""Information Bottleneck Saliency Guided Localization for JAX models.

Modules: ``saliency`` and ``bottleneck`` make maps on features, ``losses`` compares
them, ``guidance`` turns them into features to train towards, ``feature_stats`` supplies
the noise's moments. ``attribution`` explains whole images by any method, ``tapping``
splits any model at a layer, ``models`` and ``pretrained`` have some of their own;
``metrics`` and ``perturbation`` judge explanations.
"""

from ibsgl_jax import (
    attribution,
    bottleneck,
    feature_stats,
    guidance,
    losses,
    metrics,
    models,
    perturbation,
    pretrained,
    saliency,
    tapping,
)

__version__ = "0.1.0"

__all__ = [
    "attribution",
    "bottleneck",
    "feature_stats",
    "guidance",
    "losses",
    "metrics",
    "models",
    "perturbation",
    "pretrained",
    "saliency",
    "tapping",
]
