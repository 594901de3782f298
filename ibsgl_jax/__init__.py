"""Information Bottleneck Saliency Guided Localization for JAX models.

Modules: ``saliency`` and ``bottleneck`` make maps on features, ``losses`` compares
them, ``guidance`` turns them into features to train towards, ``feature_stats`` supplies
the noise's moments, ``models`` has networks that split at a layer.
"""

from ibsgl_jax import bottleneck, feature_stats, guidance, losses, models, saliency

__version__ = "0.1.0"

__all__ = [
    "bottleneck",
    "feature_stats",
    "guidance",
    "losses",
    "models",
    "saliency",
]
