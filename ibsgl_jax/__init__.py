"""Information Bottleneck Saliency Guided Localization for JAX models.

Modules: ``saliency`` and ``bottleneck`` make maps on features, ``losses`` compares
them, ``guidance`` turns them into features to train towards, ``feature_stats`` supplies
the noise's moments. ``attribution`` explains whole images by any method, ``tapping``
splits any model at a layer, ``tokens`` reads a transformer's as a map, ``targets``
explains any number of an output, ``models`` and ``pretrained`` have some of their own;
``metrics`` and ``perturbation`` judge explanations.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibsgl_jax import (
        attribution,
        bottleneck,
        convolutions,
        errors,
        export,
        feature_stats,
        guidance,
        images,
        losses,
        metrics,
        models,
        onnx_files,
        perturbation,
        pretrained,
        saliency,
        tapping,
        targets,
        tokens,
        torch_files,
        trained,
    )

__version__ = "0.1.0"

__all__ = [
    "attribution",
    "bottleneck",
    "convolutions",
    "errors",
    "export",
    "feature_stats",
    "guidance",
    "images",
    "losses",
    "metrics",
    "models",
    "onnx_files",
    "perturbation",
    "pretrained",
    "saliency",
    "tapping",
    "targets",
    "tokens",
    "torch_files",
    "trained",
]


def __getattr__(name: str):
    """A module is imported when it is first used: a command answers before jax does."""
    if name in __all__:
        return importlib.import_module(f"ibsgl_jax.{name}")
    raise AttributeError(f"module 'ibsgl_jax' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
