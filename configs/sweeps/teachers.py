"""Which map should teach, and at which price: digits, five seeds.

    python -m train.sweep configs/sweeps/teachers.py

All teachers are at the same inner layer but "last", at every fourth step, with one mu.
"bottleneck_20" is the quickstart's; "squared": the map over its maximum, squared.
"""

import dataclasses

from configs import quickstart
from configs.sweeps import variants
from ibsgl_jax.bottleneck import FAST

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def add_teachers(config) -> None:
    """The rows; each guided phase differs in its teacher alone."""
    config.phases = ("plain", "control")

    def add(name, teacher, power=1.0, layer="2x"):
        variants.add(
            config,
            name,
            teacher=teacher,
            teacher_power=power,
            teacher_layer=layer,
        )

    add("bottleneck_20", "bottleneck")
    add("fast_squared", "bottleneck", 2.0)
    config.fast_squared.bottleneck.update(dataclasses.asdict(FAST))
    add("hirescam_squared", "hirescam", 2.0)
    add("layer_cam_squared", "layer_cam", 2.0)
    add("last", "bottleneck", layer="")
    add("oracle", "mask")


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    add_teachers(config)
    return config
