"""MaskTune (Asgari et al. 2022) from the quickstart's plain phase, one epoch long.

python -m train --config=configs/baselines/masktune.py
"""

from configs import default, quickstart


def phase(init, **changes):
    """A phase that goes on from ``init``, on images without what that one sees."""
    return default.plain_phase(method="masktune", init=init, teacher=init, **changes)


def get_config():
    config = quickstart.get_config()
    config.control.num_epochs = 1.0
    same = {f: config.control[f] for f in ("num_epochs", "learning_rate")}
    config.masktune = phase("plain", **same)
    config.phases = ("plain", "control", "masktune")
    config.picture_phases = ("plain", "masktune")
    return config
