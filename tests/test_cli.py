"""The command line: what it writes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import attribution, feature_stats, images, models
from ibsgl_jax.app import classifier, cli, stats_cache
from ibsgl_jax.app import explain as explaining
from ibsgl_jax.bottleneck import BottleneckConfig
from tests.quick_explain import explanation
from tests.test_images import gradient_image
from tests.tiny_classifier import (
    CLASS_NAMES,
    PREPROCESSING,
    loaded_fixture,  # noqa: F401
    photos_fixture,  # noqa: F401
    run_fixture,  # noqa: F401
)


class TestExplain:
    def test_writes_everything(self, run, photos, loaded, tmp_path):
        out = tmp_path / "out"
        status, stdout, stderr = run(
            "explain",
            photos,
            "--out",
            out,
            "--chunk-size",
            2,
            "--method",
            "ib,hirescam",
        )
        assert status == 0 and "3 photos explained" in stdout
        assert "warning: feature statistics come from 3 of your own" in stderr
        result = explanation(out)
        assert [photo["path"] for photo in result["photos"]] == [
            str(photos / f"photo{i}.png") for i in range(3)
        ]
        pictures = {"contact_sheet.png"}
        for photo in result["photos"]:
            pictures |= set(photo["files"].values())
            assert len(photo["predicted"]) == 5
            assert photo["class"] == photo["predicted"][0]
            assert photo["class"]["name"] == CLASS_NAMES[photo["class"]["index"]]
        written = {path.name for path in out.iterdir()}
        assert written == pictures | {"maps.npz", "explanation.json"}
        for name in pictures:
            with Image.open(out / name) as picture:
                assert min(picture.size) > 300

        # The maps are attribute's own, to rounding over the blocks' sizes.
        prepared = np.stack(
            [
                images.prepare(images.read(path), PREPROCESSING).pixels
                for path in sorted(photos.iterdir())
            ]
        )
        features_fn = models.make_features_fn(loaded.model, loaded.variables)
        head_fn = models.make_head_fn(loaded.model, loaded.variables)

        @jax.jit
        def expect(pixels):
            features = features_fn(pixels)
            state = feature_stats.init(features.shape[1:])
            moments = feature_stats.moments(feature_stats.update(state, features))
            make_fn = attribution.make_attribution_fn
            config = BottleneckConfig(num_steps=20)  # for a pooled linear head
            options = dict(key=jax.random.key(0), moments=moments, config=config)
            return {
                "hirescam": make_fn("hirescam", features_fn, head_fn)(pixels),
                "ib": make_fn("ib", features_fn, head_fn, **options)(pixels),
            }

        expected = expect(prepared)
        with np.load(out / "maps.npz") as maps:
            assert set(maps.files) == set(expected)
            for method, value in expected.items():
                np.testing.assert_allclose(
                    maps[method], value, rtol=0, atol=1e-4 * float(jnp.max(value))
                )

    @pytest.mark.parametrize(
        "given, index", [("4", 4), ("Black CAT", 4), ("tabby", 5), ("green", 1)]
    )
    def test_class_by_number_or_name(self, run, photos, tmp_path, given, index):
        status, _, _ = run(
            *("explain", photos / "photo0.png", "--method", "grad_cam"),
            *("--class", given, "--out", tmp_path),
        )
        assert status == 0
        assert explanation(tmp_path)["photos"][0]["class"]["index"] == index

    @pytest.mark.slow
    def test_layer_changes_the_maps(self, run, photos, tmp_path):
        maps = {}
        for layer in ("layer1_0", "layer2_0"):
            status, _, _ = run(
                *("explain", photos, "--method", "hirescam", "--layer", layer),
                *("--out", tmp_path / layer),
            )
            assert status == 0
            maps[layer] = np.load(tmp_path / layer / "maps.npz")["hirescam"]
            assert explanation(tmp_path / layer)["layer"] == layer
        assert not np.allclose(maps["layer1_0"], maps["layer2_0"])

    def test_every_method(self, run, photos, tmp_path):
        methods = ",".join(set(attribution.METHODS) - {"ib"})
        status, _, _ = run(
            *("explain", photos / "photo0.png", "--method", methods),
            *("--fit", "squash", "--out", tmp_path / "out"),
        )
        assert status == 0
        with np.load(tmp_path / "out" / "maps.npz") as maps:
            assert set(maps.files) == set(methods.split(","))
            for values in maps.values():
                assert np.all(np.isfinite(values)) and np.max(values) > 0

    def test_same_names_do_not_overwrite(self, run, photos, tmp_path):
        (photos / "other").mkdir()
        (photos / "photo0.png").rename(photos / "other" / "photo1.png")
        run("explain", photos, "--method", "grad_cam", "--out", tmp_path / "out")
        files = [
            p["files"]["grad_cam"] for p in explanation(tmp_path / "out")["photos"]
        ]
        assert len(set(files)) == 3
        assert all((tmp_path / "out" / file).exists() for file in files)

    def test_many_photos_take_several_sheets(self, run, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(explaining, "SHEET_ROWS", 2)
        run("explain", photos, "--method", "random", "--out", tmp_path / "out")
        sheets = sorted(p.name for p in (tmp_path / "out").glob("contact_sheet*"))
        assert sheets == ["contact_sheet.png", "contact_sheet_2.png"]


class TestStatistics:
    @pytest.mark.slow
    def test_are_remembered_beside_the_weights(
        self, run, photos, loaded, tmp_path, monkeypatch
    ):
        weights = tmp_path / "weights" / "net.npz"
        weights.parent.mkdir()
        beside = loaded._replace(weights_path=weights)
        monkeypatch.setattr(classifier, "load", lambda *names, **files: beside)
        explain = ("explain", photos / "photo0.png", "--method", "ib")

        def maps_of(name, *more):
            status, _, stderr = run(*explain, "--out", tmp_path / name, *more)
            assert status == 0
            return np.load(tmp_path / name / "maps.npz")["ib"], stderr

        measured, stderr = maps_of("first", "--stats", photos)
        assert "statistics of 3 of 3 photos" in stderr and "warning" not in stderr
        (cache,) = weights.parent.iterdir()
        assert (
            cache.name.endswith(".stats.npz")
            and not (tmp_path / "cache" / "ibsgl_jax").exists()
        )

        again, stderr = maps_of("again", "--stats", photos)
        assert "remembered" in stderr and "statistics of 3" not in stderr
        np.testing.assert_array_equal(again, measured)
        without, stderr = maps_of("without")
        assert "remembered" in stderr and "warning" not in stderr
        np.testing.assert_array_equal(without, measured)
        assert "remembered" in explanation(tmp_path / "without")["feature_statistics"]

        # Another photo in the folder, or a damaged file: measured anew.
        Image.fromarray(gradient_image()).save(photos / "new.png")
        changed, stderr = maps_of("changed", "--stats", photos)
        assert "statistics of 4 of 4 photos" in stderr
        assert not np.allclose(changed, measured)
        cache.write_bytes(b"damaged")
        mended, stderr = maps_of("mended", "--stats", photos)
        assert "statistics of 4 of 4 photos" in stderr
        np.testing.assert_array_equal(mended, changed)
        # Another layer has statistics of its own.
        here, elsewhere = (
            stats_cache._places(beside, layer, "crop") for layer in (None, "layer1_0")
        )
        assert stats_cache._read(here) and stats_cache._read(elsewhere) is None

    @pytest.mark.slow
    def test_go_to_the_cache_folder_else(self, run, photos, tmp_path):
        (photos / "text.jpg").write_text("no image")
        status, _, stderr = run(
            *("explain", photos / "photo0.png", "--method", "ib"),
            *("--stats", photos, "--out", tmp_path / "out"),
        )
        assert status == 0 and "left out of the statistics" in stderr
        assert list((tmp_path / "cache" / "ibsgl_jax").glob("*.stats.npz"))

    def test_nobodys_file_is_written_over(self, loaded, tmp_path):
        beside = loaded._replace(weights_path=tmp_path / "net.npz")
        own, shared = stats_cache._places(beside, None, "crop")
        shared = tmp_path / "cache" / shared.name
        moments = feature_stats.Moments(*np.ones((3, 2, 2, 4), np.float32))
        own.write_text("precious")
        stats_cache._write([own, shared], "print", "a folder", moments)
        assert own.read_text() == "precious" and stats_cache._kept(shared)
        shared.rename(tmp_path / "real")
        shared.symlink_to("../real")
        before = (tmp_path / "real").read_bytes()
        own.unlink()
        stats_cache._write([shared, own], "other", "a folder", moments)
        assert shared.is_symlink() and (tmp_path / "real").read_bytes() == before
        assert stats_cache._kept(own)[0] == "other"


class TestModels:
    def test_names(self, capsys):
        assert cli.main(["models"]) == 0
        assert capsys.readouterr().out.split() == list(models.MODELS)

    def test_layers(self, capsys):
        assert cli.main(["models", "--layers", "resnet18"]) == 0
        lines = capsys.readouterr().out.splitlines()
        shapes = dict(re.split("  +", line) for line in lines)
        assert shapes["conv1"] == "112 x 112 x 64"
        assert shapes["layer4_1"] == "7 x 7 x 512"

    def test_unknown(self, capsys):
        assert cli.main(["models", "--layers", "resnet5"]) == 2
        assert "nearest names: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def pretrained_result(tmp_path_factory):
    """EfficientNet-Lite0 with its published weights on two of scikit-image's photos."""
    import skimage.data

    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    arguments = ["explain", str(folder), "--method", "ib,grad_cam"]
    with pytest.MonkeyPatch.context() as patch:
        # No statistics that an earlier run may have left.
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert cli.main([*arguments, "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.slow
class TestPretrained:
    def test_the_cat_is_a_cat_and_the_cup_an_espresso(self, pretrained_result):
        cat, cup = explanation(pretrained_result)["photos"]
        assert 281 <= cat["class"]["index"] <= 285 and "cat" in cat["class"]["name"]
        assert cup["class"]["index"] == 967 and cup["class"]["name"] == "espresso"
        assert cup["class"]["probability"] > 0.8

    def test_the_maps_look_at_the_coffee(self, pretrained_result):
        # The cup is in the upper middle of the crop, the empty corners below.
        with np.load(pretrained_result / "maps.npz") as maps:
            for method in ("ib", "grad_cam"):
                cup = maps[method][1]
                inside = cup[20:140, 40:180].mean()
                corners = np.mean([cup[170:, :50].mean(), cup[170:, 174:].mean()])
                assert inside > 3 * corners
