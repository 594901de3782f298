"""The second task with a pretrained EfficientNet-Lite0, whose features are 4 x 4.

    python -m train.sweep configs/sweeps/efficientnet.py

"blur_1" is IBA's own blur, with which the teacher is worse than what it teaches.
"""

from configs import textures_efficientnet
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = textures_efficientnet.get_config()
    variants.quiet(config)
    variants.add(config, "blur_1", bottleneck__blur_sigma=1.0)
    return config
