"""``ibsgl export``: an attribution function in one file."""

import hashlib
import json
import os
import secrets
from pathlib import Path

import jax

from ibsgl_jax import attribution, export, onnx_files
from ibsgl_jax.app import classifier as classifiers
from ibsgl_jax.app import outputs, stats_cache
from ibsgl_jax.app.terminal import show_progress, shown
from ibsgl_jax.errors import UserError

FORMAT = "ibsgl export 1"
# --format -> the end of the file's name, where it runs, and how.
FORMATS = {
    "jax": ("jaxexport", "jax", export.RECIPE),
    "onnx": ("onnx", "onnxruntime", onnx_files.RECIPE),
}


def export_function(
    *,
    method: str,
    model: str,
    out: str | Path | None = None,
    file_format: str = "jax",
    weights: str | None = None,
    checkpoint: str | None = None,
    layer: str | None = None,
    stats: str | None = None,
    seed: int = 0,
    chunk_size: int = 8,
) -> int:
    """Writes the function and ``<out>.json``; the flags are those of ``cli``.

    Returns:
      The exit status.

    Raises:
      UserError: in one line; nothing was written.
    """
    ending, runtime, recipe = FORMATS[file_format]
    out = Path(out or f"attribution.{ending}")
    _check(out)
    classifier = classifiers.load(model, weights=weights, checkpoint=checkpoint)
    features_fn, head_fn = classifiers.split(classifier, layer)
    moments = None
    if method == "ib":
        moments, _ = stats_cache.feature_moments(
            classifier,
            features_fn,
            layer=layer,
            stats=stats,
            fit=classifier.preprocessing.fit,
            chunk_size=chunk_size,
        )
    tapped_fn = None
    if method == "full_grad":
        tapped_fn = classifiers.make_tapped_fn(classifier)
    attribution_fn = attribution.make_attribution_fn(
        method,
        features_fn,
        head_fn,
        key=jax.random.key(seed),
        moments=moments,
        tapped_fn=tapped_fn,
        **classifiers.method_options(method, head_fn, classifier.link),
    )
    preprocessing = classifier.preprocessing
    size = preprocessing.size
    show_progress("exporting")
    blob = _exported(
        file_format,
        method,
        attribution_fn,
        lambda x: head_fn(features_fn(x)),
        image_shape=(size, size, 3),
    )
    description = {
        "format": FORMAT,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "method": method,
        "model": classifier.name,
        "layer": layer or "last convolutional features",
        "unit": "bits per pixel" if method == "ib" else None,
        "image": "RGB in [0, 1], (pixel - mean) / std, [n, size, size, 3]",
        "size": size,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "class_names": list(classifier.class_names),
        "link": classifier.link,
        "run": recipe.format(path=out.name, size=size).splitlines(),
    }
    _write(out, blob, description)
    told = f"{shown(out)}: {len(blob) / 1e6:.1f} MB."
    print(f"{told} To run it anywhere {runtime} is installed:\n")
    print(recipe.format(path=str(out), size=size))
    return 0


def _exported(file_format, method, *functions, image_shape) -> bytes:
    if file_format == "jax":
        return export.export_attribution(*functions, image_shape=image_shape)
    try:
        return onnx_files.export_onnx(*functions, image_shape=image_shape)
    except NotImplementedError as error:
        raise UserError(f"--format onnx: {method} has no ONNX form: {error}") from None


def _check(out: Path) -> None:
    """UserError unless both files are new, or those of an earlier export."""
    outputs.check(out.parent, [], [])
    beside = export.beside(out)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    for path in (out, beside):
        if os.path.lexists(path) and not _is_ours(out, beside):
            raise UserError(
                f"--out {out}: {path.name} is there already and was not written by "
                "`ibsgl export`; choose another --out"
            )


def _is_ours(out: Path, beside: Path) -> bool:
    if out.is_symlink() or beside.is_symlink():
        return False
    try:
        about = json.loads(beside.read_bytes())
        with open(out, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return about["format"] == FORMAT and about["sha256"] == digest
    except Exception:  # absent, or somebody else's
        return False


def _write(out: Path, blob: bytes, description: dict) -> None:
    """Both files under temporary names first, then into their places."""
    scratch = out.with_name(f".ibsgl-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        export.write(scratch, blob, description)
        _check(out)
        os.replace(export.beside(scratch), export.beside(out))
        os.replace(scratch, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        scratch.unlink(missing_ok=True)
        export.beside(scratch).unlink(missing_ok=True)
