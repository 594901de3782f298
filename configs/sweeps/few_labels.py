"""Digits from twenty examples a class: does guidance help where little is known?

    python -m train.sweep configs/sweeps/few_labels.py --num-perturbed 0 \
        --columns accuracy nll box_share

The quickstart's recipe with fewer images, on average 5 (``few_labels_5.py``), 20 or 100
(``few_labels_100.py``) of a class, and as many steps for each. They are measured on
digits and parts of the photographs that no training image has. "guided" is taught by
the bottleneck, "squared_cam" by the squared HiResCAM, "oracle" by the true mask.
"""

from configs import default, quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2)
CONTROL = "control"
BATCH_SIZE = 40  # no more than the fewest images
STEPS = dict(plain=400, control=200, guided=200)


def get_config(per_class: int = 20):
    config = quickstart.get_config()
    variants.quiet(config)
    num_train = config.dataset_options.num_train = 10 * per_class
    config.batch_size = BATCH_SIZE
    for name, steps in STEPS.items():
        config[name].num_epochs = steps / (num_train // BATCH_SIZE)
    config.save_epochs = config.plain.num_epochs
    variants.add(config, "squared_cam", **default.SQUARED_CAM)
    variants.add(config, "oracle", teacher="mask", teacher_power=1.0)
    return config
