"""What benchmarks/fuzz.py feeds with damaged files: seeds, and the function that reads.

A target is (kind, function folder -> seed files, function of one damaged file).
"""

import contextlib
import io
import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from ibsgl_jax import images, models, pretrained, torch_files, trained
from ibsgl_jax.app import outputs
from ibsgl_jax.errors import UserError
from train.data import labels_csv
from train.errors import FaultsError
from train.method.check import check_config
from train.run import checkpoint, saved_run

TORCH = Path(__file__).parents[1] / "tests" / "data" / "torch"
PICTURES = [f"{label}/{number}.jpg" for label in "ab" for number in range(5)]
TINY = dict(stage_sizes=(1, 2), num_filters=4)


def read_weights(path):
    # A whole load takes a trace of the model: for a file that has changed little.
    tensors = pretrained.read_tensors(path)
    if any(name.endswith("layer2.1.bn2.bias") for name in tensors):
        pretrained.fill("resnet18", tensors, **TINY)


def _tensors():
    tensors = torch_files.read(TORCH / "basic_legacy.pth")
    return {name: np.ascontiguousarray(t) for name, t in tensors.items()}


def _forget_time(path):
    """An archive without the times of writing, the same at each run."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            info = zipfile.ZipInfo(entry.filename)
            archive.writestr(info, data, entry.compress_type)


def make_pth(folder):
    return [TORCH / "kinds.pth", TORCH / "bottleneck.pth", TORCH / "vgg.pth"]


def make_pth_legacy(folder):
    return [TORCH / "kinds_legacy.pth", TORCH / "basic_legacy.pth"]


def make_safetensors(folder):
    from safetensors.numpy import save_file

    save_file(_tensors(), folder / "a.safetensors")
    return [folder / "a.safetensors"]


def make_npz(folder):
    np.savez(folder / "a.npz", **_tensors())
    np.savez_compressed(folder / "b.npz", **_tensors())
    _forget_time(folder / "a.npz")
    _forget_time(folder / "b.npz")
    return [folder / "a.npz", folder / "b.npz"]


def make_photos(folder):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 4), np.uint8)
    pixels[:20] = pixels[0]
    image = Image.fromarray(pixels)
    files = [folder / f"a.{suffix}" for suffix in ("png", "tif", "webp")]
    for path in files:
        image.save(path)
    for name in ("b.jpg", "b.gif", "b.png", "b.webp"):
        image.convert("RGB").save(folder / name)
        files.append(folder / name)
    image.convert("RGB").save(folder / "c.tif", compression="tiff_lzw")
    image.convert("RGB").save(folder / "d.jpg", progressive=True)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "e.png")
    return [*files, folder / "c.tif", folder / "d.jpg", folder / "e.png"]


def read_photo(path):
    images.prepare(images.read(path), pretrained.preprocessing("resnet18"))


def make_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(default.get_config().to_dict(), default=str))
    return [path]


def read_config(path):
    folder = path.parent / "run"
    folder.mkdir(exist_ok=True)
    path.replace(folder / "config.json")
    check_config(saved_run.load_config(folder))


def make_model(folder):
    options = dict(stage_sizes=(1,), num_filters=4)
    model = models.create("resnet18", num_classes=3, **options)
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    trained.save(
        folder / "plain.npz",
        variables,
        model_name="resnet18",
        model_options={k: list(v) if k == "stage_sizes" else v
                       for k, v in options.items()},
        num_classes=3,
        preprocessing=pretrained.preprocessing("resnet18"),
    )  # fmt: skip
    _forget_time(folder / "plain.npz")
    return [folder / "plain.npz"]


def read_model(path):
    trained.load(trained.find(path))


def make_explanation(folder):
    path = folder / "explanation.json"
    about = {"format": "ibsgl explain 1", "written": {"a.png": 3}, "planned": ["b"]}
    path.write_text(json.dumps(about | {"scratch": [".a"], "photos": [{"file": "a"}]}))
    return [path]


def read_explanation(path):
    path.replace(path.parent / outputs.MARKER)
    outputs.read_marker(path.parent)


def make_csv(folder):
    path = folder / "labels.csv"
    rows = "".join(f"{name},{name[0]},1,2,30,40\n" for name in PICTURES)
    path.write_text("file,label,ymin,xmin,ymax,xmax\n" + rows)
    return [path]


def read_csv(path):
    for name in PICTURES:
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).touch()
    path.replace(path.parent / "labels.csv")
    _, faults = labels_csv.read(path.parent)
    if any("\n" in line or "\x1b" in line for line in faults):
        raise AssertionError("a fault of more than one line")
    if faults:
        raise ValueError(faults[0])


class State(NamedTuple):
    """As much of a TrainState as a checkpoint asks for."""

    step: jax.Array
    params: dict


def _state(fill: float) -> State:
    params = {"kernel": jnp.full((3, 4), fill), "bias": jnp.full(4, fill)}
    return State(jnp.int32(7), params)


def make_checkpoint(folder):
    """A phase's checkpoints as archives, with the sums of the files and without."""
    whole = folder / "whole"
    with checkpoint.open_manager(whole) as manager:
        checkpoint.save(manager, _state(0.5), accuracy=0.5, meta={"epoch": 1})
    files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
    archives = [folder / "sealed.zip", folder / "unsealed.zip"]
    for archive, left_out in zip(archives, (None, checkpoint.FILES), strict=True):
        with zipfile.ZipFile(archive, "w") as file:
            for path in files:
                if path.name != left_out:
                    name = str(path.relative_to(whole))
                    file.writestr(zipfile.ZipInfo(name), path.read_bytes())
    return archives


def read_checkpoint(path):
    folder = path.parent / "phase"
    for old in path.parent.glob("phase*"):  # set aside as damaged, too
        shutil.rmtree(old)
    with zipfile.ZipFile(path) as file:
        file.extractall(folder)
    with checkpoint.open_manager(folder) as manager:
        checkpoint.restore(manager, _state(0.0))


TARGETS = (
    ("pth", make_pth, read_weights),
    ("pth_legacy", make_pth_legacy, read_weights),
    ("safetensors", make_safetensors, read_weights),
    ("npz", make_npz, read_weights),
    ("photo", make_photos, read_photo),
    ("config", make_config, read_config),
    ("model", make_model, read_model),
    ("checkpoint", make_checkpoint, read_checkpoint),
    ("explanation", make_explanation, read_explanation),
    ("csv", make_csv, read_csv),
)


def outcome(read, path) -> tuple[str, str]:
    """How a reader took a file: (accepted, refused, memory or traceback; in words)."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            read(path)
        return "accepted", ""
    except MemoryError as error:
        return "memory", repr(error)[:300]
    except (ValueError, OSError, SystemExit) as error:
        text = str(error)
        if "MemoryError" in text or "Unable to allocate" in text:
            return "memory", text[:300]
        # A subclass of ValueError that is not ours (UnicodeDecodeError) is a traceback.
        plain = type(error) in (ValueError, SystemExit)
        known = plain or isinstance(error, OSError | UserError)
        # Several faults are told together, a line for each.
        lines = error.lines if isinstance(error, FaultsError) else [text]
        if known and all(line.isprintable() for line in lines):
            return "refused", text[:300]
        return "traceback", repr(error)[:300]
    except BaseException as error:  # noqa: BLE001  (also a panic of an extension)
        return "traceback", repr(error)[:300]
