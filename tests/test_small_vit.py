"""A vision transformer in the trainer: its size, its signs, a run from end to end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import photos, small_vit
from ibsgl_jax import attribution, models, trained
from tests import pictures
from train.errors import ConfigError
from train.method import build, guided
from train.method.check import check_config
from train.method.state import create_state
from train.method.step import train_step
from train.run import loop


def make_config(folder):
    config = photos.get_config()
    config.data, config.model = str(folder), "small_vit"
    config.model_options.update({"depth": 2, "width": 8, "patch_size": 6})
    config.image_size, config.batch_size = 24, jax.device_count()
    config.augment, config.fit, config.eval_transform = "shift", "squash", "none"
    config.phases = ("plain", "guided")
    config.plain.init = "random"
    config.plain.num_epochs = config.guided.num_epochs = 1.0
    config.plain.warmup_epochs = config.guided.warmup_epochs = 0.0
    config.guided.init, config.guided.every = "plain", 1
    config.guided.only_right, config.guided.release = False, 0.0
    config.guided.bottleneck.num_steps = 2
    config.tensorboard = config.progress = False
    config.picture_rows = 1
    return config


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    folder = pictures.fill(tmp_path / "photos", number=16)
    outcome = loop.train_and_evaluate(make_config(folder), tmp_path / "run")
    before, after = (outcome[name][0].params for name in ("plain", "guided"))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert moved["block1"]["norm1"]["scale"] > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"kl"' in lines and "NaN" not in lines
    kept = trained.load(tmp_path / "run" / "models" / "guided.npz")
    assert kept.model.image_size == 24 and kept.model.token_layout == ((4, 4), 1)
    assert kept.stats.mean.shape == (17, 8)
    maps = attribution.attribute(
        "hirescam",
        models.make_features_fn(kept.model, kept.variables),
        models.make_head_fn(kept.model, kept.variables),
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 24, 3)), jnp.float32),
    )
    assert maps.shape == (2, 24, 24) and bool(jnp.isfinite(maps).all())


@pytest.mark.slow
def test_a_guided_step_moves_what_the_last_attention_reads():
    options = {"depth": 2, "width": 8, "patch_size": 6, "image_size": 18}
    model = models.create("small_vit", num_classes=3, **options)
    config = make_config("").guided
    context = build.Context(10, 10, ("guided",), 1, None)
    state = create_state(jax.random.key(0), model, optax.sgd(1.0), 18)
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (4, 18, 18, 3)).astype(np.uint8),
        "label": np.array([0, 1, 2, 0], np.int32),
    }
    step = functools.partial(
        train_step,
        penalty_fn=guided.from_phase(model, config, context),
        model=model,
        tx=optax.sgd(1.0),
        base_key=jax.random.key(1),
        image_stats={"mean": (0.5,) * 3, "std": (0.25,) * 3},
    )
    after, sums = jax.jit(step)(state, batch)
    assert after.feature_stats.mean.shape == (10, 8)  # a class token, 3 x 3
    total, count = sums["relative_move"]
    assert count == 4 and total / 4 == pytest.approx(0.1, rel=0.01)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((after, sums)))
    assert float(sums["kl"][0]) > 0


def test_the_image_size_is_the_configs():
    config = small_vit.get_config()
    config.image_size = 60
    assert build.make_model(config, 3).token_layout == ((10, 10), 1)
    config.model_options.image_size = 54
    assert build.make_model(config, 3).image_size == 54
    config.model, config.model_options = "small_resnet", {}
    assert "image_size" not in build.model_options(config)


def test_signed_features_are_not_clipped():
    config = small_vit.get_config()
    check_config(config)
    model = build.make_model(config, 3)
    assert not guided.guidance_config(config.guided, model).rectify_features
    config.model, config.model_options = "small_resnet", {}
    rectified = guided.guidance_config(config.guided, build.make_model(config, 3))
    assert rectified.rectify_features


def test_a_phase_that_would_clip_them_is_one_line():
    config = small_vit.get_config()
    config.guided.guidance.rectify_features = True
    with pytest.raises(ConfigError, match="would clip the signed features of ViT") as e:
        check_config(config)
    assert "\n" not in str(e.value)


def test_images_that_hold_no_patch_are_one_line(tmp_path):
    config = make_config(pictures.fill(tmp_path / "photos"))
    config.image_size = 5
    with pytest.raises(ConfigError, match="image_size=5: smaller than a patch of 6"):
        loop.train_and_evaluate(config, tmp_path / "run")
