"""The rivals' steps: masks, divergences and maps by hand, and one device as two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads
from ml_collections import ConfigDict

from configs.baselines import all as all_config
from configs.baselines import icasc as icasc_config
from configs.baselines import saliency_guided as saliency_guided_config
from ibsgl_jax import models
from tests import golden_net
from train.errors import ConfigError
from train.method import build, icasc, saliency_guided
from train.method.check import check_config
from train.method.state import create_state
from train.method.step import train_step

AXIS = "devices"
OPTIONS = {
    "saliency_guided": {"mask_fraction": 0.5, "weight": 1.0},
    "icasc": {"weight": 1.0, "omega": 100.0, "threshold": 0.55},
}


def make_batch(num=8, size=16):
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (num, size, size, 3), np.uint8),
        "label": generator.integers(0, 10, num).astype(np.int32),
        "place": np.arange(num, dtype=np.int32),
    }


def make_step(kind, model, axis_name=None, **changes):
    phase = ConfigDict(OPTIONS.get(kind, {}) | changes)
    return functools.partial(
        train_step,
        penalty_fn=build.METHODS[kind](model, phase, None),
        model=model,
        tx=optax.sgd(0.1),
        base_key=jax.random.key(7),
        image_stats={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        axis_name=axis_name,
    )


class TinyNet(nn.Module):
    """One convolution, one BatchNorm and a pooled linear head: seconds to compile."""

    axis_name: str | None = None

    def setup(self):
        self.conv = nn.Conv(8, (3, 3), strides=2)
        self.norm = nn.BatchNorm(axis_name=self.axis_name)
        self.dense = nn.Dense(10)

    def features(self, images, train=False):
        return nn.relu(self.norm(self.conv(images), use_running_average=not train))

    def head(self, features, train=False):
        return self.dense(features.mean(axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


def make_model_and_state(axis_name=None):
    model = TinyNet(axis_name)
    return model, create_state(jax.random.key(0), model, optax.sgd(0.1), 16)


class TestMaskLeastImportant:
    @pytest.fixture
    def case(self):
        generator = np.random.default_rng(1)
        images = generator.normal(size=(3, 6, 5, 2)).astype(np.float32)
        importance = generator.random((3, 6, 5)).astype(np.float32)
        keys = jax.random.split(jax.random.key(0), 3)
        masked = saliency_guided.mask_least_important(
            keys, images, importance, fraction=0.4
        )
        return images, importance, np.asarray(masked)

    def test_exactly_the_least_important_pixels_change(self, case):
        images, importance, masked = case
        changed = (images != masked).any(axis=-1)
        for i in range(3):
            lowest = np.argsort(importance[i].ravel())[:12]  # 0.4 of 30
            assert set(np.flatnonzero(changed[i])) == set(lowest)

    def test_every_channel_stays_in_its_own_range(self, case):
        images, _, masked = case
        assert (masked >= images.min(axis=(1, 2), keepdims=True)).all()
        assert (masked <= images.max(axis=(1, 2), keepdims=True)).all()

    def test_fill_covers_the_range_uniformly(self):
        images = np.zeros((1, 100, 100, 1), np.float32)
        images[0, 0, 0] = 2.0
        masked = saliency_guided.mask_least_important(
            jax.random.split(jax.random.key(3), 1),
            images,
            images[..., 0],
            fraction=0.5,
        )
        filled = np.asarray(masked).ravel()[5000:]
        # Mean 1 and standard deviation 2 / sqrt(12); five standard errors of 5000.
        assert abs(filled.mean() - 1.0) < 5 * 0.577 / np.sqrt(5000)
        assert abs(filled.std() - 0.577) < 0.03


class TestPredictionKl:
    def test_by_hand(self):
        p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
        # .5 log 2 + .25 log .5
        expected = 0.25 * np.log(2)
        actual = saliency_guided.prediction_kl(jnp.log(p), jnp.log(q) + 3.0)
        np.testing.assert_allclose(actual, [expected], rtol=1e-6)

    def test_zero_for_equal_predictions(self):
        logits = jnp.array([[3.0, -100.0, 1.0]])
        np.testing.assert_array_equal(
            saliency_guided.prediction_kl(logits, logits), [0.0]
        )


class TestAttention:
    def test_matches_the_reference_map(self):
        net = golden_net.load("net1_model")
        golden = golden_net.load("net1_icasc")
        maps = icasc.attention(
            functools.partial(golden_net.head, net, tap="B"),
            jnp.asarray(net["act_B"]),
            jnp.asarray(net["classes"][:2, 0]),
        )
        # The reference multiplies the gradient by the sum of the chosen logits.
        scale = golden["attention_grad_logits_scalar_t"]
        np.testing.assert_allclose(
            maps * scale, golden["attention_A_t_B"], rtol=1e-5, atol=1e-6
        )

    @pytest.mark.slow
    def test_differentiable_in_the_head_to_second_order(self):
        generator = np.random.default_rng(0)
        features = jnp.asarray(generator.random((2, 4, 4, 6)), jnp.float32)
        kernel = jnp.asarray(generator.normal(size=(6, 3)), jnp.float32)
        labels, others = jnp.array([0, 1]), jnp.array([2, 0])

        def separation(kernel, features):
            return icasc.attention_separation(
                models.PooledLinear(kernel, jnp.zeros(3)),
                features,
                labels,
                others,
                omega=5.0,  # gentle, so that finite differences in float32 see it
                threshold=0.55,
            )

        # First order in the kernel is already a derivative of dy/dA.
        check_grads(separation, (kernel, features), order=1, atol=2e-2, rtol=2e-2)
        gradient = jax.grad(lambda k: separation(k, features).sum())(kernel)
        assert float(jnp.abs(gradient).max()) > 1e-3

    def test_separation_of_equal_maps_is_the_share_of_the_mask(self):
        features = (
            jnp.ones((1, 2, 2, 1))
            * jnp.array([[1.0, 0.0], [0.0, 0.0]])[None, :, :, None]
        )
        head_fn = models.PooledLinear(jnp.ones((1, 2)), jnp.zeros(2))
        value = icasc.attention_separation(
            head_fn,
            features,
            jnp.array([0]),
            jnp.array([1]),
            omega=100.0,
            threshold=0.55,
        )
        # 2 min / (sum + sum) = 1 where the mask sigmoid(45) = 1
        np.testing.assert_allclose(value, [1.0], rtol=1e-6)


class TestSteps:
    @pytest.mark.parametrize("kind", list(OPTIONS))
    def test_without_weight_it_is_the_plain_step(self, kind):
        model, state = make_model_and_state()
        batch = make_batch()
        plain, _ = jax.jit(make_step("plain", model))(state, batch)
        other, sums = jax.jit(make_step(kind, model, weight=0.0))(state, batch)
        # Equal but for the order of sums in another compilation.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
            (plain.params, plain.batch_stats),
            (other.params, other.batch_stats),
        )
        np.testing.assert_allclose(sums["loss"][0], sums["task_loss"][0], rtol=1e-6)

    @pytest.mark.parametrize(
        "kind, term",
        [
            ("saliency_guided", "prediction_kl"),
            ("icasc", "attention_separation"),
        ],
    )
    def test_one_device_as_two(self, kind, term):
        model, state = make_model_and_state(AXIS)
        batch = make_batch()
        outcome = []
        for num in (1, 2):
            step = jax.pmap(
                make_step(kind, model, AXIS),
                axis_name=AXIS,
                in_axes=(None, 0),
                out_axes=None,
                devices=jax.devices()[:num],
            )
            shards = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), batch)  # noqa: B023
            outcome.append(jax.device_get(step(state, shards)))
        (one, one_sums), (two, two_sums) = outcome
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
            one.params,
            two.params,
        )
        total, count = one_sums[term]
        assert count == 8
        assert total > 1e-3  # the term is at work
        np.testing.assert_allclose(total, two_sums[term][0], rtol=1e-3)
        loss = (one_sums["task_loss"][0] + total) / 8  # both weights are 1
        np.testing.assert_allclose(one_sums["loss"][0] / 8, loss, rtol=1e-5)


class TestConfigs:
    @pytest.mark.parametrize(
        "module", [all_config, icasc_config, saliency_guided_config]
    )
    def test_can_be_trained(self, module):
        config = module.get_config()
        check_config(config)
        assert config.phases[:2] == ("plain", "control")
        # Rivals take as many steps from the same weights as the control.
        for name in config.phases[2:]:
            assert config[name].init == "plain"
            assert config[name].num_epochs == config.control.num_epochs

    @pytest.mark.parametrize("field, value", [("mask_fraction", 1.5), ("weight", -1.0)])
    def test_impossible_values_are_named(self, field, value):
        config = saliency_guided_config.get_config()
        config.saliency_guided[field] = value
        with pytest.raises(ConfigError, match=f"saliency_guided.{field}"):
            check_config(config)
