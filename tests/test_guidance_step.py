"""The step from the features to their target: how far, and which way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import bottleneck, guidance, losses
from ibsgl_jax.guidance import GuidanceConfig
from ibsgl_jax.models import PooledLinear
from tests import golden_net
from tests.bottleneck_case import assert_finite, golden_moments
from tests.guidance_case import guide_few, guide_to, maps_of, small_case, small_moments

MODEL = golden_net.load("net1_model")


def golden_head(tap):
    if tap == "B":
        return PooledLinear(jnp.asarray(MODEL["fc_w"]), jnp.asarray(MODEL["fc_b"]))
    return lambda a: golden_net.head(MODEL, a, tap)


@functools.cache
def golden_features(tap):
    return golden_net.features(MODEL, jnp.asarray(MODEL["inputs"]), tap)


@functools.cache
def golden_guide(tap, config):
    """Real images through the golden network, guided."""
    guide = jax.jit(
        lambda key, a, labels: guidance.guide(
            key, golden_head(tap), a, labels, golden_moments(tap), config=config
        )
    )
    return guide(jax.random.key(0), golden_features(tap), jnp.asarray(MODEL["labels"]))


@pytest.mark.parametrize("tap", ["A", "B"])
class TestOnRealImages:
    def test_the_saliency_loss_falls(self, tap):
        result = golden_guide(tap, GuidanceConfig())
        assert_finite(result)
        falls = np.asarray(result.target_loss < result.loss)
        assert falls.sum() >= 7  # measured: all 8; a fixed step may overshoot

    def test_the_move_is_at_most_the_step_size(self, tap):
        result = golden_guide(tap, GuidanceConfig())
        move = np.asarray(result.relative_move)
        # Rounding of A' - A: 6e-8 of A against a tenth of its norm.
        # Measured .055 to .075: the clip at zero takes the rest.
        assert np.all(move <= 0.1 * (1 + 1e-5)) and np.all(move > 0.03)
        assert result.target_features.min() >= 0

    def test_diagnostics_describe_the_features(self, tap):
        result = golden_guide(tap, GuidanceConfig())
        features, labels = golden_features(tap), jnp.asarray(MODEL["labels"])
        logits = golden_head(tap)(features)
        np.testing.assert_allclose(result.logits, logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(result.runner_up, MODEL["classes"][:, 1])
        map_c, map_p = maps_of(golden_head(tap), features, labels)
        peak = float(map_c.max())
        np.testing.assert_allclose(result.saliency_c, map_c, atol=1e-5 * peak)
        np.testing.assert_allclose(result.saliency_p, map_p, atol=1e-5 * peak)
        np.testing.assert_array_equal(result.blank, 0.0)
        moved = np.asarray(result.target_features - features, np.float64)
        expected = np.linalg.norm(moved.reshape(8, -1), axis=1) / np.linalg.norm(
            np.asarray(features, np.float64).reshape(8, -1), axis=1
        )
        np.testing.assert_allclose(result.relative_move, expected, rtol=1e-5)


class TestRelativeStep:
    @pytest.mark.parametrize("step_size", [0.05, 0.3])
    def test_move_before_the_clip_is_the_step_size(self, step_size):
        config = GuidanceConfig(step_size=step_size, rectify_features=False)
        result = guide_to(*small_case(), config=config)
        # Rounding of A' - A, as above.
        np.testing.assert_allclose(result.relative_move, step_size, rtol=1e-5)
        clipped = guide_to(
            *small_case(), config=dataclasses.replace(config, rectify_features=True)
        )
        np.testing.assert_allclose(
            clipped.target_features,
            np.maximum(result.target_features, 0),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_direction_is_that_of_each_examples_own_gradient(self):
        head, features, labels, teacher = small_case()
        config = GuidanceConfig(rectify_features=False)
        result = guide_to(head, features, labels, teacher, config=config)

        @jax.jit
        @jax.grad
        def gradient_of(a, label, target, gate):
            map_c, map_p = maps_of(head, a[None], label[None])
            loss = losses.saliency_cross_entropy(map_c, target[None])
            return (loss + gate * losses.runner_up_excess(map_c, map_p))[0]

        for i, gate in enumerate((1.0, 1.0, 0.0, 0.0)):
            g = gradient_of(features[i], labels[i], teacher[i], gate)
            size = jnp.linalg.norm(features[i]) / jnp.linalg.norm(g)
            np.testing.assert_allclose(
                result.target_features[i],
                features[i] - 0.1 * size * g,
                rtol=1e-4,
                atol=1e-5,
            )

    def test_active_elements_alone_move_as_far_as_all_would(self):
        head, features, labels, teacher = small_case()
        features = jnp.where(features > jnp.median(features), features, 0.0)
        case = head, features, labels, teacher
        result = guide_to(*case, config=GuidanceConfig(step_size=0.01, move="active"))
        is_zero = features == 0
        assert np.all(result.target_features[is_zero] == 0)
        assert np.all(guide_to(*case).target_features[is_zero].max() > 0)
        # Nothing but what falls below zero is clipped.
        assert np.all(result.relative_move <= 0.01 * (1 + 1e-5))
        assert np.all(result.relative_move > 0.009)
        assert np.all(result.target_loss < result.loss)

    def test_the_backbone_feels_more_of_it(self):
        """Behind a ReLU, at one learning rate, the saliency loss falls by more."""
        head, features, labels, teacher = small_case()
        before = features - jnp.median(features)

        def pull(before, move):
            config = GuidanceConfig(move=move)
            features = jax.nn.relu(before)
            guided = guide_to(head, features, labels, teacher, config=config)
            return jnp.sum(guidance.divergence_from(guided, features, config))

        def fall(move):
            """Of the saliency loss, along the divergence's own gradient."""
            after = before - jax.grad(pull)(before, move)
            loss = [
                guide_to(head, jax.nn.relu(a), labels, teacher).loss.sum()
                for a in (before, after)
            ]
            return loss[0] - loss[1]

        assert fall("active") > 1.1 * fall("all")

    def test_loss_falls_along_a_short_step(self):
        result = guide_to(*small_case(), config=GuidanceConfig(step_size=0.01))
        assert np.all(result.target_loss < result.loss)

    def test_neighbours_do_not_matter(self):
        head, features, labels, _ = small_case()
        moments = small_moments(features)
        key = jax.random.key(0)
        batch = guide_few(key, head, features, labels, moments)
        spoilt = guide_few(key, head, features.at[1].set(jnp.nan), labels, moments)
        for i in range(4):
            one = slice(i, i + 1)
            alone = guide_few(key, head, features[one], labels[one], moments)
            for together, single, beside_nan in zip(batch, alone, spoilt, strict=True):
                np.testing.assert_allclose(together[i], single[0], rtol=1e-4, atol=1e-5)
                if i != 1:
                    np.testing.assert_allclose(
                        together[i], beside_nan[i], rtol=1e-4, atol=1e-5
                    )

    def test_rounding_is_no_direction(self):
        # A map of one lit cell is the same distribution at any strength: the true
        # gradient is zero, and float32 leaves some 1e-8 of it.
        head = PooledLinear(jnp.array([[1.0, -1.0], [0.3, 0.1]]), jnp.zeros(2))
        features = jnp.zeros((3, 4, 4, 2))
        features = features.at[jnp.arange(3), 1, jnp.arange(3)].set(
            jnp.array([[0.7, 0.3], [1.3, 0.1], [5.1, 2.7]])
        )
        teacher = jnp.asarray(np.random.default_rng(0).random((3, 4, 4)), jnp.float32)
        guided = guide_to(
            head,
            features,
            jnp.zeros(3, jnp.int32),
            teacher,
            GuidanceConfig(suppression_weight=0.0),
        )
        np.testing.assert_array_equal(guided.target_features, features)
        np.testing.assert_array_equal(guided.blank, 0.0)


