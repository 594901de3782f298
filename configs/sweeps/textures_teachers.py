"""Which map should teach, on a second task: materials, five seeds.

python -m train.sweep configs/sweeps/textures_teachers.py
"""

from configs import textures
from configs.sweeps import teachers, variants

SEEDS = teachers.SEEDS
CONTROL = teachers.CONTROL


def get_config():
    config = textures.get_config()
    variants.quiet(config)
    teachers.add_teachers(config)
    return config
