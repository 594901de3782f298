"""The same rows on a second task; the constants were chosen on both.

python -m train.sweep configs/sweeps/textures.py
"""

from configs import textures
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = textures.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control")
    variants.add_literal(config)
    variants.add_rivals(config)
    config.phases = (*config.phases, "guided")
    variants.add(config, "oracle", teacher="mask")
    variants.add(config, "last", **variants.LAST)
    return config
