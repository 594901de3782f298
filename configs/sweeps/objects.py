"""Which map should teach a pretrained network on real objects: five seeds.

    python -m train.sweep configs/sweeps/objects.py

All teachers are at the layer of twice the last one's resolution, in every fourth step,
with one mu. "hirescam_squared" is the default; "oracle" is the object's true mask.
"""

import dataclasses

from configs import default, objects
from configs.sweeps import variants
from ibsgl_jax.bottleneck import FAST

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = objects.get_config()
    variants.quiet(config)
    config.phases = ("head", "plain", "control")
    variants.add(config, "hirescam_squared")
    variants.add(config, "bottleneck_20", **default.BOTTLENECK)
    variants.add(config, "oracle", teacher="mask", teacher_power=1.0)
    variants.add(config, "layer_cam_squared", teacher="layer_cam")
    variants.add(config, "fast_squared", teacher="bottleneck")
    config.fast_squared.bottleneck.update(dataclasses.asdict(FAST))
    variants.add_rivals(config)
    return config
