"""The quickstart with the teacher that gave the method its name: the bottleneck.

    python -m train --config=configs/bottleneck.py

20 steps of one sample on the finer maps (16 x 16) of the first block, where the map is
far better placed than on those of the last layer.
"""

from configs import quickstart

# What makes the bottleneck the teacher of a guided phase.
FIELDS = dict(teacher="bottleneck", teacher_method="bottleneck", teacher_power=1.0)


def get_config():
    config = quickstart.get_config()
    config.guided.update(FIELDS)
    return config
