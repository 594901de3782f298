"""Information Bottleneck Saliency Guided Localization for JAX models."""

__version__ = "0.1.0"
