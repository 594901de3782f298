"""One trained model in one file: weights, what it is, and how its images were made.

``python -m train`` leaves one such file per phase; ``ibsgl explain --checkpoint`` reads
it. An ``.npz`` of plain arrays and a JSON text, so that nothing in it is executed. Does
I/O; beyond jax, flax and numpy it imports nothing.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ibsgl_jax import models
from ibsgl_jax.feature_stats import FeatureStats
from ibsgl_jax.pretrained import Preprocessing

FORMAT = "ibsgl_jax model 1"


class TrainedModel(NamedTuple):
    """What a file holds.

    Attributes:
      model: linen module.
      variables: params and batch_stats.
      preprocessing: of its images.
      class_names: C names.
      stats: statistics of its features while it was trained, or None.
      name: for people.
    """

    model: Any
    variables: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    stats: FeatureStats | None
    name: str


def save(
    path,
    variables,
    *,
    model_name: str,
    model_options: dict,
    num_classes: int,
    preprocessing: Preprocessing,
    class_names=None,
    stats: FeatureStats | None = None,
):
    """Write a model of ``models.MODELS`` with its variables to an ``.npz`` file.

    Args:
      path: ends in .npz; its folder is made if absent.
      variables: dict with params and perhaps batch_stats.
      model_name, model_options, num_classes: as for ``models.create``.
      preprocessing: of the images that it was trained on.
      class_names: C names; "class 0", ... if None.
      stats: feature statistics; left out if they have seen nothing.
    """
    path = Path(path)
    arrays = {"/".join(k): v for k, v in traverse_util.flatten_dict(variables).items()}
    if stats is not None and float(stats.count) > 0:
        arrays |= {f"feature_stats/{k}": v for k, v in stats._asdict().items()}
    about = {
        "format": FORMAT,
        "model": model_name,
        "options": model_options,
        "num_classes": num_classes,
        "preprocessing": preprocessing._asdict(),
        "class_names": list(class_names or [f"class {i}" for i in range(num_classes)]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp.npz")
    np.savez(
        scratch,
        about=json.dumps(about),
        **{k: np.asarray(v) for k, v in arrays.items()},
    )
    scratch.replace(path)


def find(run) -> Path:
    """The model file that a path stands for.

    Args:
      run: a model file, or the folder of a run (then the file of its last phase).

    Raises:
      ValueError: nothing is there, in one line.
    """
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise ValueError(f"{run}: no such file or folder")
    files = sorted(
        (run / "models").glob("*.npz"), key=lambda file: file.stat().st_mtime
    )
    if not files:
        raise ValueError(
            f"{run}: no finished run of `python -m train` (no {run / 'models'}/*.npz)"
        )
    return files[-1]


def load(path) -> TrainedModel:
    """Read what ``save`` wrote.

    Raises:
      ValueError: the file is not one of ours or is damaged, in one line.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            arrays = {k: file[k] for k in file.files if k != "about"}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a model file of ibsgl_jax ({error})") from None
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {about.get('format')!r}, this version reads {FORMAT!r}"
        )
    tree = traverse_util.unflatten_dict(
        {tuple(k.split("/")): jnp.asarray(v) for k, v in arrays.items()}
    )
    stats = tree.pop("feature_stats", None)
    tree.setdefault("batch_stats", {})
    return TrainedModel(
        model=models.create(
            about["model"], num_classes=about["num_classes"], **about["options"]
        ),
        variables=tree,
        preprocessing=Preprocessing(
            **{k: _tuple(v) for k, v in about["preprocessing"].items()}
        ),
        class_names=tuple(about["class_names"]),
        stats=None if stats is None else FeatureStats(**stats),
        name=f"{about['model']} ({path.stem})",
    )


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value
