"""Rand-R4 (Ghitu et al. 2025) from the quickstart's plain phase.

    python -m train --config=configs/baselines/rand_r4.py

It needs the objects' masks; `mask_share` keeps them on that share of the images.
"""

from configs import default, quickstart


def phase(**changes):
    """A phase of the sampled largest gradient outside of the mask."""
    return default.plain_phase(
        method="rand_r4",
        weight=0.1,
        epsilon=0.4,
        num_samples=3,
        mask_share=1.0,
        **changes,
    )


def get_config():
    config = quickstart.get_config()
    same = default.length_of(config.control)
    config.rand_r4 = phase(**same)
    config.phases = ("plain", "control", "rand_r4")
    config.picture_phases = ("plain", "rand_r4")
    return config
