"""Every script of benchmarks/ runs, on little; what it measures is not judged."""

import json
import re
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    against_torch,
    attribution,
    beside,
    folder,
    fuzz,
    growth,
    imputation,
    input,
    originals,
    pictures,
    quality,
    reach,
    resilience,
    step,
)
from configs import photos
from ibsgl_jax import models, pretrained
from ibsgl_jax.bottleneck import BottleneckConfig
from tests import tiny_run
from train.run.loop import train_and_evaluate


@pytest.mark.slow
def test_step(capsys):
    arguments = ["--quick", "--rounds", "1", "--variants", "guided_10", "--json"]
    assert step.main(arguments) == 0
    plain, guided = json.loads(capsys.readouterr().out)["rows"]
    assert plain["ratio"] == 1.0 and guided["convolutions"] == plain["convolutions"]


def test_attribution(capsys):
    arguments = ["--quick", "--rounds", "1", "--methods", "grad_cam", "--json"]
    assert attribution.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["images_per_second"] > 0 for row in rows) and len(rows) > 1


@pytest.mark.slow
def test_input(capsys):
    assert input.main(["--quick", "--seconds", "0.1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["input_per_step"] > 0


@pytest.mark.slow
def test_against_torch(monkeypatch, capsys):
    """Its own half; where there is no torch it says so."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert against_torch.main(["--quick"]) == 2
    assert capsys.readouterr().err.startswith("error: this needs torch")
    torch = types.SimpleNamespace(__version__="none", set_num_threads=lambda n: None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(
        against_torch, "torch_step", lambda *args, **options: lambda: time.sleep(0.01)
    )
    assert against_torch.main(["--quick", "--rounds", "1", "--json"]) == 0
    ours, *others = json.loads(capsys.readouterr().out)["rows"]
    assert ours["ours_over_it"] == [1.0, 1.0, 1.0] and len(others) == 2
    for other in others:
        expected = ours["seconds"] / other["seconds"]
        np.testing.assert_allclose(other["ours_over_it"], expected, rtol=1e-6)


def test_originals(tmp_path, monkeypatch, capsys):
    """A network that is its own original."""
    model = models.create("small_resnet", num_classes=3, num_filters=4)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    monkeypatch.setattr(pretrained, "fill", lambda name, tensors: (model, variables))
    functions = (
        models.make_features_fn(model, variables),
        models.make_head_fn(model, variables),
    )
    found = originals.explain(*functions, images)
    found["logits"] = jax.jit(model.apply)(variables, images)
    np.savez(tmp_path / "net.source.npz", images=images, **found)
    assert originals.main([str(tmp_path)]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| net | source |") and row.count("0e+00 |") >= 5


def test_of_a_run(photo_digits_dir, tmp_path, capsys):
    """reach, whose numbers have a meaning here already, and beside."""
    config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
    run = tmp_path / "run"
    train_and_evaluate(config, run, table=False)
    assert reach.main([str(run), "--limit", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.0 < found["elements at zero"] < 1.0 and 0.0 < found["of the step"] < 1.0
    assert found["fall, active"] > 0.0 and found["fall, felt"] != found["fall, all"]
    out = tmp_path / "beside.png"
    networks = [str(run / "plain")] * 2
    methods = ["--methods", "hirescam", "runner_up"]
    for more in ([], methods):
        assert beside.main([*networks, "--images", "2", "--out", str(out), *more]) == 0
        with Image.open(out) as picture:
            assert picture.size[0] > 5 * 100
    other = tiny_run.make_config(photo_digits_dir, phases=("plain",))
    other.test_split = "validation"
    tiny_run.save_untrained(other, tmp_path / "other")
    capsys.readouterr()
    for options, more, words in (
        (["--names", "one", "--images", "2"], [], "1 --names of 2 networks"),
        (["--images", "0"], [], "--images: 0 is not in"),
        (["--out", str(tmp_path / "no" / "x.png")], [], "in a folder that is there"),
        ([], [str(tmp_path / "other" / "plain")], "has other test images than"),
        ([], [str(run / "guided")], "no phase 'guided'"),
    ):
        assert beside.main(["--out", str(out), *options, *networks, *more]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("error:") == 1


def test_folder(tmp_path, monkeypatch, capsys):
    def make_config():
        config = get_config()
        config.model = "small_resnet"
        config.model_options = {"stage_sizes": (1,), "stage_strides": (2,)}
        config.plain.init = "random"
        return config

    get_config = photos.get_config
    monkeypatch.setattr(photos, "get_config", make_config)
    monkeypatch.setattr(folder, "SIZE", (40, 32))
    monkeypatch.setattr(folder, "DISTINCT", 20)
    monkeypatch.setattr(folder, "ROUNDS", 1)
    assert folder.main([str(tmp_path / "big"), "--pictures", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 40 and found["seconds_step"].keys() == {
        "cache",
        "memory",
    }


@pytest.mark.slow
def test_growth(monkeypatch, capsys):
    monkeypatch.setitem(growth.BASE, "filters", 4)
    assert growth.main(["--quick", "--rounds", "1"]) == 0
    assert capsys.readouterr().out


@pytest.mark.slow
def test_quality(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "NETWORKS", {"small_resnet": ("layer1_0", 1, 16)})
    monkeypatch.setattr(quality, "NUM_STATISTICS", 4)
    reference = BottleneckConfig(num_steps=3, num_samples=2)
    monkeypatch.setattr(quality, "REFERENCE", reference)
    preprocessing = pretrained.Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(pretrained, "preprocessing", lambda name: preprocessing)
    arguments = ["--quick", "--rounds", "1", "--cache", str(tmp_path)]
    assert quality.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| FAST | 8 |" in table and "| hirescam | 1 |" in table


def test_imputation(capsys):
    assert imputation.main(["--sizes", "16"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| pixels | hole |") and len(rows) == 6
    assert max(float(row.split("|")[-3]) for row in rows) < 1e-4


@pytest.mark.slow
def test_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "explain.png"
    assert pictures.main(["--method", "random", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_fuzz(tmp_path, capsys):
    arguments = ["--inputs", "4", "--kinds", "photo", "--json"]
    assert fuzz.main([*arguments, "--keep", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"] == 4 == sum(found["counts"]["photo"].values())


@pytest.mark.slow
def test_resilience(monkeypatch, capsys):
    shorter = re.sub(r"num_epochs = \d", "num_epochs = 1", resilience.CONFIG)
    monkeypatch.setattr(resilience, "CONFIG", shorter)
    assert resilience.main(["--quick", "--kills", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lost"] == 0 and found["rows"][0]["times"] == 1
