"""A model of one's own, "package.module:Class": trained, measured, explained."""

import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import photos
from ibsgl_jax import models, trained
from ibsgl_jax.app import cli
from tests import pictures
from tests.own_nets import SOURCE
from train import evaluate
from train.errors import ConfigError
from train.method import build
from train.run import loop, saved_run


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The folder of own_net.py, which can be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_net.py").write_text(SOURCE)
    (folder / "own_broken.py").write_text("import nothing_of_this_name")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_net", None)


def make_config(folder, name="Net"):
    config = photos.get_config()
    config.data, config.model = str(folder), f"own_net:{name}"
    config.model_options.width = 6
    config.image_size, config.batch_size = 32, jax.device_count()
    config.augment, config.fit, config.eval_transform = "shift", "squash", "none"
    config.phases = ("head", "guided")
    config.head.init = "random"
    config.head.num_epochs = config.guided.num_epochs = 1.0
    config.guided.bottleneck.num_steps = 2
    config.guided.every = 1
    config.tensorboard = config.progress = False
    config.picture_rows = 1
    return config


ADAPTED = [
    pytest.param("Compact", "act", marks=pytest.mark.slow),
    pytest.param("OfNNX", "", marks=pytest.mark.slow),
    ("OfNNX", "blocks/1"),
]


class TestAdapted:
    @pytest.mark.parametrize("name, tap", ADAPTED)
    def test_trains_and_is_read_back(self, name, tap, module, tmp_path):
        folder = pictures.fill(tmp_path / "photos", number=16)
        config = make_config(folder, name)
        config.tap, config.guided.teacher_layer = tap, "2x"
        # Not clipped: the tapped layer of the last has no ReLU behind it.
        config.guided.guidance.rectify_features = tap != "blocks/1"
        outcome = loop.train_and_evaluate(config, tmp_path / "run", table=False)
        state = jax.device_get(outcome["guided"][0])
        head = jax.device_get(outcome["head"][0])
        for branch in ("norm", "blocks" if "NNX" in name else "second", "last"):
            before, after = head.params[branch], state.params[branch]
            with pytest.raises(AssertionError):  # all of it has moved
                chex.assert_trees_all_equal(before, after)
        kept = trained.load(tmp_path / "run" / "models" / "guided.npz")
        chex.assert_trees_all_equal(kept.variables, state.variables)
        images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
        images = images.astype(np.float32)
        features = kept.model.apply(kept.variables, images, method="features")
        np.testing.assert_allclose(
            kept.model.apply(kept.variables, features, method="head"),
            kept.model.apply(kept.variables, images),
            atol=1e-6,
        )

    def test_a_tapped_module_steps_as_one_with_methods(self, module):
        """The same variables, gradients and batch statistics."""
        whole = models.create("own_net:Net", num_classes=2)
        tapped = models.create(
            "own_net:Compact", num_classes=2, tap="act", image_size=16
        )
        images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
        images = images.astype(np.float32)
        variables = whole.init(jax.random.key(0), images)
        chex.assert_trees_all_equal_shapes(
            variables, tapped.init(jax.random.key(0), images)
        )

        @functools.partial(jax.jit, static_argnums=0)
        def step(model, variables):
            def loss(params):
                inputs = {**variables, "params": params}
                features, updated = model.apply(
                    inputs, images, True, method="features", mutable=["batch_stats"]
                )
                logits = model.apply(inputs, features, True, method="head")
                return jnp.sum(jnp.sin(logits)), (features, updated)

            return jax.grad(loss, has_aux=True)(variables["params"])

        chex.assert_trees_all_close(
            step(tapped, variables), step(whole, variables), atol=1e-5
        )

    def test_the_end_of_a_rematerialised_block_is_tapped(self, module):
        model = models.create(
            "own_net:Hidden", num_classes=2, tap="block", image_size=16
        )
        images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
        images = images.astype(np.float32)
        variables = model.init(jax.random.key(0), images)

        @jax.jit
        def halves(variables):
            features, _ = model.apply(
                variables, images, True, method="features", mutable=["batch_stats"]
            )
            return features, model.apply(variables, features, True, method="head")

        features, logits = halves(variables)
        assert features.shape == (4, 8, 8, 4)
        np.testing.assert_allclose(logits, model.apply(variables, images), atol=1e-6)
        gradient = jax.grad(lambda v: jnp.sum(halves(v)[1]))(variables)["params"]
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))

    def test_the_librarys_own_models_are_tapped_too(self):
        model = models.create(
            "small_vit", num_classes=2, tap="block_1", image_size=48, depth=2
        )
        assert model.signed_features
        assert not models.create(
            "resnet18", num_classes=2, tap="layer2_1", image_size=32
        ).signed_features
        with pytest.raises(TypeError, match="takes no argument 'width'"):
            models.create(
                "resnet18", num_classes=2, tap="layer2_1", image_size=32, width=3
            )
        with pytest.raises(ValueError, match="tap='layer2_1' asks for image_size"):
            models.create("resnet18", num_classes=2, tap="layer2_1")

    def test_what_learns_with_the_head_alone(self, module):
        config = make_config("photos", "OfNNX")
        model = build.make_model(config, 2)
        assert build.learning_layers(config, config.head, model) == ("last",)

    @pytest.mark.parametrize(
        "name, tap, words",
        [
            ("Compact", "", "Compact has no method features"),
            ("Compact", "atc", "no layer 'atc'; nearest names: act"),
            ("Hidden", "block/second", "layer 'block/second' runs inside nn.rem"),
            ("WithState", "", "WithState.seen is a Variable; nnx.Param and"),
            ("Rngless", "", "Rngless has no attribute rngs"),
        ],
    )
    def test_what_cannot_be_tapped_is_one_line(
        self, name, tap, words, module, tmp_path
    ):
        config = make_config(pictures.fill(tmp_path / "photos"), name)
        config.tap = tap
        del config.model_options.width
        with pytest.raises(ConfigError) as info:
            loop.train_and_evaluate(config, tmp_path / "run")
        assert words in str(info.value) and "\n" not in str(info.value)
        assert not (tmp_path / "run").exists()


