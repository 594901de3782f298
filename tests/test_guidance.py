"""Guidance: its loss, its teachers, what it promises, and the penalty made of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import bottleneck, feature_stats, guidance, losses, saliency
from ibsgl_jax.guidance import GuidanceConfig
from ibsgl_jax.models import PooledLinear
from tests.bottleneck_case import assert_finite
from tests.guidance_case import (
    FEW,
    guide_few,
    guide_to,
    maps_of,
    small_case,
    small_moments,
)


class TestGate:
    def test_wrong_predictions_get_no_suppression(self):
        head, features, labels, teacher = small_case()
        result = guide_to(head, features, labels, teacher)
        followed = losses.saliency_cross_entropy(result.saliency_c, teacher)
        excess = losses.runner_up_excess(result.saliency_c, result.saliency_p)
        assert np.all(excess > 0.01)
        gate = np.array([1.0, 1.0, 0.0, 0.0])
        np.testing.assert_allclose(result.loss, followed + gate * excess, rtol=1e-5)
        always = guide_to(
            head, features, labels, teacher, config=GuidanceConfig(gate="always")
        )
        np.testing.assert_allclose(always.loss, followed + excess, rtol=1e-5)

    def test_gate_at_the_target_is_that_of_the_features(self):
        # The loss at A' has to differ from that at A by the maps alone.
        head, features, labels, teacher = small_case()
        result = guide_to(head, features, labels, teacher)
        map_c = saliency.class_saliency(head, result.target_features, labels)
        map_p = saliency.class_saliency(head, result.target_features, result.runner_up)
        gate = jnp.array([1.0, 1.0, 0.0, 0.0])
        expected = guidance.saliency_loss(map_c, map_p, teacher, gate, GuidanceConfig())
        np.testing.assert_allclose(result.target_loss, expected, rtol=1e-4)


class TestSaliencyLoss:
    @pytest.mark.parametrize("kind", guidance.SUPPRESSIONS)
    def test_suppressions(self, kind):
        head, features, labels, teacher = small_case()
        map_c, map_p = maps_of(head, features, labels)
        value = guidance.saliency_loss(
            map_c,
            map_p,
            teacher,
            jnp.ones(4),
            GuidanceConfig(suppression=kind, suppression_weight=3.0),
        )
        if kind == "runner_up_excess":
            term = losses.runner_up_excess(map_c, map_p)
        elif kind == "runner_up_cosine":
            term = losses.runner_up_cosine(map_c, map_p)
        elif kind == "runner_up_mass":
            term = losses.runner_up_mass(map_c, map_p, teacher)
        else:
            mask = {
                "overlap": None,
                "masked_overlap": losses.soft_mask(
                    map_c / map_c.max((1, 2), keepdims=True)
                ),
                "background_overlap": 1 - teacher / teacher.max((1, 2), keepdims=True),
            }[kind]
            term = losses.saliency_suppression(map_c, map_p, mask)
        followed = losses.saliency_cross_entropy(map_c, teacher)
        np.testing.assert_allclose(value, followed + 3 * term, rtol=1e-4)
        assert np.all(term > 1e-4)

    def test_contrast_reads_the_evidence_before_its_relu(self):
        head, features, labels, teacher = small_case()
        head = PooledLinear(head.kernel - 0.4, head.bias)  # some evidence is against
        config = GuidanceConfig(contrast=0.5, suppression_weight=0.0, step_size=0.01)
        result = guide_to(head, features, labels, teacher, config=config)
        of = functools.partial(saliency.class_saliency, head, rectify=False)
        map_c, map_p = of(features, labels), of(features, result.runner_up)
        contrast = jnp.maximum(map_c - 0.5 * map_p, 0.0)
        assert np.any(map_p < 0) and np.any(contrast > jnp.maximum(map_c, 0.0))
        expected = losses.saliency_cross_entropy(contrast, teacher)
        np.testing.assert_allclose(result.loss, expected, rtol=1e-5)
        assert np.all(result.target_loss < result.loss)
        np.testing.assert_allclose(result.saliency_c, jnp.maximum(map_c, 0), rtol=1e-5)

    def test_weight_zero_switches_suppression_off(self):
        map_c, map_p, teacher = jnp.abs(
            jax.random.normal(jax.random.key(0), (3, 2, 4, 4))
        )
        config = GuidanceConfig(suppression_weight=0.0, cross_entropy="bernoulli")
        value = guidance.saliency_loss(map_c, map_p, teacher, jnp.ones(2), config)
        expected = losses.saliency_cross_entropy(map_c, teacher, kind="bernoulli")
        np.testing.assert_allclose(value, expected, rtol=1e-6)


class TestTeacher:
    def test_default_is_the_bottlenecks_map(self):
        head, features, labels, _ = small_case()
        moments, key = small_moments(features), jax.random.key(4)
        result = guide_few(key, head, features, labels, moments)
        expected = jax.jit(functools.partial(bottleneck.attribute, config=FEW))(
            key, head, features, labels, moments
        )
        np.testing.assert_allclose(
            result.teacher, expected.saliency, rtol=1e-4, atol=1e-5
        )

    def test_another_is_followed(self):
        head, features, labels, teacher = small_case()
        mask = jnp.zeros_like(teacher).at[:, 1, 2].set(1.0)
        result = guide_to(head, features, labels, mask)
        np.testing.assert_array_equal(result.teacher, mask)
        after = saliency.class_saliency(head, result.target_features, labels)
        lit = np.asarray(result.blank) == 0
        assert lit.sum() >= 2

        def share(maps):
            return np.asarray(maps[:, 1, 2] / jnp.sum(maps, axis=(1, 2)))[lit]

        assert np.all(share(after) > share(result.saliency_c))

    def test_a_vector_and_one_logit_are_one_line(self):
        labels, teacher = jnp.zeros(2, jnp.int32), jnp.ones((2, 4, 4))
        with pytest.raises(ValueError, match="a map needs"):
            guidance.guide(
                None,
                lambda a: a,
                jnp.ones((2, 5)),
                labels,
                None,
                teacher=teacher,
            )
        with pytest.raises(ValueError, match="at least two classes"):
            guidance.guide(
                None,
                lambda a: a.mean((1, 2))[:, :1],
                jnp.ones((2, 4, 4, 5)),
                labels,
                None,
                teacher=teacher,
            )

    def test_wrong_size_is_refused(self):
        head, features, labels, teacher = small_case()
        with pytest.raises(AssertionError):
            guidance.guide(None, head, features, labels, None, teacher=teacher[:, :2])


class TestGuide:
    def test_no_gradient_flows_out(self):
        head, features, labels, _ = small_case()
        moments = small_moments(features)

        @jax.jit
        def total(head, features, mean):
            result = guidance.guide(
                jax.random.key(0),
                head,
                features,
                labels,
                moments._replace(mean=mean),
                config=GuidanceConfig(bottleneck=FEW),
            )
            result = result._replace(runner_up=jnp.zeros(()))
            return sum(jnp.sum(leaf) for leaf in result)

        gradients = jax.grad(total, (0, 1, 2))(head, features, moments.mean)
        for leaf in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(leaf, 0.0)

    def test_both_classes_share_each_pass_through_the_head(self):
        head, features, labels, teacher = small_case()
        calls = []

        def counted(a):
            calls.append(a.shape)
            return head(a)

        jax.eval_shape(
            lambda a: guidance.guide(None, counted, a, labels, None, teacher=teacher),
            features,
        )
        # Once at A, for logits, both maps and the gradient; once at A'.
        assert calls == [features.shape] * 2

    def test_all_zero_features_are_blank_and_stay(self):
        head, features, labels, _ = small_case()
        moments = small_moments(features)
        features = features.at[1].set(0.0)
        result = guide_few(jax.random.key(0), head, features, labels, moments)
        assert_finite(result)
        assert result.blank[1] == 1 and result.relative_move[1] == 0
        np.testing.assert_array_equal(result.target_features[1], 0.0)
        np.testing.assert_array_equal(result.saliency_c[1], 0.0)

    def test_all_negative_evidence_is_blank(self):
        head, features, labels, teacher = small_case()
        labels = jnp.zeros_like(labels)
        kernel = head.kernel.at[:, 0].set(-jnp.abs(head.kernel[:, 0]))
        head = head.replace(kernel=kernel)
        result = guide_to(head, features, labels, teacher)
        assert_finite(result)
        np.testing.assert_array_equal(result.blank, 1.0)
        # Nothing to follow, and the prediction is wrong: the features stay.
        np.testing.assert_allclose(result.target_features, features, rtol=1e-6)
        np.testing.assert_array_equal(result.relative_move, 0.0)

    def test_a_map_that_is_its_own_teacher_moves_nothing(self):
        """Its gradient is rounding, in a direction that means nothing."""
        head, features, labels, _ = small_case(n=64, shape=(8, 8, 256))
        features = features**8  # peaks, as trained networks have
        own, _ = maps_of(head, features, labels)
        config = GuidanceConfig(suppression_weight=0.0)
        result = guide_to(head, features, labels, own, config)
        np.testing.assert_array_equal(result.relative_move, 0.0)
        squared = guide_to(head, features, labels, own**2, config)
        assert np.all(squared.relative_move > 0.01)

    @pytest.mark.parametrize("scale", [1e-20, 1e4])
    @pytest.mark.parametrize("kind", guidance.SUPPRESSIONS)
    def test_scale_of_the_features(self, scale, kind):
        head, features, labels, teacher = small_case()
        head = head.replace(bias=jnp.zeros_like(head.bias))
        config = GuidanceConfig(suppression=kind)
        plain = guide_to(head, features, labels, teacher, config=config)
        scaled = guide_to(head, scale * features, labels, teacher, config=config)
        assert_finite(scaled)
        # The maps are linear in A here and every term is scale free.
        np.testing.assert_allclose(
            scaled.target_features / scale,
            plain.target_features,
            rtol=1e-3,
            atol=1e-3,
        )
        np.testing.assert_allclose(scaled.target_loss, plain.target_loss, rtol=1e-3)

    @pytest.mark.parametrize("scale", [1e-20, 1e4])
    def test_scale_of_the_features_with_the_bottleneck(self, scale):
        head, features, labels, _ = small_case()
        moments = small_moments(features)
        result = guide_few(jax.random.key(0), head, scale * features, labels, moments)
        assert_finite(result)

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint32])
    def test_labels_of_any_integers_and_positives_of_bools(self, dtype):
        head, features, labels, teacher = small_case()
        expected = guide_to(head, features, labels, teacher)
        got = guide_to(head, features, labels.astype(dtype), teacher)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        config = GuidanceConfig(link="sigmoid")
        pair = [
            guidance.guide(
                *(None, head, features, labels.astype(dtype), None),
                config=config,
                teacher=teacher,
                positives=jax.nn.one_hot(labels, 3, dtype=kind),
            )
            for kind in (bool, jnp.float32)
        ]
        jax.tree.map(np.testing.assert_array_equal, *pair)

    def test_bfloat16_features(self):
        head, features, labels, teacher = small_case()
        low = features.astype(jnp.bfloat16)
        result = guide_to(head, low, labels, teacher)
        expected = guide_to(head, low.astype(jnp.float32), labels, teacher)
        assert result.target_features.dtype == jnp.float32
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_array_equal(a, b)


class TestGuidanceConfig:
    @pytest.mark.parametrize(
        "option",
        [
            {"weighting": "mean"},
            {"cross_entropy": "kl"},
            {"suppression": "mask"},
            {"gate": "wrong"},
            {"step": "adam"},
            {"kl_over": "channel"},
            {"suppression_weight": -1.0},
            {"contrast": -0.1},
            {"step_size": 0.0},
            {"kl_floor": 0.0},
        ],
    )
    def test_bad_values_are_named(self, option):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            GuidanceConfig(**option)

    def test_hashable_so_that_it_can_be_a_static_argument(self):
        assert hash(GuidanceConfig()) == hash(GuidanceConfig())
        assert GuidanceConfig() != guidance.literal()


def test_features_that_are_not_rectified_have_a_finite_divergence():
    a = jnp.array([[[[-1.0, 0.0, 2.0]]]])
    for over in losses.KL_EXTENTS:
        value, slope = jax.jit(
            jax.value_and_grad(
                lambda a, over=over: losses.feature_kl(a, a - 1.0, over=over)[0]
            )
        )(a)
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(slope))
        np.testing.assert_allclose(
            value, losses.feature_kl(a.clip(0), (a - 1).clip(0), over=over)[0]
        )


class TestPenalty:
    """All of guidance in one call, for a loop of one's own."""

    @pytest.mark.parametrize("step", guidance.STEPS)
    def test_a_batch_of_nothing_leaves_the_statistics(self, step):
        head, features, labels, _ = small_case()
        before = feature_stats.init(features.shape[1:])
        before = feature_stats.update(before, features)
        config = GuidanceConfig(bottleneck=FEW, step=step)
        key, nothing = jax.random.key(0), (features[:0], labels[:0])
        penalty_fn = jax.jit(functools.partial(guidance.penalty, config=config))
        got = penalty_fn(key, head, *nothing, before, 1)
        assert got.penalty.shape == (0,)
        np.testing.assert_array_equal(got.stats.mean, before.mean)

    def make(self, **options):
        kernel = jax.random.normal(jax.random.key(1), (6, 4))
        features = jnp.abs(jax.random.normal(jax.random.key(0), (8, 5, 5, 6)))
        logits = jnp.mean(features, axis=(1, 2)) @ kernel
        best = jnp.argmax(logits, axis=-1)
        labels = jnp.where(jnp.arange(8) < 4, best, (best + 1) % 4)
        config = guidance.GuidanceConfig(
            bottleneck=bottleneck.BottleneckConfig(num_steps=2, num_samples=1)
        )

        def total(features, step):
            result = guidance.penalty(
                jax.random.key(2),
                lambda a: jnp.mean(a, axis=(1, 2)) @ kernel,
                features,
                labels,
                feature_stats.init((5, 5, 6)),
                step,
                config=config,
                **options,
            )
            return jnp.sum(result.penalty), result

        gradient_fn = jax.jit(jax.grad(total, has_aux=True))
        return lambda step: gradient_fn(features, step)

    def test_grows_and_follows_right_predictions_only(self):
        run = self.make(mu=3.0, ramp=10.0)
        (nothing, _), (half, at_half), (full, at_full) = run(0), run(5), run(20)
        assert not jnp.any(nothing)
        np.testing.assert_allclose(half, full / 2, rtol=1e-5)
        np.testing.assert_allclose(at_half.penalty, at_full.penalty / 2, rtol=1e-5)
        assert jnp.all(at_full.penalty[:4] > 0) and not jnp.any(at_full.penalty[4:])
        assert not jnp.any(full[4:]) and jnp.all(jnp.isfinite(full))
        assert at_full.stats.count == 8

    def test_may_follow_all(self):
        _, result = self.make(mu=3.0, ramp=1.0, only_right=False)(1)
        kl = losses.feature_kl(
            jnp.abs(jax.random.normal(jax.random.key(0), (8, 5, 5, 6))),
            result.guidance.target_features,
        )
        np.testing.assert_allclose(result.penalty, 3.0 * kl, rtol=1e-5)

    @pytest.mark.parametrize("options", [{"mu": -1.0}, {"ramp": 0.0}])
    def test_bad_options_are_one_line(self, options):
        with pytest.raises(ValueError, match="mu must be >= 0 and ramp > 0"):
            self.make(**options)(0)
