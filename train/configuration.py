"""How two configurations differ, and the command that reproduces one."""

import importlib
import json
import shlex

from train.files import flatten

# Fields that may differ when a run is continued: they change no number.
FREE_FIELDS = (
    "data_dir",
    "num_threads",
    "num_workers",
    "progress",
    "tensorboard",
    "trackers",
)


def config_changes(before: dict, now: dict) -> list[str]:
    """The fields that make another run of it: "NAME (before -> now)"."""
    before, now = flatten(before), flatten(now)
    return [
        f"{name} ({before.get(name, 'absent')} -> {now.get(name, 'absent')})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in FREE_FIELDS
    ]


def without_new_phases(before: dict, now: dict) -> tuple[dict, dict]:
    """Both, less the phases that ``now`` lists after those of ``before``.

    A run may be given more phases: those that are finished do not depend on them.
    """
    old, new = (list(config.get("phases", ())) for config in (before, now))
    added = new[len(old) :]
    if new[: len(old)] != old:
        return before, now
    before, now = (
        {k: v for k, v in config.items() if k not in added} for config in (before, now)
    )
    return before, now | {"phases": old}


# Where the command that reproduces a run looks for the nearest configuration.
CONFIG_FILES = (
    "quickstart",
    "smoke",
    "poster",
    "baselines/all",
    "baselines/saliency_guided",
    "baselines/icasc",
)


def reproducing_command(config, workdir) -> str:
    """The command that trains this configuration, from the nearest file in configs/."""
    wanted = flatten(json.loads(config.to_json()))
    nearest = None
    for name in CONFIG_FILES:
        try:
            module = importlib.import_module("configs." + name.replace("/", "."))
        except ModuleNotFoundError:
            continue
        known = flatten(json.loads(module.get_config().to_json()))
        changed = {
            field: value
            for field, value in wanted.items()
            if known.get(field, ...) != value and field not in FREE_FIELDS
        }
        unknown = [field for field in changed if field not in known]
        cost = len(changed) + 100 * len(unknown)
        if nearest is None or cost < nearest[0]:
            nearest = cost, name, changed
    if nearest is None:
        return f"python -m train --workdir={workdir}"
    _, name, changed = nearest
    options = "".join(
        f" \\\n    --config.{field}={shlex.quote(_literal(value))}"
        for field, value in sorted(changed.items())
    )
    return (
        f"python -m train --config=configs/{name}.py --workdir={workdir}{options}\n"
        f"python -m train.evaluate --workdir {workdir}"
    )


def _literal(value):
    if isinstance(value, list):
        return "(" + "".join(json.dumps(item) + "," for item in value) + ")"
    return str(value)
