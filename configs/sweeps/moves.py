"""Which elements of the features guidance moves: all, or those above zero; digits.

python -m train.sweep configs/sweeps/moves.py
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def add_moves(config) -> None:
    """Two teachers, each with both moves."""
    for name, fields in (
        ("bottleneck_20", {}),
        ("hirescam_squared", dict(teacher="hirescam", teacher_power=2.0)),
    ):
        variants.add(config, name, **fields)
        variants.add(config, f"{name}_active", base=name, guidance__move="active")


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control")
    add_moves(config)
    return config
