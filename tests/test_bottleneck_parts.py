"""What the bottleneck is made of: the capacity, the blur and Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import bottleneck
from tests import reference
from tests.bottleneck_case import IBA, assert_finite


class TestCapacity:
    def test_by_hand(self):
        # No signal (rest 1): the noise itself, 0 nats whatever r. Half noise at r = 2:
        # -1/2 (1 + log 1/4 - 1 - 1/4) = log 2 + 1/8.
        rest = jnp.array([1.0, 1.0, 0.5])
        r_squared = jnp.array([0.0, 9.0, 4.0])
        np.testing.assert_allclose(
            bottleneck.capacity(rest, r_squared), [0, 0, np.log(2) + 0.125], atol=1e-7
        )
        inactive = bottleneck.capacity(rest, r_squared, jnp.array([True, True, False]))
        np.testing.assert_allclose(inactive, 0.0, atol=1e-7)

    def test_never_negative(self):
        rest = jnp.linspace(1e-3, 1.0, 1000)[:, None]
        nats = bottleneck.capacity(rest, jnp.array([[0.0, 1e-6, 1.0]]))
        assert nats.min() > -2e-7

    def test_finite_value_and_gradient_at_any_alpha(self):
        blur = bottleneck.make_blur((3, 3), 1.0)

        def total(alpha):
            rest = bottleneck.noise_share(jnp.full((3, 3, 1), alpha), blur)
            return jnp.sum(bottleneck.capacity(rest, jnp.float32(4.0)))

        alphas = jnp.array([-1e4, -80.0, 0.0, 17.0, 80.0, 86.5, 90.0, 1e4])
        assert_finite(jax.jit(jax.vmap(jax.value_and_grad(total)))(alphas))


class TestMakeBlur:
    def test_golden(self):
        blur = bottleneck.make_blur((16, 16), 1.0)
        smooth = blur(jnp.asarray(IBA["smooth_in"]))
        peak = IBA["smooth_out"].max()
        np.testing.assert_allclose(smooth, IBA["smooth_out"], atol=3e-7 * peak)

    @pytest.mark.parametrize(
        ("size", "sigma"),
        [((1, 1), 1.0), ((1, 6), 0.1), ((2, 2), 2.0), ((3, 2), 1.0), ((7, 9), 0.7)],
    )
    def test_equals_a_window_slid_over_a_reflected_border(self, size, sigma):
        maps = np.random.default_rng(0).random((*size, 2), np.float32)
        smooth = bottleneck.make_blur(size, sigma)(maps)
        np.testing.assert_allclose(smooth, reference.blur(maps, sigma), atol=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 9)])
    def test_a_tpu_blurs_all_cells_at_once_with_the_same_result(self, size):
        maps = np.random.default_rng(0).random((*size, 3, 2), np.float32)
        ours = bottleneck.make_blur(size, 1.0)
        theirs = bottleneck.make_blur(size, 1.0, platform="tpu")
        np.testing.assert_allclose(theirs(maps), ours(maps), atol=1e-6)
        one, other = (jax.linear_transpose(blur, maps)(maps) for blur in (ours, theirs))
        np.testing.assert_allclose(other[0], one[0], atol=1e-6)
        # A product of that many cells would cost more than the head: two small ones.
        text = str(
            jax.make_jaxpr(bottleneck.make_blur((56, 56), 1.0, platform="tpu"))(
                jnp.ones((56, 56, 1, 1))
            )
        )
        assert text.count("dot_general") == 2

    def test_none_is_the_identity(self):
        maps = jnp.ones((2, 3, 4))
        assert bottleneck.make_blur((2, 3), None)(maps) is maps


class TestMakeAdam:
    def test_equals_float64(self):
        gradients = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
        tx = bottleneck.make_adam(0.5, 12)
        state = tx.init(jnp.zeros(4))
        update = jax.jit(tx.update)
        m = v = np.zeros(4)
        for t, g in enumerate(gradients.astype(np.float64), start=1):
            updates, state = update(jnp.asarray(g, jnp.float32), state)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            expected = -0.5 * m_hat / (np.sqrt(v_hat) + 1e-8)
            # optax.adam is off by 1.5e-5 of the value in the first steps.
            np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-6)

    def test_zero_gradient_moves_nothing(self):
        tx = bottleneck.make_adam(1.0, 2)
        updates, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
        np.testing.assert_array_equal(updates, 0.0)
