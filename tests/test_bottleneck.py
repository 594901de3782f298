"""The bottleneck's interface: independent images, bounds, what it takes and gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import bottleneck, feature_stats
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import PooledLinear
from tests import reference
from tests.bottleneck_case import (
    MODEL,
    SHORT,
    assert_close,
    assert_finite,
    correlation,
    golden_moments,
    run_small,
    small_case,
)


class TestBounds:
    """What float32 cannot square, but whose sum it still holds."""

    @pytest.mark.parametrize("pooled", [True, False])
    @pytest.mark.parametrize("size", [1e18, 1e25, 1e37])
    def test_huge_features_give_finite_maps(self, size, pooled):
        head = PooledLinear(jax.random.normal(jax.random.key(1), (6, 3)), jnp.zeros(3))
        draws = jax.random.normal(jax.random.key(0), (5, 4, 4, 6))
        features = size * jnp.clip(draws, 0.0, 1.0)
        stats = feature_stats.init((4, 4, 6))
        for part in (features[:2], features[2:]):
            stats = feature_stats.update(stats, part)
        result = self.run(head, features, feature_stats.moments(stats), pooled)
        assert_finite(result)
        assert jnp.any(result.saliency > 0)

    @staticmethod
    @functools.partial(jax.jit, static_argnames="pooled")
    def run(head, features, moments, pooled):
        return bottleneck.attribute(
            jax.random.key(0),
            head if pooled else lambda features: head(jnp.tanh(features)),
            features,
            jnp.zeros(5, jnp.int32),
            moments,
            config=BottleneckConfig(num_steps=3, num_samples=2),
        )

    def test_the_least_deviation_is_finite_too(self):
        head, features, labels, moments = small_case()
        config = BottleneckConfig(num_steps=3, min_std=bottleneck.MIN_STD)
        moments = moments._replace(std=jnp.zeros_like(moments.std))
        result = run_small(
            jax.random.key(0), head, 1e18 * features, labels, moments, config=config
        )
        assert_finite(result)


@pytest.mark.parametrize("pooled", [True, False])
class TestIndependence:
    def test_batch_equals_loop_of_singles_under_one_key(self, pooled):
        head, features, labels, moments = small_case()
        key = jax.random.key(3)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        assert batch.losses.shape == (SHORT.num_steps, 3)
        assert batch.saliency.shape == features.shape[:3]
        assert batch.capacity.shape == batch.alpha.shape == features.shape
        for i in range(3):
            one = slice(i, i + 1)
            alone = run_small(
                key, head, features[one], labels[one], moments, pooled=pooled
            )
            _assert_row(batch, i, alone, 0)

    def test_batch_equals_loop_of_singles_under_a_key_each(self, pooled):
        head, features, labels, moments = small_case()
        keys = jax.random.split(jax.random.key(3), 3)
        batch = run_small(keys, head, features, labels, moments, pooled=pooled)
        for i in range(3):
            one = slice(i, i + 1)
            alone = run_small(
                keys[i], head, features[one], labels[one], moments, pooled=pooled
            )
            _assert_row(batch, i, alone, 0)

    def test_permuting_the_batch_permutes_the_result(self, pooled):
        head, features, labels, moments = small_case()
        order = np.array([2, 0, 1])
        key = jax.random.key(0)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        permuted = run_small(
            key, head, features[order], labels[order], moments, pooled=pooled
        )
        for i, j in enumerate(order):
            _assert_row(permuted, i, batch, j)

    def test_a_broken_image_leaves_its_neighbours_alone(self, pooled):
        head, features, labels, moments = small_case()
        key = jax.random.key(0)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        broken = run_small(
            key, head, features.at[1].set(jnp.nan), labels, moments, pooled=pooled
        )
        for i in (0, 2):
            _assert_row(broken, i, batch, i)

    def test_keys_matter(self, pooled):
        head, *args = small_case()
        one, other = (
            run_small(jax.random.key(i), head, *args, pooled=pooled) for i in (0, 1)
        )
        assert np.abs(one.alpha - other.alpha).max() > 1e-3

    def test_long_runs_in_bfloat16_are_finite_and_descend(self, pooled):
        head, features, labels, moments = small_case()
        low = features.astype(jnp.bfloat16)
        config = BottleneckConfig(num_steps=60, num_samples=1)
        result = run_small(
            jax.random.key(0),
            head,
            low,
            labels,
            moments,
            config=config,
            pooled=pooled,
        )
        assert_finite(result)
        assert result.saliency.dtype == jnp.float32
        assert np.all(result.losses[-10:].mean(0) < 0.5 * result.losses[0])

    @pytest.mark.parametrize("alpha", [200.0, -200.0])
    def test_saturated_start_is_finite(self, pooled, alpha):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args, alpha=alpha, pooled=pooled)
        assert_finite(result)
        if alpha < 0:  # pure noise lets nothing through
            np.testing.assert_allclose(result.saliency, 0.0, atol=1e-5)

    def test_a_single_cell(self, pooled):
        head, *args = small_case(size=(1, 1))
        result = run_small(jax.random.key(0), head, *args, pooled=pooled)
        assert_finite(result)
        assert result.saliency.shape == (3, 1, 1)

    def test_a_single_step_reads_the_map_of_the_start(self, pooled):
        head, features, labels, moments = small_case()
        config = BottleneckConfig(num_steps=1, num_samples=1)
        result = run_small(
            jax.random.key(0),
            head,
            features,
            labels,
            moments,
            config=config,
            pooled=pooled,
        )
        for i in range(3):
            exact = reference.capacity(
                np.full(features.shape[1:], 5.0), features[i], *moments, sigma=1.0
            )
            np.testing.assert_allclose(result.capacity[i], exact, rtol=1e-5, atol=1e-5)
        # Adam's first step is the learning rate, wherever the gradient is not zero.
        moved = np.abs(np.asarray(result.alpha) - 5.0)[..., :-1]
        np.testing.assert_allclose(moved, 1.0, atol=1e-3)


class TestAttribute:
    @pytest.mark.slow  # some 60 operations compiled one by one
    def test_eager_equals_jit(self):
        head, *args = small_case()
        key = jax.random.key(0)
        eager = bottleneck.attribute(key, head, *args, config=SHORT)
        assert_close(eager, run_small(key, head, *args))

    def test_old_style_keys_are_taken(self):
        head, *args = small_case()
        key = jax.random.key(7)
        raw = jax.random.key_data(key)
        assert_close(run_small(key, head, *args), run_small(raw, head, *args), atol=0)

    def test_no_gradient_flows_out(self):
        head, features, labels, moments = small_case()

        @jax.jit
        def total(head, features, moments):
            result = bottleneck.attribute(
                jax.random.key(0),
                head,
                features,
                labels,
                moments,
                config=SHORT,
            )
            return sum(jnp.sum(leaf) for leaf in result)

        gradients = jax.grad(total, (0, 1, 2), allow_int=True)(head, features, moments)
        for leaf in jax.tree.leaves((gradients[0], gradients[1], gradients[2][:2])):
            np.testing.assert_array_equal(leaf, 0.0)

    def test_inactive_elements_carry_nothing(self):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args)
        np.testing.assert_array_equal(result.capacity[..., -1], 0.0)
        assert np.all(np.asarray(result.capacity[..., 0]) > 0)

    def test_saliency_is_the_channel_sum_in_bits(self):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args)
        expected = np.asarray(result.capacity, np.float64).sum(-1) / np.log(2)
        np.testing.assert_allclose(result.saliency, expected, rtol=1e-6)

    def test_maps_of_two_classes_differ_after_twenty_steps(self):
        head = PooledLinear(jnp.asarray(MODEL["fc_w"]), jnp.asarray(MODEL["fc_b"]))
        config = BottleneckConfig(num_steps=20, num_samples=1)
        map_c, map_p = (
            run_small(
                jax.random.key(0),
                head,
                jnp.asarray(MODEL["act_B"]),
                jnp.asarray(MODEL["classes"][:2, k]),
                golden_moments("B"),
                config=config,
            ).saliency
            for k in (0, 1)
        )
        for i in range(2):
            assert correlation(map_c[i], map_p[i]) < 0.9

    def test_defaults_of_the_reference(self):
        assert BottleneckConfig() == BottleneckConfig(
            beta=10.0,
            num_steps=10,
            num_samples=10,
            learning_rate=1.0,
            blur_sigma=1.0,
            initial_alpha=5.0,
            min_std=0.01,
            active_threshold=0.01,
            relu=False,
            noise_scale=1.0,
        )

    @pytest.mark.parametrize("wrong", ["noise", "moments", "labels", "features"])
    def test_wrong_shapes_are_refused(self, wrong):
        head, features, labels, moments = small_case()
        noise = None
        if wrong == "noise":
            noise = jnp.zeros((3, 3, *features.shape))  # one step short
        elif wrong == "moments":
            moments = moments._replace(mean=moments.mean[..., :-1])
        elif wrong == "labels":
            labels = labels[:2]
        else:
            features = features[0]
        with pytest.raises((AssertionError, ValueError)):
            bottleneck.attribute(
                jax.random.key(0),
                head,
                features,
                labels,
                moments,
                config=SHORT,
                noise=noise,
            )


class TestBottleneckConfig:
    @pytest.mark.parametrize(
        "option",
        [
            {"num_steps": 0},
            {"num_samples": 0},
            {"learning_rate": 0.0},
            {"min_std": 0.0},
            {"min_std": 1e-24},
            {"min_std": 1e18},
            {"min_std": float("nan")},
            {"beta": -1.0},
            {"blur_sigma": 0.0},
            {"blur_sigma": -1.0},
            {"noise_scale": 0.0},
        ],
    )
    def test_bad_values_are_named(self, option):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
            BottleneckConfig(**option)


def _assert_row(batch, i, other, j):
    """Image i of one attribution equals image j of another."""
    for name in ("capacity", "saliency", "alpha"):
        np.testing.assert_allclose(
            getattr(batch, name)[i], getattr(other, name)[j], rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(
        batch.losses[:, i], other.losses[:, j], rtol=1e-4, atol=1e-5
    )
