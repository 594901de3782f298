"""The command ``ibsgl``: explain photos, list models and layers, export a function.

May do I/O. Every error of the user's is one line on stderr and exit status 2; photos
that cannot be read do not keep the others from being explained.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import (
    attribution,
    command_inputs,
    export,
    images,
    models,
    pretrained,
    tapping,
)
from ibsgl_jax.command_inputs import CommandError
from ibsgl_jax.images import ImageError

METHOD_TITLES = {
    "ib": "Information bottleneck",
    "hirescam": "HiResCAM",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "gradient": "Gradient",
    "input_x_gradient": "Input x gradient",
    "smooth_grad": "SmoothGrad",
    "integrated_gradients": "Integrated Gradients",
    "full_grad": "FullGrad",
    "random": "Random (control)",
}
SHEET_ROWS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (CommandError, ImageError) as error:
        command_inputs.end_progress()
        print(f"ibsgl: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ibsgl", description="Explain what a classifier sees in your photos."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser("explain", help="draw attribution maps over photos")
    explain.set_defaults(command=_explain)
    explain.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="files, folders or wildcards"
    )
    _add_model_options(explain)
    explain.add_argument(
        "--method",
        default="ib,grad_cam",
        metavar="NAMES",
        help=f"comma-separated, of: {', '.join(attribution.METHODS)} "
        "(default: %(default)s)",
    )
    explain.add_argument(
        "--class",
        dest="target",
        metavar="N|NAME",
        help="the class to explain (default: the predicted one of each photo)",
    )
    explain.add_argument(
        "--fit",
        choices=images.FITS,
        default="crop",
        help="crop: the central square, as in the model's training; squash: the whole "
        "photo, its aspect lost (default: %(default)s)",
    )
    explain.add_argument("--out", default="explained", metavar="DIR")

    listing = commands.add_parser("models", help="list models, or a model's layers")
    listing.set_defaults(command=_list_models)
    listing.add_argument("--layers", metavar="NAME", help="a model's layers and shapes")

    exporting = commands.add_parser(
        "export", help="write an attribution function that runs without this package"
    )
    exporting.set_defaults(command=_export)
    _add_model_options(exporting)
    exporting.add_argument("--method", default="ib", metavar="NAME")
    exporting.add_argument("--out", default="attribution.jaxexport", metavar="FILE")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME",
        help="see `ibsgl models` (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors, .npz or .pth (default: those of an installed package)",
    )
    source.add_argument(
        "--checkpoint", metavar="RUN", help="folder written by `python -m train`"
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="see `ibsgl models --layers MODEL`"
    )
    parser.add_argument(
        "--stats",
        metavar="FOLDER",
        help="typical photos, some hundreds, from which the bottleneck's noise is "
        "learned; remembered for the next time",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chunk-size",
        type=int,
        default=8,
        metavar="N",
        help="photos worked on at once (default: %(default)s)",
    )


def _explain(arguments: argparse.Namespace) -> int:
    methods = _parse_methods(arguments.method)
    if arguments.chunk_size < 1:
        raise CommandError(f"--chunk-size {arguments.chunk_size}: must be at least 1")
    paths, failures = images.find(arguments.photos)
    paths, unreadable = _check_readable(paths)
    failures += unreadable
    if not paths:
        return _report(failures, "no photo to explain")
    out = _make_folder(arguments.out)
    loaded = command_inputs.load_model(arguments)
    target = _parse_class(arguments.target, loaded.class_names)
    features_fn, head_fn = command_inputs.split_model(loaded, arguments.layer)

    def blocks(paths):
        return command_inputs.read_blocks(
            paths, loaded, arguments.fit, min(arguments.chunk_size, len(paths))
        )

    moments, stats_source = None, None
    if "ib" in methods:
        moments, stats_source = command_inputs.feature_moments(
            arguments, loaded, features_fn, paths, blocks
        )
    explain_fn = _make_explain_fn(
        methods, loaded, features_fn, head_fn, moments, arguments.seed, target
    )

    photos, rows = [], []
    maps = {method: [] for method in methods}
    names_taken = set()
    num_done = 0
    for block in blocks(paths):
        failures += block.failures
        if block.photos:
            logits, classes, block_maps = explain_fn(block.pixels)
        for i, (path, photo) in enumerate(block.photos):
            if not np.all(np.isfinite(logits[i])):
                failures.append(f"{path}: {_not_finite(loaded)}")
                continue
            probabilities = np.asarray(jax.nn.softmax(logits[i]))
            entry = _describe(path, photo, logits[i], probabilities, classes[i], loaded)
            title = f"{entry['class']['name']}, {100 * probabilities[classes[i]]:.0f} %"
            panels = [
                images.Panel(
                    view=photo.view,
                    heat=block_maps[method][i],
                    method=METHOD_TITLES[method],
                    unit="bits per pixel" if method == "ib" else None,
                )
                for method in methods
            ]
            stem = _free_name(path.stem, names_taken)
            for method, panel in zip(methods, panels, strict=True):
                file = out / f"{stem}_{method}.png"
                images.overlay(panel, title=title, path=file)
                entry["files"][method] = file.name
                maps[method].append(block_maps[method][i])
            photos.append(entry)
            rows.append((f"{path.name}\n{title}", panels))
            if len(rows) == SHEET_ROWS:
                _write_sheet(out, len(photos), rows)
        num_done += len(block.photos) + len(block.failures)
        command_inputs.show_progress(f"explained {num_done} of {len(paths)} photos")
    if rows:
        _write_sheet(out, len(photos), rows)
    if photos:
        stacked = {method: np.stack(maps[method]) for method in methods}
        _write(out / "maps.npz", lambda path: np.savez_compressed(path, **stacked))
    explanation = {
        "model": loaded.name,
        "weights": str(arguments.checkpoint or loaded.weights_path or "packaged"),
        "layer": arguments.layer or "last convolutional features",
        "methods": methods,
        "fit": arguments.fit,
        "seed": arguments.seed,
        "feature_statistics": stats_source,
        "photos": photos,
        "failed": failures,
    }
    text = json.dumps(explanation, indent=2) + "\n"
    _write(out / "explanation.json", lambda path: path.write_text(text))
    command_inputs.end_progress()
    print(f"{len(photos)} photos explained in {out}")
    return _report(failures, f"{len(failures)} not explained")


def _report(failures: list[str], heading: str) -> int:
    """The list of what failed, last of all; the exit status."""
    if not failures:
        return 0
    print(f"ibsgl: {heading}:", file=sys.stderr)
    for failure in failures:
        print(f"  {failure}", file=sys.stderr)
    return 2


def _parse_methods(text: str) -> list[str]:
    methods = [name.strip() for name in text.split(",") if name.strip()]
    if not methods:
        raise CommandError("--method: give at least one")
    for method in methods:
        if method not in attribution.METHODS:
            near = difflib.get_close_matches(method, attribution.METHODS, cutoff=0.4)
            raise CommandError(
                f"no method {method!r}; nearest names: "
                f"{', '.join(near or attribution.METHODS)}"
            )
    return list(dict.fromkeys(methods))


def _parse_class(text: str | None, class_names: Sequence[str]) -> int | None:
    """A number, a name, or a part of exactly one name."""
    if text is None:
        return None
    if text.lstrip("-").isdigit():
        try:
            attribution.check_classes([int(text)], len(class_names))
        except ValueError as error:
            raise CommandError(f"--class {text}: {error}") from None
        return int(text)
    lowered = [name.lower() for name in class_names]
    wanted = text.lower()
    if wanted in lowered:
        return lowered.index(wanted)
    inside = [i for i, name in enumerate(lowered) if wanted in name]
    if len(inside) == 1:
        return inside[0]
    near = [class_names[i] for i in inside]
    if not near:
        close = difflib.get_close_matches(wanted, lowered, n=5, cutoff=0.4)
        near = [class_names[lowered.index(name)] for name in close]
    nearest = f"; nearest names: {', '.join(near[:8])}" if near else ""
    kind = "several classes have it in their name" if inside else "no such class"
    raise CommandError(f"--class {text!r}: {kind}{nearest}")


def _check_readable(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Leaves out early what cannot even be opened, before any model is loaded."""
    readable, failures = [], []
    for path in paths:
        try:
            with open(path, "rb") as file:
                empty = not file.read(1)
        except OSError as error:
            reason = "no such file" if not path.exists() else error.strerror
            failures.append(f"{path}: {reason}")
            continue
        if empty:
            failures.append(f"{path}: the file is empty")
        else:
            readable.append(path)
    return readable, failures


