"""The same rows on a second task, whose constants were not chosen there.

python -m train.sweep configs/sweeps/textures.py
"""

from configs import textures
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"
FINAL = (
    "control",
    "guided",
    "half_blur",
    "literal",
    "oracle",
    "saliency_guided",
    "icasc",
)


def get_config():
    config = textures.get_config()
    variants.quiet(config)
    config.guided.bottleneck.blur_sigma = 1.0  # IBA's, as in recipes.py
    variants.add_literal(config)
    variants.add(config, "oracle", teacher="mask")
    variants.add(config, "half_blur", bottleneck__blur_sigma=0.5)
    variants.add_rivals(config)
    return config
