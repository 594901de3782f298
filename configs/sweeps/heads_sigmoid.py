"""A binary cross-entropy head: does it part the maps of two classes? Digits.

    python -m train.sweep configs/sweeps/heads_sigmoid.py --num-perturbed 0 \
        --columns top_label nll box_share overlap cosine mass_ratio p_on_object

Each class is a question of its own under a sigmoid, so that none wins by another's
loss. Such a head learns slowly at first, so "plain" is twice as long as the
quickstart's; ``heads_softmax.py`` is the same under a softmax. The task's loss
is a mean over ten classes, its gradients a tenth of the softmax's, and so is mu.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config(link: str = "sigmoid"):
    config = quickstart.get_config()
    variants.quiet(config)
    config.link = link
    config.plain.num_epochs *= 2
    config.phases = ("plain", "control")
    mu = config.guided.mu / (10 if link == "sigmoid" else 1)
    teacher = dict(teacher="hirescam", teacher_power=2.0, mu=mu)
    variants.add(config, "excess", **teacher)
    variants.add(config, "none", **teacher, guidance__suppression_weight=0.0)
    return config
