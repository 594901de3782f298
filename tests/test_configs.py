"""The real data sets' configurations, on tiny data of the real feature specifications.

Prepared as array_record by stand-ins of tfds's builders, read by name, trained for two
steps through the real loop; smaller are only the images and the networks.
"""

import functools
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import models, pretrained
from tests import tiny_run
from train import prepare, sweep
from train.data import dataset
from train.data.photo_textures import photo_textures_dataset_builder as photo_textures
from train.errors import ConfigError, DatasetError
from train.method.build import make_model, make_optimizer, make_step
from train.method.check import check_config
from train.method.state import create_state, state_options
from train.run import loop
from train.run.plan import plan_phases
from train.run.start import initial_state
from train.run.stop import Stop

ROOT = Path(__file__).parents[1]
SMALL_RESNET = {"stage_sizes": (1, 1), "num_filters": 4}
SMALL_VGG = {"stage_widths": (4, 4, 8, 8, 8), "dense_features": 16}
# config: (what is made smaller in the network, image size)
CONFIGS = {
    "imagenet_resnet50": (SMALL_RESNET, 64),
    "imagenet_vgg16": (SMALL_VGG, 64),
    "cifar10_resnet18": (SMALL_RESNET, 32),
    "cub_resnet50": (SMALL_RESNET, 64),
    "pets_resnet50": (SMALL_RESNET, 64),
}


def encode(array, format):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


SWEEPS = sorted(
    path
    for path in (ROOT / "configs" / "sweeps").glob("*.py")
    if path.stem not in ("__init__", "variants")
)


def features_of(name):
    """The feature specification of the real builder, as far as it is public."""
    import tensorflow_datasets as tfds

    f = tfds.features
    jpeg = f.Image(encoding_format="jpeg")
    mask = f.Image(shape=(None, None, 1))
    return {
        "imagenet2012": {
            "image": jpeg,
            "label": f.ClassLabel(num_classes=1000),
            "file_name": f.Text(),
        },
        "cifar10": {
            "id": f.Text(),
            "image": f.Image(shape=(32, 32, 3)),
            "label": f.ClassLabel(num_classes=10),
        },
        "caltech_birds2011": {
            "image": f.Image(),
            "image/filename": f.Text(),
            "label": f.ClassLabel(num_classes=200),
            "label_name": f.Text(),
            "bbox": f.BBoxFeature(),
            "segmentation_mask": mask,
        },
        "oxford_iiit_pet": {
            "image": f.Image(),
            "label": f.ClassLabel(num_classes=37),
            "species": f.ClassLabel(num_classes=2),
            "file_name": f.Text(),
            "segmentation_mask": f.Image(shape=(None, None, 1), use_colormap=True),
            "head_bbox": f.BBoxFeature(),
        },
    }[name]


