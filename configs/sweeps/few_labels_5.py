"""Digits from five examples a class, as ``few_labels.py`` has them from twenty.

    python -m train.sweep configs/sweeps/few_labels_5.py --num-perturbed 0 \
        --columns accuracy nll box_share
"""

from configs.sweeps import few_labels

SEEDS, CONTROL = few_labels.SEEDS, few_labels.CONTROL


def get_config():
    return few_labels.get_config(5)
