"""The literal recipe: Algorithm 1 of the BMVC 2022 poster, with IBA's own options.

    python -m train --config=configs/poster.py

Line by line: L^c and L^p elementwise (3); L^ib by IBA as published, 10 steps and 10
samples (4); CE + beta SS where the prediction is right, CE elsewhere (5 to 9), SS as
printed with the soft mask of its ancestor; A' one plain gradient step on the batch mean
(10); task + mu KL(A || A') (11). What the paper leaves open: beta and the kinds of CE
and KL are as in the quickstart, mu is 10, in every step. The plain step moves A by some
3e-5 of its norm.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    guided = config.guided
    guided.mu = 10.0
    guided.every = 1
    guided.teacher, guided.teacher_power = "bottleneck", 1.0
    guided.teacher_layer = ""
    guided.bottleneck.num_steps = 10
    guided.bottleneck.num_samples = 10
    guided.bottleneck.blur_sigma = 1.0
    guided.guidance.suppression = "masked_overlap"
    guided.guidance.suppression_weight = 1.0
    guided.guidance.step = "plain"
    guided.guidance.step_size = 1.0
    guided.only_right = False
    guided.release = 0.0
    return config
