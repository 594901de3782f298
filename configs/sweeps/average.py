"""A teacher that is the moving average of the network it teaches.

    python -m train.sweep configs/sweeps/average.py

A sweep of its own, since `ema_decay` holds for all phases: every one of them is
measured with its averaged parameters.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.ema_decay = 0.98
    config.phases = ("plain", "control")
    variants.add(config, "average_teacher", **variants.LAST | dict(teacher="average"))
    return config
