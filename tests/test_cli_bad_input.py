"""The command line: one line for everything that goes wrong."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import feature_stats, models, trained
from ibsgl_jax.app import classifier, cli
from tests.quick_explain import explanation
from tests.test_images import black_png, gradient_image, jpeg_bytes
from tests.tiny_classifier import (
    PREPROCESSING,
    loaded_fixture,  # noqa: F401
    photos_fixture,  # noqa: F401
    run_fixture,  # noqa: F401
)


class TestBadInput:
    def test_bad_photos_do_not_stop_the_good_ones(self, run, photos, tmp_path):
        bad = {
            "missing.jpg": None,
            "cut.jpg": jpeg_bytes(gradient_image(600, 400))[:2000],
            "text.jpg": b"dear diary, this is no image",
            "empty.jpg": b"",
            "bomb.png": black_png(20_000),
        }
        odd = {
            "one.png": Image.new("RGB", (1, 1), "red"),
            "cmyk.jpg": Image.fromarray(gradient_image()).convert("CMYK"),
            "deep.png": Image.fromarray(np.full((30, 30), 40_000, np.uint16)),
        }
        for name, content in bad.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
        for name, image in odd.items():
            image.save(tmp_path / name)
        names = sorted([*bad, *odd])  # good and bad ones mixed
        out = tmp_path / "out"
        status, stdout, stderr = run(
            *("explain", *(tmp_path / name for name in names), photos / "photo0.png"),
            *("--method", "grad_cam", "--chunk-size", 2, "--out", out),
        )
        assert status == 2 and "4 photos explained" in stdout
        result = explanation(out)
        done = {photo["path"].rsplit("/", 1)[1] for photo in result["photos"]}
        assert done == {*odd, "photo0.png"}
        # The list at the end: one line for each, and nothing after it.
        heading, *lines = stderr[stderr.index("ibsgl: 5 not explained") :].splitlines()
        assert len(lines) == 5 == len(result["failed"])
        for name in bad:
            assert sum(f"/{name}: " in line for line in lines) == 1
        # The block's other photo does not change a map.
        alone = tmp_path / "alone"
        run("explain", tmp_path / "one.png", "--method", "grad_cam", "--out", alone)
        at = [p["path"].endswith("one.png") for p in result["photos"]].index(True)
        np.testing.assert_allclose(
            np.load(out / "maps.npz")["grad_cam"][at],
            np.load(alone / "maps.npz")["grad_cam"][0],
            rtol=1e-4,
            atol=1e-6,
        )

    @pytest.mark.parametrize(
        "arguments, line",
        [
            (("--method", "gradcam"), "no method 'gradcam'; nearest names: .*grad_cam"),
            (("--method", ","), "--method: give at least one"),
            (("--class", "6"), "class 6 is out of range: the model's classes are 0 to"),
            (("--class", "-1"), "class -1 is out of range"),
            (("--class", "dragon"), "no such class"),
            (("--class", "cat"), "several classes.*black cat, tabby cat"),
            (("--layer", "layer2"), "no layer 'layer2'; nearest names: layer2_0"),
            (("--stats", "/nowhere", "--method", "ib"), "--stats /nowhere: no such"),
            (("--chunk-size", "0"), "--chunk-size: '0' must be a whole number, 1 to"),
            (("--out", "{file}/out"), "cannot write there"),
        ],
    )
    def test_options(self, run, photos, tmp_path, arguments, line):
        file = tmp_path / "file"
        file.touch()
        arguments = [argument.format(file=file) for argument in arguments]
        if "--out" not in arguments:
            arguments += ["--out", tmp_path / "out"]
        if "--method" not in arguments:
            arguments += ["--method", "grad_cam"]
        status, _, stderr = run("explain", photos / "photo0.png", *arguments)
        assert status == 2
        (last,) = stderr.splitlines()
        assert last.startswith("ibsgl: ")
        assert re.search(line, last)

    @pytest.mark.parametrize("method", ["grad_cam", "ib"])
    def test_nan_weights(self, run, photos, loaded, tmp_path, monkeypatch, method):
        def spoil(path, leaf):
            name = jax.tree_util.keystr(path)
            return leaf * np.nan if "conv1" in name else leaf

        spoilt = loaded._replace(
            variables=jax.tree_util.tree_map_with_path(spoil, loaded.variables)
        )
        monkeypatch.setattr(classifier, "load", lambda *names, **files: spoilt)
        status, _, stderr = run(
            *("explain", photos, "--method", method, "--out", tmp_path / "out")
        )
        assert status == 2
        assert "damaged weights" in stderr or "weights with NaN" in stderr

    def test_nothing_left_to_explain(self, run, tmp_path):
        status, _, stderr = run("explain", tmp_path / "a.jpg", tmp_path / "*.png")
        assert status == 2
        assert "no photo to explain" in stderr
        assert "a.jpg: no such file" in stderr and "*.png: no file matches" in stderr

    def test_checkpoint_of_a_training_run(self, photos, tmp_path, capsys):
        model = models.create("small_resnet", num_classes=4)
        image = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
        variables = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, 0.1),
            jax.eval_shape(model.init, jax.random.key(0), image),
        )
        stats = feature_stats.update(
            feature_stats.init((8, 8, 64)),
            jax.random.uniform(jax.random.key(0), (4, 8, 8, 64)),
        )
        trained.save(
            tmp_path / "run" / "models" / "guided.npz",
            variables,
            model_name="small_resnet",
            model_options={},
            num_classes=4,
            preprocessing=PREPROCESSING,
            class_names=["one", "two", "three", "four"],
            stats=stats,
        )
        status = cli.main(
            ["explain", str(photos / "photo0.png"), "--method", "ib,hirescam"]
            + ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
        )
        assert status == 0, capsys.readouterr().err
        told = explanation(tmp_path / "out")
        assert told["model"] == "small_resnet (guided)"
        assert told["feature_statistics"] == "the model's training"
        assert told["photos"][0]["class"]["name"] in ("one", "two", "three", "four")
        assert np.load(tmp_path / "out" / "maps.npz")["ib"].shape == (1, 48, 48)

    @pytest.mark.parametrize(
        "arguments, line",
        [
            (("--model", "resnet5"), "no model 'resnet5'; nearest names: .*resnet50"),
            (("--model", "small_resnet"), "no pretrained weights for 'small_resnet'"),
            (("--model", "resnet18"), "no weights of resnet18 are installed: .*give"),
            (("--weights", "{folder}/none.npz"), "none.npz: No such file"),
            (("--weights", "{folder}/w.npz"), "w.npz: .*not weights of efficientnet"),
            (("--weights", "{folder}/w.txt"), "weights end in"),
            (("--checkpoint", "{folder}/run"), "run: no such file or folder"),
            (("--checkpoint", "{folder}"), "no finished run of `python -m train`"),
        ],
    )
    def test_weights(self, photos, tmp_path, capsys, arguments, line):
        np.savez(tmp_path / "w.npz", conv=np.zeros(3))
        (tmp_path / "w.txt").touch()
        arguments = [argument.format(folder=tmp_path) for argument in arguments]
        status = cli.main(
            ["explain", str(photos), "--out", str(tmp_path / "out"), *arguments]
        )
        (last,) = capsys.readouterr().err.splitlines()
        assert status == 2 and last.startswith("ibsgl: ")
        assert re.search(line, last)

    def test_as_a_command(self, tmp_path):
        command = [sys.executable, "-m", "ibsgl_jax", "explain", "missing.jpg"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "ibsgl: no photo to explain:",
            "  missing.jpg: no such file",
        ]