class TestFromPython:
    def test_a_class_and_a_module_are_kept_by_their_names(self, module, tmp_path):
        import own_net

        config = make_config(pictures.fill(tmp_path / "photos", number=16))
        config.phases = ("head",)
        del config.model_options.width
        loop.train_and_evaluate(
            config, tmp_path / "run", model=own_net.Net(2, width=5), table=False
        )
        kept = trained.load(tmp_path / "run" / "models" / "head.npz")
        assert type(kept.model).__name__ == "Net" and kept.model.width == 5
        assert build.with_model(config, own_net.OfNNX).model == "own_net:OfNNX"

    def test_what_no_other_process_can_make_is_refused(self, module):
        import own_net

        class Local(own_net.Net):
            pass

        config = make_config("photos")
        with pytest.raises(ConfigError, match="is made inside another name"):
            build.with_model(config, Local)
        with pytest.raises(ConfigError, match="its width is a ndarray"):
            build.with_model(config, own_net.Net(2, width=np.ones(())))
        with pytest.raises(ConfigError, match="give its class"):
            build.with_model(config, own_net.OfNNX(2, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def run(module, tmp_path_factory):
    """(folder of pictures, workdir) of a run of the model."""
    top = tmp_path_factory.mktemp("run")
    folder = pictures.fill(top / "photos", number=16)
    outcome = loop.train_and_evaluate(make_config(folder), top / "run")
    assert 0.0 <= outcome["guided"][1]["accuracy"] <= 1.0
    # Of phases that the run has: there is no "plain", as picture_phases would have it.
    assert (top / "run" / "before_after.png").exists()
    return folder, top / "run"


class TestRoad:
    def test_it_is_kept_by_its_name(self, run):
        kept = trained.load(run[1] / "models" / "guided.npz")
        assert type(kept.model).__name__ == "Net" and kept.model.width == 6
        assert kept.class_names == ("cat", "dog")
        assert json.loads((run[1] / "config.json").read_text())["model"] == (
            "own_net:Net"
        )

    @pytest.mark.slow
    def test_it_is_measured(self, run):
        read = saved_run.Run(run[1])
        source = saved_run.open_split(read)
        options = evaluate.Options(
            limit=4,
            num_perturbed=2,
            num_sensitivity=0,
            num_method_images=2,
            num_sanity=2,
            methods=("ib", "hirescam", "integrated_gradients"),
        )
        results, _ = evaluate.evaluate_run(
            read, source, options=options, progress=False
        )
        assert set(results["phases"]) == {"head", "guided"}

    def test_it_is_explained(self, run, tmp_path):
        photo = run[0] / "cat" / "0.png"
        status = cli.main(
            [
                "explain",
                str(photo),
                f"--checkpoint={run[1]}",
                "--method=ib,hirescam,full_grad",
                f"--out={tmp_path / 'maps'}",
            ]
        )
        assert status == 0
        with np.load(tmp_path / "maps" / "maps.npz") as file:
            assert all(np.isfinite(file[name]).all() for name in file.files)

    def test_a_run_starts_from_the_model_of_another(self, run, tmp_path):
        config = make_config(run[0])
        config.phases = ("plain",)
        config.plain.init, config.plain.learning_rate = "pretrained", 1e-12
        config.plain.warmup_epochs = 0.0
        config.plain.num_epochs = 1.0
        config.pretrained = str(run[1] / "models" / "guided.npz")
        outcome = loop.train_and_evaluate(config, tmp_path / "run", table=False)
        before = trained.load(config.pretrained).variables["params"]
        after = outcome["plain"][0].params
        np.testing.assert_allclose(
            after["last"]["kernel"], before["last"]["kernel"], atol=1e-6
        )

    def test_ibsgl_finds_it_in_the_current_folder(self, module, monkeypatch):
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(module)])
        monkeypatch.chdir(module)
        sys.modules.pop("own_net", None)
        assert cli.main(["models"]) == 0
        assert models.create("own_net:Net", num_classes=2).width == 8


