"""The second task with a pretrained EfficientNet-Lite0, whose features are 4 x 4.

    python -m train.sweep configs/sweeps/efficientnet.py

The bottleneck that teaches is at 8 x 8 (`configs/textures_efficientnet.py`).
"""

from configs import textures_efficientnet
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = textures_efficientnet.get_config()
    variants.quiet(config)
    return config
