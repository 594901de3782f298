"""A pretrained network on real objects under a binary cross-entropy head.

    python -m train.sweep configs/sweeps/objects_sigmoid.py --num-perturbed 0 \
        --columns top_label nll box_share overlap cosine mass_ratio p_on_object area

``objects_long.py`` with a sigmoid for each class (see ``heads_sigmoid.py``), the head
and then all layers learning twice as long before guidance. "control" is to be held
against that of ``objects_long.py``, of the same data and seeds.
"""

from configs.sweeps import objects_long

SEEDS = (0, 1, 2)
CONTROL = "control"


def get_config():
    config = objects_long.base()
    config.link = "sigmoid"
    for phase in (config.head, config.plain):
        phase.num_epochs *= 2
    config.guided.mu /= 8  # the task's loss is a mean over eight classes
    return config
