"""Information Bottleneck Saliency Guided Localization for JAX models.

Modules: ``saliency`` and ``bottleneck`` make maps on features, ``losses`` compares
them, ``guidance`` turns them into features to train towards, ``feature_stats`` supplies
the noise, ``metrics`` judges the result, ``attribution`` explains whole images.
"""

from ibsgl_jax import (
    bottleneck as bottleneck,
)
from ibsgl_jax import (
    feature_stats as feature_stats,
)
from ibsgl_jax import (
    guidance as guidance,
)
from ibsgl_jax import (
    losses as losses,
)
from ibsgl_jax import (
    models as models,
)
from ibsgl_jax import (
    saliency as saliency,
)

__version__ = "0.1.0"
