"""Phases that change a few fields of another; what the sweeps of this folder share."""

import copy

from configs import default
from configs.baselines import icasc, saliency_guided

# The bottleneck at the last layer in place of an inner one: for a quarter of a step.
LAST = default.BOTTLENECK | dict(teacher_layer="")


def add(config, name: str, base: str = "guided", **fields) -> None:
    """Add a phase to the config and to its list of phases.

    Args:
      config: changed in place.
      name: of the new phase.
      base: phase that it copies.
      **fields: what differs; ``bottleneck__beta`` is the field beta of bottleneck.
    """
    phase = copy.deepcopy(config[base])
    for path, value in fields.items():
        section, _, field = path.rpartition("__")
        part = phase[section] if section else phase
        if field not in part:
            raise KeyError(f"{base} has no field {path.replace('__', '.')}")
        part[field] = value
    put(config, name, phase)


def put(config, name: str, phase) -> None:
    """Add a phase as it is to the config and to its list of phases."""
    config[name] = phase
    config.phases = (*config.phases, name)


def add_literal(config) -> None:
    """Algorithm 1 as printed with IBA's own options, as in ``configs/poster.py``."""
    add(
        config,
        "literal",
        mu=10.0,
        every=1,
        **LAST,
        bottleneck__num_steps=10,
        bottleneck__num_samples=10,
        bottleneck__blur_sigma=1.0,
        guidance__suppression="masked_overlap",
        guidance__step="plain",
        guidance__step_size=1.0,
        only_right=False,
        release=0.0,
    )


def add_rivals(config) -> None:
    """Saliency Guided Training and ICASC, for as many steps as "control"."""
    same = default.length_of(config.control)
    put(config, "saliency_guided", saliency_guided.phase(**same))
    put(config, "icasc", icasc.phase(**same))


def quiet(config) -> None:
    """No pictures and no event files: a sweep is read as a table."""
    config.picture_phases = ()
    config.tensorboard = False
