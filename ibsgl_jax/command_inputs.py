"""What the commands work on: a model with its feature statistics, and photos in blocks.

May do I/O. Every error of the user's is a ``CommandError`` of one line.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import (
    feature_stats,
    imagenet_classes,
    images,
    models,
    pretrained,
    tapping,
    trained,
)
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.images import ImageError

FEW_PHOTOS = 100


class CommandError(ValueError):
    """What the user has to mend, in one line."""


class LoadedModel(NamedTuple):
    """A classifier with everything that photos need.

    Attributes:
      name: for people and for the JSON.
      model: a Linen module.
      variables: its parameters and batch statistics.
      class_names: C names.
      preprocessing: as ``pretrained.preprocessing`` returns.
      weights_path: the file the weights came from, or None.
      stats: of its last convolutional features while it was trained, or None.
    """

    name: str
    model: Any
    variables: Any
    class_names: Sequence[str]
    preprocessing: Any
    weights_path: Path | None
    stats: feature_stats.FeatureStats | None = None


def load_model(arguments: argparse.Namespace) -> LoadedModel:
    """The model that --model, --weights or --checkpoint name."""
    if arguments.checkpoint is not None:
        return _load_checkpoint(arguments.checkpoint)
    if arguments.model not in models.MODELS:
        near = difflib.get_close_matches(arguments.model, models.MODELS, cutoff=0.4)
        raise CommandError(
            f"no model {arguments.model!r}; nearest names: "
            f"{', '.join(near or models.MODELS)}"
        )
    try:
        model, variables = pretrained.load(arguments.model, arguments.weights)
        preprocessing = pretrained.preprocessing(arguments.model)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"--weights {arguments.weights}: {reason}") from None
    weights_path = Path(arguments.weights) if arguments.weights else None
    return LoadedModel(
        name=arguments.model,
        model=model,
        variables=variables,
        class_names=_class_names(model.num_classes),
        preprocessing=preprocessing,
        weights_path=weights_path,
    )


def _load_checkpoint(run: str) -> LoadedModel:
    """A model that ``python -m train`` left in a folder, or one of its model files."""
    try:
        path = trained.find(run)
        found = trained.load(path)
    except ValueError as error:
        raise CommandError(f"--checkpoint {error}") from None
    return LoadedModel(
        name=found.name,
        model=found.model,
        variables=found.variables,
        class_names=found.class_names,
        preprocessing=found.preprocessing,
        weights_path=path,
        stats=found.stats,
    )


def _class_names(num_classes: int) -> list[str]:
    if num_classes == 1000:
        try:
            return imagenet_classes.names()
        except ValueError as error:
            warn(str(error))
    return [f"class {i}" for i in range(num_classes)]


def split_model(loaded: LoadedModel, layer: str | None) -> tuple[Callable, Callable]:
    """The features_fn and head_fn of a model, as pytrees that carry the weights."""
    model, variables = loaded.model, loaded.variables
    if layer is None:
        features_fn = models.make_features_fn(model, variables)
        return features_fn, models.make_head_fn(model, variables)
    size = loaded.preprocessing.size
    try:
        return tapping.linen(model, variables, layer, image_shape=(size, size, 3))
    except ValueError as error:
        raise CommandError(f"--layer: {error}") from None


def method_options(method: str, head_fn: Callable) -> dict:
    """Options of a method; at the last layer IBA's ten steps are too few for a map."""
    if method == "ib" and isinstance(head_fn, models.PooledLinear):
        return {"config": BottleneckConfig(num_steps=20)}
    return {}


class Block(NamedTuple):
    """Some photos read together.

    Attributes:
      photos: (path, Photo) of those that could be read.
      pixels: float32 [N, size, size, 3], N the same for all blocks; past the photos
        it repeats the last one.
      failures: one line for each of the others.
    """

    photos: list[tuple[Path, images.Photo]]
    pixels: np.ndarray | None
    failures: list[str]


def read_blocks(
    paths: Sequence[Path], loaded: LoadedModel, fit: str, block_size: int
) -> Iterator[Block]:
    """The photos at the given paths, read and prepared block by block."""
    for start in range(0, len(paths), block_size):
        photos, failures = [], []
        for path in paths[start : start + block_size]:
            try:
                image = images.read(path)
                photos.append(
                    (path, images.prepare(image, loaded.preprocessing, fit=fit))
                )
            except ImageError as error:
                failures.append(str(error))
        pixels = None
        if photos:
            pixels = [photo.pixels for _, photo in photos]
            pixels = np.stack(pixels + pixels[-1:] * (block_size - len(pixels)))
        yield Block(photos, pixels, failures)


