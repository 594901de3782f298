"""Parts of an evaluation that are done, kept on disk until all of it is."""

import json
import shutil
import urllib.parse
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np

from train.files import write_json


class Parts:
    """Finished parts, by name; none are kept without a folder.

    Args:
      folder: where they are kept, or None.
      about: tree of JSON that says what they are parts of; parts of something else
        that lie in the folder are thrown away.

    Attributes:
      plan: what an earlier, unfinished evaluation of the same had chosen, or None.
    """

    def __init__(self, folder: Path | None = None, about: dict | None = None):
        # Several processes would have to agree on what is there.
        self._folder = folder if jax.process_count() == 1 else None
        self._about = json.loads(json.dumps(about))
        self.plan = None
        if self._folder is None:
            return
        try:
            kept = json.loads((self._folder / "about.json").read_text())
        except (OSError, ValueError):
            kept = {}
        if kept.get("about") == self._about:
            self.plan = kept.get("plan")
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, plan: dict):
        """Record what has been chosen; parts are kept from here on."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(
                self._folder / "about.json", {"about": self._about, "plan": plan}
            )

    def get(self, name: str, make) -> dict:
        """The part of this name, a dict of arrays; ``make()`` makes it if absent."""
        if self._folder is None:
            return make()
        path = self._folder / (urllib.parse.quote(name, safe="") + ".npz")
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            values = make()
        write_arrays(path, values)
        return values

    def has(self, name: str) -> bool:
        """Whether the part lies on disk."""
        if self._folder is None:
            return False
        return (self._folder / (urllib.parse.quote(name, safe="") + ".npz")).exists()

    def clear(self):
        """Forget them: the evaluation is written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def write_arrays(path: Path, values: dict):
    """An .npz of arrays, written whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "wb") as file:
        np.savez_compressed(file, **values)
    scratch.replace(path)


def checksum(variables) -> int:
    """Of all the numbers of a network: other weights have another one."""
    total = 0
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total
