"""One trained model in one file: weights, what it is, and how its images were made.

``python -m train`` leaves one such file per phase; ``ibsgl explain --checkpoint`` reads
it. An ``.npz`` of plain arrays and a JSON text, so that nothing in it is executed; of a
model of your own it holds the name, "package.module:Class", and reading it imports that
module. Does I/O; beyond jax, flax and numpy it imports nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ibsgl_jax import models, predictions
from ibsgl_jax.feature_stats import FeatureStats
from ibsgl_jax.images import FITS
from ibsgl_jax.pretrained import Preprocessing

FORMAT = "ibsgl_jax model 1"
_MAX_SIZE = 8192


class TrainedModel(NamedTuple):
    """What a file holds.

    Attributes:
      model: linen module.
      variables: params and batch_stats.
      preprocessing: of its images.
      class_names: C names.
      stats: statistics of its features while it was trained, or None.
      name: for people.
      link: of its logits, "softmax" or "sigmoid" (``metrics.probability``).
    """

    model: Any
    variables: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    stats: FeatureStats | None
    name: str
    link: str = "softmax"


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
    link: str = "softmax",
):
    """Write a model that ``models.create`` makes, with its variables, to a file.

    Args:
      path: ends in .npz; its folder is made if absent.
      variables: dict with params and perhaps batch_stats.
      model_name, model_options, num_classes: as for ``models.create``.
      preprocessing: of the images that it was trained on.
      class_names: C names, which explanations show; "class 0", ... if None.
      stats: feature statistics; left out if they have seen nothing.
      link: "sigmoid" for a head with several labels per image.

    Raises:
      ValueError: the number of names is not that of the classes, or an unknown link.
    """
    path = Path(path)
    predictions.check_link(link)
    if class_names is None:
        class_names = [f"class {i}" for i in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
    arrays = {"/".join(k): v for k, v in traverse_util.flatten_dict(variables).items()}
    if stats is not None and float(stats.count) > 0:
        arrays |= {f"feature_stats/{k}": v for k, v in stats._asdict().items()}
    about = {
        "format": FORMAT,
        "model": model_name,
        "options": model_options,
        "num_classes": num_classes,
        "preprocessing": preprocessing._asdict(),
        "class_names": [str(name) for name in class_names],
        "link": link,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp.npz")
    saved: dict[str, Any] = {k: np.asarray(v) for k, v in arrays.items()}
    np.savez(scratch, about=json.dumps(about), **saved)
    scratch.replace(path)


def find(run) -> Path:
    """The model file that a path stands for.

    Args:
      run: a model file, or the folder of a run: then the file of the last of its
        finished phases, in the order of ``phases`` in its ``config.json``. Time stamps
        do not matter, so that a copy of a run stands for the same model.

    Raises:
      ValueError: nothing is there, or nothing says which of several files, in one line.
    """
    run = Path(run)
    if not run.is_dir():
        if run.exists():
            return run
        raise ValueError(f"{run}: no such file or folder")
    folder = run / "models"
    for phase in reversed(_phases(run)):
        if (folder / f"{phase}.npz").is_file():
            return folder / f"{phase}.npz"
    files = [f for f in sorted(folder.glob("*.npz")) if not f.match("*.tmp.npz")]
    if not files:
        raise ValueError(
            f"{run}: no finished run of `python -m train` (no {folder}/*.npz)"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{run}: its config.json does not say which phase was the last; name one "
            f"of {folder}/ ({names})"
        )
    return files[0]


def _phases(run: Path) -> list[str]:
    """In the order of the run's configuration; none if that cannot be read."""
    try:
        phases = json.loads((run / "config.json").read_bytes())["phases"]
    except Exception:  # absent, damaged
        return []
    if not isinstance(phases, list):
        return []
    return [p for p in phases if isinstance(p, str) and Path(p).name == p]


