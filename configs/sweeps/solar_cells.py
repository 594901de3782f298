"""What guidance changes where nobody knows the answer: real solar cells, three seeds.

    python -m train.sweep configs/sweeps/solar_cells.py --num-perturbed 128 \
        --columns accuracy balanced_accuracy nll matched_drop matched_increase

The folder "cells" holds all cells of elpv-dataset that the experts were sure of, as
the script of docs/photos.md lays them out with ``if label:`` for its condition. The
settings are those of ``photos.py`` and, for "active", of ``objects.py``; none was
searched for.
"""

from configs import default, photos
from configs.sweeps import objects, variants

SEEDS = (0, 1, 2)
CONTROL = "control"


def get_config():
    config = photos.get_config()
    variants.quiet(config)
    config.data = "cells"
    config.image_size, config.batch_size = 160, 16
    config.phases = ("head", "plain", "control", "guided")
    for name in config.phases:
        config[name].num_epochs = 2.0 if name in ("head", "plain") else 1.0
    config.head.learning_rate, config.plain.learning_rate = 3e-3, 5e-4
    for phase in (config.control, config.guided):
        phase.init, phase.learning_rate = "plain", 2.5e-4
    variants.add(config, "bottleneck_20", **default.BOTTLENECK)
    for base in ("guided", "bottleneck_20"):
        variants.add(config, f"{base}_active", base=base, **objects.ACTIVE)
    return config
