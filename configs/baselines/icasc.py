"""ICASC's attention separation (Wang et al. 2019) from the quickstart's plain phase.

    python -m train --config=configs/baselines/icasc.py

At the last layer; the consistency between layers is left out.
"""

from configs import default, quickstart


def phase(**changes):
    """A phase of attention separation."""
    return default.plain_phase(
        method="icasc", weight=1.0, omega=100.0, threshold=0.55, **changes
    )


def get_config():
    config = quickstart.get_config()
    same = default.length_of(config.control)
    config.icasc = phase(**same)
    config.phases = ("plain", "control", "icasc")
    config.picture_phases = ("plain", "icasc")
    return config