def _make_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".ibsgl-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise CommandError(
            f"--out {folder}: cannot write there ({error.strerror})"
        ) from None
    return folder


def _write(path: Path, write_fn: Callable[[Path], Any]) -> None:
    try:
        write_fn(path)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror})") from None


def _write_sheet(out: Path, num_photos: int, rows: list) -> None:
    """Writes the rows gathered, and empties the list."""
    sheet = -(-num_photos // SHEET_ROWS)
    name = "contact_sheet.png" if sheet == 1 else f"contact_sheet_{sheet}.png"
    images.contact_sheet(rows, path=out / name)
    rows.clear()


def _make_explain_fn(
    methods, loaded, features_fn, head_fn, moments, seed, target
) -> Callable:
    """pixels [N, ...] -> (logits [N, C], classes [N], {method: maps [N, H, W]}).

    One compiled function for all methods, so that they share the pass through the
    network.
    """
    tapped_fn = None
    if "full_grad" in methods:
        tapped_fn = attribution.make_tapped_fn(loaded.model, loaded.variables)

    @jax.jit
    def explain(features_fn, head_fn, tapped_fn, moments, key, pixels):
        logits = head_fn(features_fn(pixels))
        if target is None:
            classes = jnp.argmax(logits, axis=-1)
        else:
            classes = jnp.full(len(pixels), target)
        maps = {}
        for method in methods:
            attribution_fn = attribution.make_attribution_fn(
                method,
                features_fn,
                head_fn,
                key=key,
                moments=moments,
                tapped_fn=tapped_fn,
                **command_inputs.method_options(method, head_fn),
            )
            maps[method] = attribution_fn(pixels, classes)
        return logits, classes, maps

    def explain_fn(pixels):
        key = jax.random.key(seed)
        results = explain(features_fn, head_fn, tapped_fn, moments, key, pixels)
        return jax.tree.map(np.asarray, results)

    return explain_fn


def _describe(path, photo, logits, probabilities, target, loaded) -> dict:
    def one_class(index):
        return {
            "index": int(index),
            "name": loaded.class_names[index],
            "probability": float(probabilities[index]),
            "logit": float(logits[index]),
        }

    best = np.argsort(-logits, kind="stable")[:5]
    return {
        "path": str(path),
        "size": list(photo.size),
        "box": [round(edge, 2) for edge in photo.box],
        "class": one_class(target),
        "predicted": [one_class(index) for index in best],
        "files": {},
    }


def _free_name(stem: str, taken: set[str]) -> str:
    """The stem, numbered if another photo has it already."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def _not_finite(loaded: command_inputs.LoadedModel) -> str:
    return (
        f"{loaded.name} answers with NaN or infinite logits: damaged weights, or those "
        "of another model?"
    )


def _list_models(arguments: argparse.Namespace) -> int:
    if arguments.layers is None:
        for name in models.MODELS:
            print(name)
        return 0
    name = arguments.layers
    try:
        model = models.create(name, num_classes=1000)
    except ValueError as error:
        raise CommandError(str(error)) from None
    try:
        size = pretrained.preprocessing(name).size
    except ValueError:  # a model without pretrained weights: any size will do
        size = 48
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    layers = tapping.layer_names(model, variables, (size, size, 3))
    width = max(map(len, layers))
    for layer, shape in layers.items():
        print(f"{layer:{width}}  {' x '.join(map(str, shape))}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    methods = _parse_methods(arguments.method)
    if len(methods) != 1:
        raise CommandError("--method: one file holds one method")
    (method,) = methods
    out = Path(arguments.out)
    _make_folder(str(out.parent))
    loaded = command_inputs.load_model(arguments)
    features_fn, head_fn = command_inputs.split_model(loaded, arguments.layer)
    moments = None
    if method == "ib":

        def blocks(paths):
            size = min(arguments.chunk_size, len(paths))
            return command_inputs.read_blocks(paths, loaded, "crop", size)

        moments, _ = command_inputs.feature_moments(
            arguments, loaded, features_fn, [], blocks
        )
    tapped_fn = None
    if method == "full_grad":
        tapped_fn = attribution.make_tapped_fn(loaded.model, loaded.variables)
    attribution_fn = attribution.make_attribution_fn(
        method,
        features_fn,
        head_fn,
        key=jax.random.key(arguments.seed),
        moments=moments,
        tapped_fn=tapped_fn,
        **command_inputs.method_options(method, head_fn),
    )
    preprocessing = loaded.preprocessing
    size = preprocessing.size
    command_inputs.show_progress("exporting")
    blob = export.export_attribution(
        attribution_fn,
        lambda x: head_fn(features_fn(x)),
        image_shape=(size, size, 3),
    )
    description = {
        "method": method,
        "model": loaded.name,
        "layer": arguments.layer or "last convolutional features",
        "unit": "bits per pixel" if method == "ib" else None,
        "image": "RGB in [0, 1], (pixel - mean) / std, [n, size, size, 3]",
        "size": size,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "class_names": list(loaded.class_names),
    }
    _write(out, lambda path: export.write(path, blob, description))
    print(f"{out}: {len(blob) / 1e6:.1f} MB. To run it anywhere jax is installed:\n")
    print(export.RECIPE.format(path=str(out), size=size))
    return 0
