"""What is wrong with a run, all of it, before the run writes anything."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import default
from train.data import dataset
from train.data.faults import listed
from train.errors import ConfigError, DatasetError, Faults
from train.files import flatten
from train.method import check
from train.run import start, trackers
from train.run.plan import Plan, plan_phases
from train.run.workdir import check_workdir


def check_fields(config):
    """That a configuration has the fields that every one has: else nothing can be told.

    Raises:
      ConfigError: those that it lacks.
    """
    whole = default.get_config()
    phases = config.get("phases", ())
    wanted = [("", config, {k: v for k, v in whole.items() if k not in whole.phases})]
    for name in phases:
        section = config.get(name)
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"phase {name!r} has no section of its own in the config")
        is_guided = section.get("method") == "guided"
        known = default.guided_phase() if is_guided else default.plain_phase()
        wanted.append((f"{name}.", section, known))
    lacking = [
        prefix + field
        for prefix, section, known in wanted
        for field in flatten(json.loads(ConfigDict(known).to_json()))
        if _lacks(section, field.split("."))
    ]
    if lacking:
        raise ConfigError(
            f"the config lacks fields ({len(lacking)}): {listed(lacking)}; begin with "
            "default.get_config() of configs/default.py"
        )


def _lacks(section, names) -> bool:
    for name in names:
        if not isinstance(section, ConfigDict) or name not in section:
            return True
        section = section[name]
    return False


def check_run(
    config, workdir: Path, *, examples=None
) -> tuple[dataset.Data, list[Plan]]:
    """The data of a run and the plan of each of its phases.

    What is wrong with the configuration, the model and its weights, the trackers, the
    workdir, the data and the fit of one to another is told together. While anything
    is, nothing is written, and no more pictures are decoded than that takes seconds.

    Args:
      config: without open fields, see ``choose.complete``.
      workdir: folder of the run.
      examples: given from Python, in the place of what the config names.

    Raises:
      ConfigError, DatasetError: the one fault that there is; FaultsError: all of them.
    """
    faults = Faults()
    with faults.gather():
        check.find_faults(config, faults)
    with faults.gather():
        start.find_faults(config, faults)
    with faults.gather():
        trackers.check(config.get("trackers", ()))
    with faults.gather():
        check_workdir(workdir, config)
    data, plans = None, []
    with faults.gather():
        data = _load(config, workdir, examples, faults)
    if data is not None:
        plans = plan_phases(config, data, faults)
    faults.stop()
    return data, plans


def _load(config, workdir, examples, faults):
    config = config.copy_and_resolve_references()
    for field, sound in (("image_size", 224), ("fit", "crop"), ("link", "softmax")):
        if faults.has(field):  # which is no reason to say nothing of the pictures
            config[field] = sound
    look_only = bool(faults)
    data = dataset.load_data(config, workdir, examples=examples, look_only=look_only)
    changes = dataset.changed_pictures(data, workdir) if data else ""
    if changes:
        raise DatasetError(f"{changes}; choose another --workdir")
    return data
