"""The rows of suppressions.py with a binary cross-entropy head: digits.

    python -m train.sweep configs/sweeps/suppressions_sigmoid.py --num-perturbed 0 \
        --columns top_label nll box_share overlap cosine mass_ratio p_on_object

Each class is a question of its own under a sigmoid, so that no class wins by another's
loss; "control" is to be held against that of suppressions.py. The task's loss is a mean
over ten classes, its gradients a tenth of the softmax's, and so is mu.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.link = "sigmoid"
    config.phases = ("plain", "control")
    teacher = dict(teacher="hirescam", teacher_power=2.0, mu=2.0)
    variants.add(config, "excess", **teacher)
    variants.add(config, "none", **teacher, guidance__suppression_weight=0.0)
    alone = dict(guidance__suppression_weight=0.0, guidance__contrast=1.0)
    variants.add(config, "contrast_1", **teacher, **alone)
    return config
