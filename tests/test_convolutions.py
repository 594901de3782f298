"""The same numbers and derivatives with another order of the kernel's axes."""

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import convolutions

LAYOUT = ("NHWC", "HWIO", "NHWC")


def draw(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32)) / 3


class TestInFastOrder:
    def summed_gradients(self, images, kernel):
        """A gradient of a strided and of a plain convolution, in a loop."""

        def convolve(images):
            y = jax.lax.conv_general_dilated(
                images,
                kernel,
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return jnp.sum(jax.nn.softplus(y))

        def step(carry, _):
            return carry + jax.jit(jax.grad(convolve))(carry), None

        return jax.lax.scan(step, images, None, length=3)[0]

    def test_same_numbers_and_no_slow_order_left(self):
        images = draw((2, 8, 8, 3))
        kernel = draw((3, 3, 3, 4))
        reordered = convolutions.in_fast_order(self.summed_gradients)
        # A gradient's kernel is [space, out, in]: its axes 2 and 3 change places.
        slow, fast = "rhs_spec=(2, 3, 0, 1)", "rhs_spec=(3, 2, 0, 1)"
        before = str(jax.make_jaxpr(self.summed_gradients)(images, kernel))
        after = str(jax.make_jaxpr(reordered)(images, kernel))
        assert slow in before and slow not in after and fast in after
        np.testing.assert_allclose(
            jax.jit(reordered)(images, kernel),
            jax.jit(self.summed_gradients)(images, kernel),
            rtol=1e-6,
            atol=1e-6,
        )

    def test_same_derivative(self):
        images = draw((2, 8, 8, 3))
        kernel = draw((3, 3, 3, 4))
        slopes = [
            jax.jit(jax.grad(lambda k, fn=fn: jnp.sum(fn(images, k) ** 2)))(kernel)
            for fn in (
                self.summed_gradients,
                convolutions.in_fast_order(self.summed_gradients),
            )
        ]
        peak = float(jnp.max(jnp.abs(slopes[0])))
        np.testing.assert_allclose(slopes[1], slopes[0], rtol=0, atol=1e-5 * peak)
