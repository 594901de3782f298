"""What is wrong with a run, all of it, before the run writes anything."""

from pathlib import Path

from train.data import dataset
from train.errors import DatasetError, Faults
from train.method import check
from train.run import start, trackers
from train.run.plan import Plan, plan_phases
from train.run.workdir import check_workdir


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
    for field, sound in (("image_size", 224), ("fit", "crop")):
        if faults.has(field):  # which is no reason to say nothing of the pictures
            config[field] = sound
    look_only = bool(faults)
    data = dataset.load_data(config, workdir, examples=examples, look_only=look_only)
    changes = dataset.changed_pictures(data, workdir) if data else ""
    if changes:
        raise DatasetError(f"{changes}; choose another --workdir")
    return data
