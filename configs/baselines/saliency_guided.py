"""Saliency Guided Training (Ismail et al. 2021) from the plain phase of the quickstart.

    python -m train --config=configs/baselines/saliency_guided.py

Half of the pixels are masked, lambda is 1: the values of its authors' code for images.
"""

from configs import default, quickstart


def phase(**changes):
    """A phase of Saliency Guided Training."""
    return default.plain_phase(
        method="saliency_guided", mask_fraction=0.5, weight=1.0, **changes
    )


def get_config():
    config = quickstart.get_config()
    same = default.length_of(config.control)
    config.saliency_guided = phase(**same)
    config.phases = ("plain", "control", "saliency_guided")
    config.picture_phases = ("plain", "saliency_guided")
    return config
