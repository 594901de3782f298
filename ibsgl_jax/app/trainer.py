"""``ibsgl train`` and its kin: the commands of the trainer, from any folder.

The trainer is no part of the library, and its modules are called ``train`` and
``configs``, names that no package may claim for itself. So an installed copy lies in a
folder of its own inside this package, which is put on the path for these commands
alone; in a checkout it is the checkout's. The library imports nothing of it.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from ibsgl_jax.errors import UserError

COMMANDS = {
    "train": "train",
    "evaluate": "train.evaluate",
    "scores": "train.scores",
    "sweep": "train.sweep",
    "teachers": "train.teachers",
    "prepare": "train.prepare",
    "compile": "train.compile",
}


def find_trainer() -> Path:
    """The folder that holds ``train`` and ``configs``.

    Raises:
      UserError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "trainer", package.parent):
        if (folder / "train" / "__main__.py").is_file():
            return folder
    raise UserError(f"the trainer is not beside {package}: install ibsgl_jax again")


def add_to_path() -> Path:
    """Make ``import train`` and ``import configs`` possible, in a notebook say.

    Returns:
      The folder that holds them.

    Raises:
      UserError: there is none.
    """
    folder = find_trainer()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


def run(command: str, arguments: list[str]) -> int:
    """Run a command as ``python -m train...`` would in a checkout; its exit status.

    Raises:
      UserError: what it needs is not installed.
    """
    folder = str(find_trainer())
    missing = [n for n in ("absl", "ml_collections") if not importlib.util.find_spec(n)]
    if missing:
        raise UserError(
            f"no package {missing[0]}: pip install 'ibsgl_jax[train]', which `ibsgl "
            f"{command}` needs"
        )
    add_to_path()
    # The processes of a sweep, and of reading ahead, are found the same way.
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.argv = [f"ibsgl {command}", *arguments]
    try:
        runpy.run_module(COMMANDS[command], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
