"""Feature statistics for the bottleneck: measured on photos, and kept for next time."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import feature_stats
from ibsgl_jax.app import photos
from ibsgl_jax.app.classifier import Classifier
from ibsgl_jax.app.terminal import show_progress, warn
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.errors import UserError

FEW_PHOTOS = 100


def feature_moments(
    classifier: Classifier,
    features_fn: Callable,
    *,
    layer: str | None,
    stats: str | None,
    fit: str,
    chunk_size: int,
    sources: Sequence[photos.Source] = (),
) -> tuple[feature_stats.Moments, str]:
    """Moments for the bottleneck, and where they come from.

    Args:
      classifier, features_fn, layer: the model, split at that layer.
      stats: folder of typical photos; None takes what an earlier run remembered, the
        model's own training, or else the given photos.
      fit: see ``images.crop_box``.
      chunk_size: photos worked on at once.
      sources: the given photos.

    Raises:
      UserError: there is nothing to measure on, or what was measured is not finite.
    """
    places = _places(classifier, layer, fit)

    def blocks(sources):
        return photos.read_blocks(
            sources, classifier.preprocessing, fit=fit, block_size=chunk_size
        )

    if stats is None:
        known = _read(places)
        if known is None and classifier.stats is not None and layer is None:
            known = feature_stats.moments(classifier.stats), "the model's training"
        if known is not None:
            return known
        if not sources:
            raise UserError(
                "the bottleneck needs feature statistics: give --stats FOLDER"
            )
        if len(sources) < FEW_PHOTOS:
            warn(
                f"feature statistics come from {len(sources)} of your own photos; "
                "--stats FOLDER with some hundreds of typical ones gives truer maps"
            )
        return _measure(features_fn, blocks(sources)), "the given photos"
    folder = Path(stats)
    if not folder.is_dir():
        raise UserError(f"--stats {folder}: no such folder")
    found = photos.find([stats])
    if not found.sources:
        raise UserError(f"--stats {folder}: no images in this folder")
    fingerprint = _fingerprint(folder, found.sources)
    known = _read(places, fingerprint)
    if known is not None:
        return known
    for failure in found.failures:
        warn(f"left out of the statistics: {failure}")
    told = _told(blocks(found.sources), len(found.sources))
    moments = _measure(features_fn, told)
    source = f"{folder.resolve()} ({len(found.sources)} files)"
    _write(places, fingerprint, source, moments)
    return moments, source


def _fingerprint(folder: Path, sources: Sequence[photos.Source]) -> str:
    listing = []
    for source in sources:
        status = source.path.stat()
        name = os.path.relpath(source.path, folder)
        listing.append((name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _told(blocks: Iterable[photos.Block], num_photos: int) -> Iterable[photos.Block]:
    num_done = 0
    for block in blocks:
        num_done += len(block.photos) + len(block.failures)
        for failure in block.failures:
            warn(f"left out of the statistics: {failure}")
        show_progress(f"statistics of {num_done} of {num_photos} photos")
        yield block


def _measure(features_fn: Callable, blocks) -> feature_stats.Moments:
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
        raise UserError("no photo could be read for the feature statistics")
    moments = feature_stats.moments(
        state, active_threshold=BottleneckConfig().active_threshold
    )
    if not np.all(np.isfinite(moments.mean)):
        raise UserError(
            "the features of the photos are not finite numbers: weights with NaN, or "
            "of another model?"
        )
    return moments


def _places(classifier: Classifier, layer: str | None, fit: str) -> list[Path]:
    """Where statistics may be kept: beside the weights, else the user's cache."""
    digest = hashlib.sha256(f"{classifier.name} {layer} {fit}".encode())
    for leaf in jax.tree.leaves(classifier.variables):
        digest.update(np.asarray(leaf).tobytes())
    readable = f"{classifier.name}.{layer or 'last'}.{fit}"
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", readable)[:100]
    name = f"{readable}.{digest.hexdigest()[:16]}.stats.npz"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = [Path(home) / "ibsgl_jax"]
    if classifier.weights_path:
        folders.insert(0, classifier.weights_path.parent)
    return [folder / name for folder in folders]


def _read(places: Sequence[Path], fingerprint: str | None = None):
    """(moments, source) of an earlier --stats, or None."""
    for path in places:
        kept = _kept(path)
        if kept is None or fingerprint not in (None, kept[0]):
            continue
        source = f"{kept[1]}, remembered in {path}"
        show_progress(f"feature statistics of {source}")
        return kept[2], source
    return None


def _kept(path: Path) -> tuple[str, str, feature_stats.Moments] | None:
    """(fingerprint, source, moments) of a file that ``_write`` wrote, or None."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            moments = feature_stats.Moments(
                *(jnp.asarray(arrays[name]) for name in ("mean", "std", "active"))
            )
            return str(arrays["fingerprint"]), str(arrays["source"]), moments
    except Exception:  # absent, damaged, somebody else's: measured anew
        return None


def _write(places: Sequence[Path], fingerprint: str, source: str, moments) -> None:
    arrays: dict[str, Any] = {
        name: np.asarray(x) for name, x in moments._asdict().items()
    }
    for path in places:
        # Only what an earlier run kept there is replaced.
        if os.path.lexists(path) and (path.is_symlink() or _kept(path) is None):
            continue
        partial = path.with_name(f".ibsgl-{secrets.token_hex(4)}.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as file:
                np.savez(file, fingerprint=fingerprint, source=source, **arrays)
            os.replace(partial, path)
        except OSError:
            continue
        finally:
            partial.unlink(missing_ok=True)
        return
    warn(f"the statistics are not remembered: {places[-1].parent} cannot be written")
