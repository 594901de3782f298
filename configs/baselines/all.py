"""Guided training beside its rivals: five phases, four of them from the same weights.

python -m train --config=configs/baselines/all.py
"""

from configs import default, quickstart
from configs.baselines import icasc, saliency_guided


def get_config():
    config = quickstart.get_config()
    same = default.length_of(config.control)
    config.saliency_guided = saliency_guided.phase(**same)
    config.icasc = icasc.phase(**same)
    config.phases = ("plain", "control", "guided", "saliency_guided", "icasc")
    return config
