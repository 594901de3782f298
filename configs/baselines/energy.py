"""The energy loss (Rao et al. 2023) from the quickstart's plain phase.

    python -m train --config=configs/baselines/energy.py

It needs the objects' masks; `mask_share` keeps them on that share of the images.
"""

from configs import default, quickstart


def phase(**changes):
    """A phase of the energy loss."""
    return default.plain_phase(method="energy", weight=1.0, mask_share=1.0, **changes)


def get_config():
    config = quickstart.get_config()
    same = default.length_of(config.control)
    config.energy = phase(**same)
    config.phases = ("plain", "control", "energy")
    config.picture_phases = ("plain", "energy")
    return config
