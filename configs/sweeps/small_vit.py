"""A small vision transformer, guided by several teachers: digits, five seeds.

    python -m train.sweep configs/sweeps/small_vit.py

All teachers are at the tokens that the last attention reads; "oracle" is the mask.
"""

from configs import small_vit
from configs.sweeps import teachers, variants

SEEDS = teachers.SEEDS
CONTROL = teachers.CONTROL


def get_config():
    config = small_vit.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control", "guided")
    for name, teacher, power in (
        ("hirescam_squared", "hirescam", 2.0),
        ("layer_cam_squared", "layer_cam", 2.0),
        ("oracle", "mask", 1.0),
    ):
        variants.add(config, name, teacher=teacher, teacher_power=power)
    return config
