"""A pretrained network on real objects, guided in every step of three epochs.

    python -m train.sweep configs/sweeps/objects_long.py --num-perturbed 0
    python -m train.sweep configs/sweeps/objects_long.py --split test --num-perturbed 0
    python -m train.sweep configs/sweeps/objects_long.py --split seen --num-perturbed 0

Three times as long as ``objects.py`` of this folder and at twice its learning rate, a
step on the elements above zero alone. "guided" is taught by the squared CAM,
"bottleneck_20" by the bottleneck, "oracle" by the object's true mask; "short" is the
control of ``objects.py``, for so long a training fits the cut-outs too well. The
settings were found with seed 10 in three tries (length and rate; mu 100 and 20). Rivals
with their own settings, for which none was searched: ICASC, and the energy loss, which
sees the masks.
"""

from configs import default, objects
from configs.baselines import energy, icasc
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def base():
    """The recipe of ``configs/objects.py``, but taught by the squared CAM."""
    config = objects.get_config()
    variants.quiet(config)
    config.guided.update(default.SQUARED_CAM)
    return config


def get_config():
    config = base()
    variants.add(config, "oracle", teacher="mask", teacher_power=1.0)
    variants.add(config, "short", base="control", num_epochs=1.0, learning_rate=2.5e-4)
    variants.add(config, "bottleneck_20", **default.BOTTLENECK)
    same = default.length_of(config.control)
    variants.put(config, "energy", energy.phase(**same))
    variants.put(config, "icasc", icasc.phase(**same))
    return config
