"""The divergence of features from their target."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import losses
from tests import reference

kl = jax.jit(losses.feature_kl, static_argnames=("over", "floor"))
kl_grad = jax.jit(
    jax.grad(lambda a, b, over: jnp.sum(losses.feature_kl(a, b, over=over)), (0, 1)),
    static_argnames="over",
)


def draw_features(seed=0, shape=(3, 2, 3, 4)):
    draw = np.random.default_rng(seed)
    a = np.maximum(draw.normal(0.3, 1.0, shape), 0)
    b = np.maximum(a + draw.normal(0.0, 0.2, shape), 0)
    return a.astype(np.float32), b.astype(np.float32)


class TestFeatureKL:
    def test_by_hand(self):
        # One channel, two cells, A = (1, 3): mean 2, level .2; p = (1.2, 3.2) / 4.4;
        # A' = (2, 2): q = 1/2 each. KL = log 2 + sum p log p.
        a = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)
        b = jnp.array([2.0, 2.0]).reshape(1, 1, 2, 1)
        p = np.array([1.2, 3.2]) / 4.4
        expected = math.log(2) + np.sum(p * np.log(p))
        for over in losses.KL_EXTENTS:
            np.testing.assert_allclose(
                losses.feature_kl(a, b, over=over), [expected], rtol=1e-5
            )

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_numpy(self, over):
        a, b = draw_features()
        expected = [
            reference.feature_kl(x, y, over=over) for x, y in zip(a, b, strict=True)
        ]
        np.testing.assert_allclose(kl(a, b, over=over), expected, rtol=1e-5)

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_zero_at_the_target_and_never_negative(self, over):
        a, b = draw_features()
        np.testing.assert_array_equal(kl(a, a, over=over), 0.0)
        draw = np.random.default_rng(1)
        direction = draw.normal(size=a.shape)
        for size in 10.0 ** np.arange(-8, 1):
            moved = np.maximum(a + size * direction, 0).astype(np.float32)
            assert np.all(kl(a, moved, over=over) >= 0)

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_tiny_moves_are_seen_and_quadratic(self, over):
        # Eight thousand elements, as at a real layer: the plain sum p log(p / q)
        # rounds at 1e-7, the divergence is 1e-10 here.
        a, _ = draw_features(shape=(1, 16, 16, 32))
        a = a + 0.5
        direction = np.random.default_rng(1).normal(size=a.shape)

        def at(size):
            b = np.asarray(a + size * direction, np.float32)
            exact = reference.feature_kl(a[0], b[0], over=over)
            value = kl(a, b, over=over)
            # float32 spacing of A, 6e-8, is .6 % of a move of 1e-5.
            np.testing.assert_allclose(value, [exact], rtol=0.02)
            return value

        ratio = at(1e-4) / at(1e-5)
        assert 98 < ratio < 102

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_no_gradient_into_the_target(self, over):
        _, by_target = kl_grad(*draw_features(), over=over)
        np.testing.assert_array_equal(by_target, 0.0)

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_gradient_against_differences_with_the_floor_held(self, over):
        a, b = draw_features(shape=(1, 2, 2, 2))
        a = a + 0.2
        by_a, _ = kl_grad(a, b, over=over)
        level = 0.1 * a.astype(np.float64).mean()

        def naive(x):
            axes = (1, 2, 3) if over == "all" else (1, 2)
            p, q = x + level, b.astype(np.float64) + level
            p, q = p / p.sum(axes, keepdims=True), q / q.sum(axes, keepdims=True)
            return np.mean(np.sum(p * np.log(p / q), axis=axes))

        expected = np.zeros(a.shape)
        for index in np.ndindex(a.shape):
            step = np.zeros(a.shape)
            step[index] = 1e-6
            expected[index] = (naive(a + step) - naive(a - step)) / 2e-6
        np.testing.assert_allclose(by_a, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_gradient_vanishes_at_the_target(self, over):
        a, b = draw_features()
        at_target, _ = kl_grad(a, a, over=over)
        away, _ = kl_grad(a, b, over=over)
        assert np.abs(at_target).max() < 1e-6 * np.abs(away).max()

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_common_scale_does_not_matter(self, over):
        a, b = draw_features()
        for scale in (1e-20, 1e4):
            np.testing.assert_allclose(
                kl(scale * a, scale * b, over=over), kl(a, b, over=over), rtol=1e-4
            )

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    def test_extremes_are_finite(self, over):
        zero = np.zeros((2, 3, 4), np.float32)
        one_hot, other = zero.copy(), zero.copy()
        one_hot[1, 2, 0] = other[0, 0, 3] = 1.0
        a = draw_features()[0][0]
        # The last two put q / p at 1e-13, where 1 + (q - p) / p is zero in float32.
        cases = [zero, one_hot, other, a, 1e-20 * a, 1e4 * a, 1e10 * other]
        pairs = [(x, y) for x in cases for y in cases]
        first, second = (np.stack(side) for side in zip(*pairs, strict=True))
        value = kl(first, second, over=over)
        assert np.all(np.isfinite(value)) and np.all(value >= 0)
        for gradient in kl_grad(first, second, over=over):
            assert np.all(np.isfinite(gradient))

    def test_extents_differ_by_what_they_normalise(self):
        # Scaling one channel of A' moves mass between channels, not within one; the
        # floor is made small so that it does not spoil that.
        a, _ = draw_features()
        a = a + 0.5
        b = a * np.array([1.0, 1.0, 1.0, 2.0], np.float32)
        assert np.all(kl(a, b, over="all", floor=1e-6) > 1e-2)
        np.testing.assert_allclose(kl(a, b, over="spatial", floor=1e-6), 0, atol=1e-6)

    def test_independent_examples_and_vmap(self):
        a, b = draw_features()
        together = kl(a, b)
        spoilt = a.copy()
        spoilt[1] = np.nan
        np.testing.assert_array_equal(
            np.delete(kl(spoilt, b), 1), np.delete(together, 1)
        )
        one = jax.vmap(lambda x, y: losses.feature_kl(x[None], y[None])[0])
        np.testing.assert_allclose(one(a, b), together, rtol=1e-5)
        np.testing.assert_allclose(losses.feature_kl(a, b), together, rtol=1e-5)

    def test_unknown_extent_is_named(self):
        with pytest.raises(ValueError, match="over='channels'"):
            losses.feature_kl(*draw_features(), over="channels")
