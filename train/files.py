"""Text and JSON on disk, whole or not at all; the user's cache; dicts made flat."""

import json
import math
import os
from pathlib import Path
from typing import Any

from flax import traverse_util


def cache_folder(name: str) -> Path:
    """A folder of the user's cache; it need not be there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ibsgl_jax" / name


def write_text(path: Path, text: str):
    """Write a whole file or nothing of it, as UTF-8 whatever the system's encoding."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, tree: Any, *, indent: int | None = 2, sort_keys=False):
    """Write a tree of dicts and lists as JSON; NaN and infinity become null."""
    text = json.dumps(
        without_nan(tree), indent=indent, sort_keys=sort_keys, allow_nan=False
    )
    write_text(path, text + "\n")


def without_nan(tree: Any):
    """NaN and infinity become None, which JSON can say."""
    if isinstance(tree, dict):
        return {key: without_nan(branch) for key, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(branch) for branch in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def flatten(tree: dict) -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty dicts are left out."""
    return traverse_util.flatten_dict(tree, sep=".")