def feature_moments(arguments, loaded, features_fn, paths, blocks):
    """Moments for the bottleneck, and where they come from."""
    if arguments.stats is None:
        known = known_moments(arguments, loaded)
        if known is not None:
            return known
        if not paths:
            raise CommandError(
                "the bottleneck needs feature statistics: give --stats FOLDER"
            )
        if len(paths) < FEW_PHOTOS:
            warn(
                f"feature statistics come from {len(paths)} of your own photos; "
                "--stats FOLDER with some hundreds of typical ones gives truer maps"
            )
        return _measure(features_fn, blocks(paths)), "the given photos"
    folder = Path(arguments.stats)
    if not folder.is_dir():
        raise CommandError(f"--stats {folder}: no such folder")
    stats_paths, _ = images.find([str(folder)])
    if not stats_paths:
        raise CommandError(f"--stats {folder}: no images in this folder")
    listing = [
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in stats_paths
    ]
    fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    source = f"{folder.resolve()} ({len(stats_paths)} files)"
    cached = read_cached(arguments, loaded, fingerprint)
    if cached is not None:
        return cached

    def counted():
        num_done = 0
        for block in blocks(stats_paths):
            num_done += len(block.photos) + len(block.failures)
            for failure in block.failures:
                warn(f"left out of the statistics: {failure}")
            show_progress(f"statistics of {num_done} of {len(stats_paths)} photos")
            yield block

    moments = _measure(features_fn, counted())
    _write_cached(arguments, loaded, fingerprint, source, moments)
    return moments, source


def known_moments(arguments, loaded):
    """(moments, source) of an earlier --stats or of the model's training, or None."""
    cached = read_cached(arguments, loaded)
    if cached is None and loaded.stats is not None and arguments.layer is None:
        return feature_stats.moments(loaded.stats), "the model's training"
    return cached


def _measure(features_fn, blocks) -> feature_stats.Moments:
    @jax.jit
    def update(features_fn, state, pixels, mask):
        return feature_stats.update(state, features_fn(pixels), mask)

    state = None
    for block in blocks:
        if block.photos:
            mask = np.arange(len(block.pixels)) < len(block.photos)
            if state is None:
                shape = jax.eval_shape(features_fn, block.pixels).shape
                state = feature_stats.init(shape[1:])
            state = update(features_fn, state, block.pixels, mask)
    if state is None:
        raise CommandError("no photo could be read for the feature statistics")
    moments = feature_stats.moments(
        state, active_threshold=BottleneckConfig().active_threshold
    )
    if not np.all(np.isfinite(moments.mean)):
        raise CommandError(
            "the features of the photos are not finite numbers: weights with NaN, or "
            "of another model?"
        )
    return moments


def _cache_paths(arguments, loaded: LoadedModel) -> list[Path]:
    """Where statistics may be kept: beside the weights, else the user's cache."""
    layer = (arguments.layer or "last").replace("/", ".")
    fit = getattr(arguments, "fit", "crop")
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(loaded.variables):
        digest.update(np.asarray(leaf).tobytes())
    name = f"{loaded.name}.{layer}.{fit}.{digest.hexdigest()[:12]}.stats.npz"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folders = [Path(home) / "ibsgl_jax"]
    if loaded.weights_path:
        folders.insert(0, loaded.weights_path.parent)
    return [folder / name for folder in folders]


def read_cached(arguments, loaded, fingerprint: str | None = None):
    """(moments, source) from an earlier --stats of these weights and layer, or None."""
    for path in _cache_paths(arguments, loaded):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if fingerprint not in (None, str(arrays["fingerprint"])):
                    continue
                moments = feature_stats.Moments(
                    *(jnp.asarray(arrays[name]) for name in ("mean", "std", "active"))
                )
                source = f"{arrays['source']}, remembered in {path}"
        except Exception:  # absent, damaged or of another version: measured anew
            continue
        show_progress(f"feature statistics of {source}")
        return moments, source
    return None


def _write_cached(arguments, loaded, fingerprint, source, moments) -> None:
    arrays = {name: np.asarray(x) for name, x in moments._asdict().items()}
    paths = _cache_paths(arguments, loaded)
    for path in paths:
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(partial, fingerprint=fingerprint, source=source, **arrays)
            os.replace(partial, path)
        except OSError:
            continue
        return
    warn(f"the statistics are not remembered: {paths[-1].parent} cannot be written")


def warn(text: str) -> None:
    """One line on stderr that the command goes on after."""
    end_progress()
    print(f"ibsgl: warning: {text}", file=sys.stderr)


def show_progress(text: str) -> None:
    """A line that the next one replaces, on a terminal; a plain line elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr)


def end_progress() -> None:
    """Clear the line of ``show_progress``, on a terminal."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