REFUSED = {
    "nothing_here:Net": "cannot import 'nothing_here' (ModuleNotFoundError",
    "own_broken:Net": "cannot import 'own_broken' (ModuleNotFoundError",
    "own_net:": "module 'own_net' has no ''",
    ":": "cannot import ''",
    "own_net:None": "module 'own_net' has no 'None'",
    "own_net:function": "function is no class of flax.linen.Module",
    "os:system": "system is no class of flax.linen.Module",
    "own_net:Headless": "Headless has no method head(features, train=False)",
    "own_net:Trainless": "Trainless.features takes no argument train",
    "own_net:Nameless": "Nameless has no attribute num_classes",
    "own_net:Flat": "features gives [2, 6], not [N, H, W, K]",
    "own_net:Seven": "head gives [2, 7], not [N, C] of num_classes=2",
    "own_net:Broken": "model own_net:Broken at image_size=32: ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_model_is_one_line(name, module, tmp_path):
    folder = pictures.fill(tmp_path / "photos")
    config = make_config(folder)
    config.model = name
    with pytest.raises(ConfigError) as info:
        loop.train_and_evaluate(config, tmp_path / "run")
    assert REFUSED[name] in str(info.value) and "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()


def test_its_options_and_weights_are_checked_too(module, tmp_path):
    config = make_config(pictures.fill(tmp_path / "photos"))
    config.model_options.depth = 3
    with pytest.raises(ConfigError, match="model_options of own_net:Net: .*'depth'"):
        loop.train_and_evaluate(config, tmp_path / "run")
    del config.model_options.depth
    config.head.init = "pretrained"
    with pytest.raises(ConfigError, match="no weights that are known; give --config"):
        loop.train_and_evaluate(config, tmp_path / "run")
    config.pretrained = str(tmp_path / "photos" / "cat" / "0.png")
    with pytest.raises(ConfigError, match="not a model file of ibsgl_jax"):
        loop.train_and_evaluate(config, tmp_path / "run")
