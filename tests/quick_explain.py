"""``ibsgl explain`` without a network and plots, for tests of what it does to files."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ibsgl_jax import pretrained
from ibsgl_jax.app import classifier, cli, drawing
from ibsgl_jax.app import explain as explaining

CLASS_NAMES = ("red", "green", "blue")
PREPROCESSING = pretrained.Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3)


def picture(software=drawing.SOFTWARE, size=(9, 9)):
    """A small PNG, signed as ours."""
    file, info = io.BytesIO(), PngInfo()
    if software:
        info.add_text("Software", software)
    Image.new("RGB", size, "white").save(file, "PNG", pnginfo=info)
    return file.getvalue()


def make_explain_fn(methods, *unused):
    """Logits are the mean colours; a map is the red channel."""

    def explain_fn(pixels):
        logits = pixels.mean(axis=(1, 2))
        maps = {method: pixels[..., 0] for method in methods}
        return logits, logits.argmax(axis=-1), maps

    return explain_fn


@pytest.fixture
def quick(monkeypatch, capsys, tmp_path):
    """quick(*arguments, methods=) -> (status, stdout, stderr), in tmp_path."""
    loaded = classifier.Classifier(
        "tiny", None, {}, CLASS_NAMES, PREPROCESSING, weights_path=None
    )
    monkeypatch.setattr(classifier, "load", lambda *names, **files: loaded)
    monkeypatch.setattr(classifier, "split", lambda *arguments: (None, None))
    monkeypatch.setattr(explaining, "make_explain_fn", make_explain_fn)
    monkeypatch.setattr(drawing, "overlay", lambda panel, *, title: picture())
    monkeypatch.setattr(drawing, "contact_sheet", lambda rows: picture())
    monkeypatch.chdir(tmp_path)

    def run(*arguments, methods="grad_cam"):
        arguments = ["explain", *map(str, arguments), "--method", methods]
        status = cli.main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, captured.err
        return status, captured.out, captured.err

    return run


def save_photo(path, colour="red", size=(12, 10), **options):
    """A photo of one colour; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def explanation(folder):
    """The JSON of a folder of results."""
    return json.loads((folder / "explanation.json").read_text())


def snapshot(folder):
    """Every file's contents and every link's target, by path."""
    return {
        str(path.relative_to(folder)): (
            path.readlink() if path.is_symlink() else path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def check_maps(folder, methods=("grad_cam",)):
    """``maps.npz`` has one whole map for each photo of the JSON."""
    photos = explanation(folder)["photos"]
    with np.load(folder / "maps.npz") as maps:
        assert set(maps.files) == set(methods)
        for method in methods:
            assert maps[method].shape == (len(photos), 8, 8)
            assert maps[method].dtype == np.float32
    for photo in photos:
        assert set(photo["files"]) == set(methods)
        for name in photo["files"].values():
            Image.open(folder / name).verify()
    return len(photos)