def load(path) -> TrainedModel:
    """Read what ``save`` wrote.

    Raises:
      ValueError: the file is not one of ours or is damaged, in one line.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("no such file, or a folder")
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            sizes = [member.file_size for member in file.zip.infolist()]
            if sum(sizes) > 20 * path.stat().st_size + 2**20:
                raise ValueError("it unpacks to many times its size")
            about = json.loads(str(file["about"]))
            arrays = {k: file[k] for k in file.files if k != "about"}
    except Exception as error:  # zip, zlib, header, JSON and memory errors alike
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a model file of ibsgl_jax ({cause})") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise ValueError(
            f"{path}: format {str(found)[:60]!r}, this version reads {FORMAT!r}"
        )
    try:
        return _build(path, about, arrays)
    except Exception as error:  # whatever a wrong field makes a model raise
        cause = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            cause = f"no field {error}"
        raise ValueError(
            f"{path}: not a whole model file of ibsgl_jax ({cause[:500]})"
        ) from None


def _build(path: Path, about: dict, arrays: dict) -> TrainedModel:
    """The model that a file's fields and arrays describe; any exception if none."""
    preprocessing = _preprocessing(about["preprocessing"])
    num_classes = about["num_classes"]
    if type(num_classes) is not int or not 0 < num_classes <= 10**6:
        raise ValueError(f"num_classes {num_classes!r}")
    _check_options(about["options"], len(arrays))
    model = models.create(about["model"], num_classes=num_classes, **about["options"])
    link = about.get("link", "softmax")  # files of earlier versions have none
    predictions.check_link(link)
    names = about.get("class_names") or [f"class {i}" for i in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes:
        raise ValueError(f"class_names are not {num_classes} names")
    moving, leaves = {}, {}
    for name, value in arrays.items():
        if not np.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
            raise ValueError(f"array {name!r} is not of finite numbers")
        if name.startswith("feature_stats/"):
            moving[name.removeprefix("feature_stats/")] = jnp.asarray(value)
        else:
            leaves[tuple(name.split("/"))] = jnp.asarray(value)
    size = preprocessing.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), image)
    _check_leaves(leaves, traverse_util.flatten_dict(wanted))
    stats = None
    if moving:
        features = jax.eval_shape(
            lambda v, x: model.apply(v, x, method="features"), wanted, image
        )
        stats = _check_stats(FeatureStats(**moving), features)
    tree = traverse_util.unflatten_dict(leaves)
    tree.setdefault("batch_stats", {})
    return TrainedModel(
        model=model,
        variables=tree,
        preprocessing=preprocessing,
        class_names=tuple(map(str, names)),
        stats=stats,
        name=f"{about['model']} ({path.stem})",
        link=link,
    )


def _preprocessing(fields: Mapping) -> Preprocessing:
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
    }
    found = Preprocessing(**given)
    for name in ("size", "resize"):
        value = getattr(found, name)
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise ValueError(f"preprocessing: {name} {value!r}")
    for name in ("mean", "std"):
        value = getattr(found, name)
        if len(value) != 3 or not all(math.isfinite(x) for x in value):
            raise ValueError(f"preprocessing: {name} {value!r}")
    wrong = found.resize < found.size or found.fit not in FITS
    if wrong or min(found.std) <= 0:
        raise ValueError(f"preprocessing: {found}")
    return found


def _check_options(options: Mapping, num_arrays: int) -> None:
    """ValueError for sizes that would take for ever to build."""
    for name, value in options.items():
        numbers = value if isinstance(value, Sequence) else [value]
        numbers = [n for n in numbers if isinstance(n, int)]
        if any(not 0 <= n <= 10**5 for n in numbers):
            raise ValueError(f"options: {name} {value!r}")
        if name == "stage_sizes" and sum(numbers) > num_arrays:
            raise ValueError(f"options: {name} {value!r}, but {num_arrays} arrays")


def _check_leaves(found: Mapping, wanted: Mapping) -> None:
    """ValueError unless the arrays are those of the model."""
    for name in (*wanted, *found):
        text = "/".join(name)
        if name not in found:
            raise ValueError(f"no array {text!r}")
        if name not in wanted:
            raise ValueError(f"array {text!r} has no place in the model")
        shape, expected = found[name].shape, wanted[name].shape
        if shape != expected:
            raise ValueError(f"array {text!r} has shape {shape}, not {expected}")


def _check_stats(stats: FeatureStats, features: jax.ShapeDtypeStruct) -> FeatureStats:
    """The statistics; ValueError unless they are of the model's features."""
    shapes = [leaf.shape for leaf in stats]
    if shapes != [(), *[features.shape[1:]] * 3]:
        raise ValueError(f"feature_stats of shapes {shapes}, not {features.shape[1:]}")
    return stats