def examples(name, num):
    import tensorflow_datasets as tfds

    generator = np.random.default_rng(0)
    features = features_of(name)
    for i in range(num):
        size = (32, 32) if name == "cifar10" else tuple(generator.integers(80, 140, 2))
        image = generator.integers(0, 256, (*size, 3), np.uint8)
        mask = np.full(size, 2 if "pet" in name else 51, np.uint8)
        mask[size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4] = (
            1 if "pet" in name else 204
        )
        if "pet" in name:
            mask[: size[0] // 8] = 3
        known = {
            "image": encode(image, "png" if name == "cifar10" else "jpeg"),
            "label": i % 10,
            "species": i % 2,
            "bbox": tfds.features.BBox(0.2, 0.2, 0.8, 0.8),
            "head_bbox": tfds.features.BBox(0.3, 0.3, 0.5, 0.5),
            "segmentation_mask": encode(mask, "png"),
        }
        yield f"{i}", {key: known.get(key, f"{key} {i}") for key in features}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The four data sets with 40 examples for training and 8 for each other split."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("real")
    splits = {"imagenet2012": ("validation",)}
    for dataset_name in (
        "imagenet2012",
        "cifar10",
        "caltech_birds2011",
        "oxford_iiit_pet",
    ):

        class StandIn(
            tfds.core.GeneratorBasedBuilder, skip_registration=True
        ):  # under the real name, which only the registry would refuse
            name = dataset_name
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features_of(self.name)),
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(40),
                    **{
                        split: self._generate_examples(8)
                        for split in splits.get(self.name, ("test",))
                    },
                }

            def _generate_examples(self, num):
                return examples(self.name, num)

        StandIn(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def make_config(name, data_dir):
    config = importlib.import_module(f"configs.{name}").get_config()
    check_config(config)  # as it is, before anything is made smaller
    options, size = CONFIGS[name]
    with config.unlocked():
        config.model_options.update(options)
    config.data_dir = str(data_dir)
    config.image_size = size
    config.batch_size = 16
    config.train_split = "train[:80%]"
    if "train" in config.validation_split:
        config.validation_split = "train[80%:]"
    config.num_threads = 1
    config.num_workers = 0
    config.phases = ("guided",)
    config.guided.init = "random"
    config.guided.num_epochs = 1.0
    config.guided.warmup_epochs = 0.0
    config.guided.bottleneck.num_steps = 2
    config.guided.bottleneck.num_samples = 1
    config.progress = False
    config.tensorboard = False
    return config


def _quick(name):
    """One with boxes and masks and one without stand for the others."""
    slow = name not in ("cifar10_resnet18", "cub_resnet50")
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


class TestConfigs:
    @pytest.mark.parametrize("name", [_quick(name) for name in CONFIGS])
    def test_trains_two_steps_through_the_real_path(self, name, data_dir, tmp_path):
        config = make_config(name, data_dir)
        check_config(config)
        data = dataset.load_data(config)
        example = data.train[0]
        assert ("bbox" in example) == (name == "cub_resnet50")
        assert ("mask" in example) == (name in ("cub_resnet50", "pets_resnet50"))
        if "mask" in example:
            # The inner half each way, whatever the values of the rest are.
            assert 0.2 < np.mean(example["mask"]) < 0.3
        (plan,) = plan_phases(config, data)
        state, _ = loop.train_phase(config, plan, {}, data, tmp_path, Stop())
        assert int(state.step) == 2
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
        chex.assert_type(jax.tree.leaves(state.params), np.float32)
        assert (tmp_path / "checkpoints" / "guided" / "2").is_dir()


class TestTextures:
    @pytest.mark.parametrize(
        "name", ["textures", "textures_efficientnet", "textures_vgg16"]
    )
    def test_asks_for_data_that_there_are(self, name):
        config = importlib.import_module(f"configs.{name}").get_config()
        check_config(config)
        data = photo_textures.make_config(**config.dataset_options)
        assert data.image_size == config.image_size
        assert data.num_train >= config.batch_size

    def test_is_the_quickstart_but_for_the_data(self):
        config = importlib.import_module("configs.textures").get_config()
        expected = importlib.import_module("configs.quickstart").get_config()
        assert config.dataset == "photo_textures/independent"
        expected.dataset = config.dataset
        assert config.to_dict() == expected.to_dict()

    def test_efficientnet_has_the_pooled_shortcut_and_the_weights_pixels(self):
        config = importlib.import_module("configs.textures_efficientnet").get_config()
        model = make_model(config, 8)
        images = np.zeros((1, config.image_size, config.image_size, 3), np.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        head_fn = models.make_head_fn(model, variables)
        assert isinstance(head_fn, models.PooledLinear)
        assert head_fn.kernel.shape == (1280, 8)
        rules = pretrained.preprocessing(config.model)
        assert tuple(config.image_mean) == rules.mean
        assert tuple(config.image_std) == rules.std

    def test_vgg_has_the_pixels_of_the_edge_detector(self):
        config = importlib.import_module("configs.textures_vgg16").get_config()
        assert make_model(config, 8).dense_features == 256
        rules = pretrained.preprocessing(config.model, "edges.h5")
        np.testing.assert_allclose(config.image_mean, rules.mean, atol=1e-4)
        assert tuple(config.image_std) == rules.std


class TestPretrained:
    def test_phase_starts_from_the_file_but_for_another_head(
        self, photo_digits_dir, tmp_path, monkeypatch
    ):
        """Weights of 5 classes into a network of 10: all layers but the last."""
        config = tiny_run.make_guided_config(photo_digits_dir)
        config.guided.init = "pretrained"
        config.pretrained = "weights.pth"
        other = make_model(config, 5)
        images = np.zeros((1, 48, 48, 3), np.float32)
        variables = other.init(jax.random.key(3), images)
        asked = []

        def start(name, path, **options):
            asked.append((name, path, options))
            rules = pretrained.Preprocessing(48, 48, (0.5,) * 3, (0.25,) * 3)
            return pretrained.Start(variables, (), rules)

        monkeypatch.setattr(pretrained, "start", start)
        model = make_model(config, 10)
        tx = make_optimizer(config.optimizer, lambda step: 0.1)
        state = initial_state(config, config.guided, {}, model, tx)
        options = config.model_options.to_dict()
        assert asked == [("small_resnet", "weights.pth", options)]
        for layer in variables["params"]:
            if layer != "fc":
                chex.assert_trees_all_equal(
                    state.params[layer], variables["params"][layer]
                )
        assert state.params["fc"]["kernel"].shape[1] == 10
        config.model_options.num_filters = 4
        model = make_model(config, 10)
        with pytest.raises(ConfigError, match="does not fit small_resnet"):
            initial_state(config, config.guided, {}, model, tx)


class TestPrepare:
    def test_says_what_lies_there(self, data_dir):
        text = prepare.prepare("cifar10", data_dir)
        assert text.startswith("cifar10 is prepared in") and "\n" not in text

    def test_says_what_is_missing(self, tmp_path):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "train.prepare",
                "cifar10",
                f"--data_dir={tmp_path}",
            ],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "needs TensorFlow" in line and "pip install tensorflow-cpu" in line

    def test_tells_what_the_embedded_sets_are_called(self, tmp_path):
        with pytest.raises(DatasetError, match="has no config 'nonsense'"):
            prepare.prepare("photo_digits/nonsense", tmp_path)

    def test_names_the_files_to_fetch_by_hand(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(DatasetError, match="ILSVRC2012_img_train.tar"):
            prepare.prepare("imagenet2012", tmp_path)


def _is_long(name):
    """Of the sweeps that take seconds to trace, one is traced by default."""
    return name not in ("teachers", "average")


class TestSweeps:
    @pytest.mark.parametrize(
        "path",
        [
            pytest.param(p, marks=pytest.mark.slow if _is_long(p.stem) else ())
            for p in SWEEPS
        ],
        ids=lambda path: path.stem,
    )
    def test_every_phase_can_take_a_step(self, path):
        """Traced only: the states fit the steps, the fields are known, names agree."""
        module = sweep.load_module(path)
        config = module.get_config()
        check_config(config)
        named = {module.CONTROL, *module.CONTROLS, *module.CONTROLS.values()}
        assert named | set(module.FINAL or ()) <= set(config.phases)
        model = make_model(config, 10)
        tx = make_optimizer(config.optimizer, lambda step: 1e-3)
        side = config.image_size
        batch = {
            "image": jax.ShapeDtypeStruct((2, side, side, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((2,), np.int32),
            "mask": jax.ShapeDtypeStruct((2, side, side), np.uint8),
        }

        @functools.cache
        def state_of(options):
            return jax.eval_shape(
                lambda: create_state(jax.random.key(0), model, tx, **dict(options))
            )

        for name in config.phases:
            phase = config[name]
            state = state_of(tuple(state_options(config, phase).items()))
            step = make_step(
                config, phase, 100, generation=0, model=model, tx=tx, axis_name=None
            )
            frozen = phase.get("teacher") in config.phases
            after, _ = jax.eval_shape(
                step, state, batch, *([state.variables] if frozen else [])
            )
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
