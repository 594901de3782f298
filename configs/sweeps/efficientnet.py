"""The second task with a pretrained EfficientNet-Lite0, whose features are 4 x 4.

    python -m train.sweep configs/sweeps/efficientnet.py

The teachers are at "block10", 8 x 8: the bottleneck, and the map that is the default.
"""

from configs import bottleneck, textures_efficientnet
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = textures_efficientnet.get_config()
    variants.quiet(config)
    variants.add(config, "hirescam_squared")
    config.guided.update(bottleneck.FIELDS)
    return config
