"""Coloured digits: the rows of shortcut_rows.py where the cue lies on the object.

    python -m train.sweep configs/sweeps/shortcut_coloured.py --num-perturbed 0 \
        --columns accuracy worst_class box_share

In training the colour is the class's own, where they are measured that of 9 - class. No
mask can tell the colour from the shape. The settings are those of the decoy digits.
"""

from configs.sweeps import shortcut_rows

SEEDS = (0, 1, 2)
CONTROL, CONTROLS = shortcut_rows.CONTROL, shortcut_rows.CONTROLS


def get_config():
    return shortcut_rows.get_config("coloured")
