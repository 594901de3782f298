"""What benchmarks/fuzz.py feeds with damaged files: seeds, and the function that reads.

A target is (kind, function folder -> seed files, function of one damaged file).
"""

import contextlib
import importlib
import importlib.util
import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np

TORCH = Path(__file__).parents[1] / "tests" / "data" / "torch"
TINY = dict(stage_sizes=(1, 2), num_filters=4)


def first_module(*names):
    """The first of these modules that there is, or None."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name):
                return importlib.import_module(name)
    return None


def read_weights(path):
    from ibsgl_jax import pretrained

    # A whole load takes a trace of the model: for a file that has changed little.
    tensors = pretrained.read_tensors(path)
    if any(name.endswith("layer2.1.bn2.bias") for name in tensors):
        pretrained.fill("resnet18", tensors, **TINY)


def _tensors():
    from ibsgl_jax import torch_files

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
    from ibsgl_jax import pretrained

    images = first_module("ibsgl_jax.images", "ibsgl_jax.app.images")
    images = images or first_module("ibsgl_jax.app.photos")
    images.prepare(images.read(path), pretrained.preprocessing("resnet18"))


def make_config(folder):
    from configs import default

    path = folder / "config.json"
    path.write_text(json.dumps(default.get_config().to_dict(), default=str))
    return [path]


def read_config(path):
    saved_run = first_module("train.run.saved_run", "train.saved_run")
    folder = path.parent / "run"
    folder.mkdir(exist_ok=True)
    path.replace(folder / "config.json")
    saved_run.choose_phases(saved_run.load_config(folder), ["plain"])


def make_model(folder):
    import jax

    from ibsgl_jax import models, pretrained, trained

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
    from ibsgl_jax import trained

    trained.load(trained.find(path))


def make_explanation(folder):
    path = folder / "explanation.json"
    about = {"format": "ibsgl explain 1", "written": {"a.png": 3}, "planned": ["b"]}
    path.write_text(json.dumps(about | {"scratch": [".a"], "photos": [{"file": "a"}]}))
    return [path]


def read_explanation(path):
    outputs = importlib.import_module("ibsgl_jax.app.outputs")
    path.replace(path.parent / outputs.MARKER)
    outputs.read_marker(path.parent)


def make_csv(folder):
    path = folder / "labels.csv"
    rows = "".join(f"{c}/{i}.jpg,{c},1,2,30,40\n" for c in "ab" for i in range(5))
    path.write_text("file,label,ymin,xmin,ymax,xmax\n" + rows)
    return [path]


def read_csv(path):
    labels_csv = importlib.import_module("train.data.labels_csv")
    path.replace(path.parent / "labels.csv")
    _, faults, notes = labels_csv.read(path.parent)
    if any("\n" in line or "\x1b" in line for line in (*faults, *notes)):
        raise AssertionError("a fault of more than one line")
    if faults:
        raise ValueError(faults[0])


TARGETS = (
    ("pth", make_pth, read_weights),
    ("pth_legacy", make_pth_legacy, read_weights),
    ("safetensors", make_safetensors, read_weights),
    ("npz", make_npz, read_weights),
    ("photo", make_photos, read_photo),
    ("config", make_config, read_config),
    ("model", make_model, read_model),
    *(
        [("explanation", make_explanation, read_explanation)]
        if first_module("ibsgl_jax.app.outputs")
        else []
    ),
    *([("csv", make_csv, read_csv)] if first_module("train.data.labels_csv") else []),
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
        known = type(error).__module__.startswith(("ibsgl_jax", "train"))
        plain = type(error) in (ValueError, SystemExit) or isinstance(error, OSError)
        if "MemoryError" in text or "Unable to allocate" in text:
            return "memory", text[:300]
        if (known or plain) and all(c.isprintable() for c in text):
            return "refused", text[:300]
        return "traceback", repr(error)[:300]
    except BaseException as error:  # noqa: BLE001  (also a panic of an extension)
        return "traceback", repr(error)[:300]
