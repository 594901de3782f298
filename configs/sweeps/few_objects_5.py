"""Photographed objects from five examples a class, as ``few_objects.py`` from twenty.

    python -m train.sweep configs/sweeps/few_objects_5.py --num-perturbed 0 \
        --columns accuracy nll nll_scaled box_share
"""

from configs.sweeps import few_objects

SEEDS, CONTROL = few_objects.SEEDS, few_objects.CONTROL


def get_config():
    return few_objects.get_config(5)
