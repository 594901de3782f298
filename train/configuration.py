"""How two configurations differ, and the command that reproduces one."""

import importlib
import json
import pathlib
import pkgutil
import pprint
import shlex
import sys

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


def reproducing_command(config, workdir) -> str:
    """The commands that train and evaluate this configuration, in a shell.

    From the nearest file of configs/ that it can be made of by fields on the command
    line, else from its JSON by way of a file.
    """
    wanted = flatten(json.loads(config.to_json()))
    known = [(name, _overrides(known, wanted)) for name, known in _config_files()]
    possible = [(*over, name) for name, over in known if over is not None]
    folder = shlex.quote(str(workdir))
    evaluate = f"python -m train.evaluate --workdir={folder}"
    if not possible:
        return (
            "# No file of configs/ has its fields; the first line writes one.\n"
            f"python -m train.configuration {folder}/config.json > config.py\n"
            f"python -m train --config=config.py --workdir={folder}\n{evaluate}"
        )
    _, overrides, name = min(possible, key=lambda e: (e[0], len(e[1]), e[2]))
    options = "".join(
        f" \\\n    {shlex.quote(f'--config.{field}={_literal(value)}')}"
        for field, value in sorted(overrides.items())
    )
    return f"python -m train --config={name} --workdir={folder}{options}\n{evaluate}"


def _config_files():
    """(path, flat fields) of the files of configs/, those of sweeps left out."""
    try:
        package = importlib.import_module("configs")
    except ModuleNotFoundError:
        return
    for module in pkgutil.walk_packages(package.__path__, "configs."):
        if module.ispkg or module.name.startswith("configs.sweeps"):
            continue
        module = importlib.import_module(module.name)
        path = module.__name__.replace(".", "/") + ".py"
        yield path, flatten(json.loads(module.get_config().to_json()))


def _overrides(known: dict, wanted: dict) -> tuple[int, dict] | None:
    """(how many fields the file has beyond those, the fields to give); None: cannot be.

    A field that the file lacks, or that is of another type there, cannot be given. One
    that the run lacks came later, or is of a phase that it does not have.
    """
    changed = {field: v for field, v in wanted.items() if known.get(field, ...) != v}
    for field, value in changed.items():
        if field not in known or type(known[field]) is not type(value):
            return None
    return len(known.keys() - wanted.keys()), changed


def _literal(value) -> str:
    """A value as the flags of ml_collections read it."""
    return repr(tuples(value)) if isinstance(value, list) else str(value)


def tuples(tree):
    """Lists become the tuples that they were before JSON; models must be hashable."""
    if isinstance(tree, dict):
        return {key: tuples(branch) for key, branch in tree.items()}
    return tuple(map(tuples, tree)) if isinstance(tree, list) else tree


def as_module(config: dict) -> str:
    """A file for --config that has exactly these fields."""
    return (
        '"""The configuration of a run, as it was written into its folder."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        f"    return ConfigDict({pprint.pformat(tuples(config), width=84)})\n"
    )


if __name__ == "__main__":
    print(as_module(json.loads(pathlib.Path(sys.argv[1]).read_text())), end="")
