"""A pretrained network on real objects under a binary cross-entropy head.

    python -m train.sweep configs/sweeps/objects_sigmoid.py --num-perturbed 0 \
        --columns top_label nll box_share overlap cosine mass_ratio p_on_object area

``objects_long.py`` with a sigmoid for each class (see ``heads_sigmoid.py``), the head
and then all layers learning twice as long before guidance. "control" is to be held
against that of ``objects_long.py``, of the same data and seeds.
"""

from configs import objects
from configs.sweeps import variants

SEEDS = (0, 1, 2)
CONTROL = "control"


def get_config():
    config = objects.get_config()
    variants.quiet(config)
    config.link = "sigmoid"
    for phase in (config.head, config.plain):
        phase.num_epochs *= 2
    for phase in (config.control, config.guided):
        phase.num_epochs, phase.learning_rate = 3.0, 5e-4
    # The task's loss is a mean over eight classes.
    config.guided.mu, config.guided.every, config.guided.release = 20.0 / 8, 1, 0.0
    config.guided.guidance.move = "active"
    return config