class TestPlainStep:
    def test_equals_gradient_descent_on_the_batch_mean(self):
        head, features, labels, teacher = small_case()
        config = GuidanceConfig(
            step="plain",
            step_size=0.7,
            suppression="overlap",
            suppression_weight=2.0,
            rectify_features=False,
        )
        result = guide_to(head, features, labels, teacher, config=config)
        gate = jnp.array([1.0, 1.0, 0.0, 0.0])

        @jax.jit
        @jax.grad
        def gradient_of(a):
            map_c, map_p = maps_of(head, a, labels)
            loss = losses.saliency_cross_entropy(map_c, teacher)
            shared = losses.saliency_suppression(map_c, map_p)
            return jnp.mean(loss + 2.0 * gate * shared)

        moved = 0.7 * gradient_of(features)
        np.testing.assert_allclose(
            features - result.target_features, moved, rtol=1e-3, atol=1e-6
        )
        assert np.abs(moved).max() > 1e-3

    def test_literal_recipe(self):
        config = guidance.literal()
        assert config.step == "plain" and config.suppression == "masked_overlap"
        assert config.bottleneck == bottleneck.BottleneckConfig()
        result = golden_guide("B", config)
        assert_finite(result)
        # As printed it hardly moves: the reason for the relative step.
        assert np.all(result.relative_move < 1e-3)


def test_a_plain_step_is_the_mean_over_the_whole_batch():
    """Two halves that know the size of the whole move as it does."""
    generator = np.random.default_rng(0)
    features = jnp.asarray(generator.random((4, 3, 3, 5)), jnp.float32)
    head = PooledLinear(
        jnp.asarray(generator.normal(size=(5, 3)), jnp.float32), jnp.zeros(3)
    )
    teacher = jnp.asarray(generator.random((4, 3, 3)), jnp.float32)
    labels = jnp.array([0, 1, 2, 0])

    @functools.partial(jax.jit, static_argnames="num_examples")
    def guide(features, labels, teacher, num_examples):
        return guidance.guide(
            None,
            head,
            features,
            labels,
            None,
            config=GuidanceConfig(step="plain", step_size=1.0),
            teacher=teacher,
            num_examples=num_examples,
        ).target_features

    def target(part, num_examples=None):
        return guide(features[part], labels[part], teacher[part], num_examples)

    whole = target(slice(None))
    halves = [target(slice(i, i + 2), 4) for i in (0, 2)]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=1e-6)
    assert not np.allclose(target(slice(0, 2)), whole[:2], rtol=1e-6)
