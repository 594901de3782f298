"""Photographed objects from twenty examples a class, a pretrained network.

    python -m train.sweep configs/sweeps/few_objects.py --num-perturbed 0 \
        --columns accuracy nll nll_scaled box_share

What ``few_labels.py`` asks where few examples go further: the head on ImageNet's
features for 100 steps of 16, all layers for 50, then 100 of each row, which guides as
``objects_long.py`` does, in each step and on the active elements (taught by the
squared CAM, "guided", the true masks, "oracle", or the bottleneck). Twenty images of a
class on average, or five (``few_objects_5.py``); the 256 that are measured show
cut-outs and backgrounds that no training image has.
"""

from configs import default, objects
from configs.sweeps import variants

SEEDS = (0, 1, 2)
CONTROL = "control"
STEPS = dict(head=100, plain=50, control=100, guided=100)


def get_config(per_class: int = 20):
    config = objects.get_config()
    variants.quiet(config)
    config.guided.update(default.SQUARED_CAM)
    num_train = config.dataset_options.num_train = 8 * per_class
    for name, steps in STEPS.items():
        config[name].num_epochs = steps / (num_train // config.batch_size)
    config.save_epochs = config.control.num_epochs
    variants.add(config, "oracle", teacher="mask", teacher_power=1.0)
    variants.add(config, "bottleneck_20", **default.BOTTLENECK)
    return config
