"""The same numbers and derivatives by operations that a CPU is fast at."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ibsgl_jax import convolutions

LAYOUT = ("NHWC", "HWIO", "NHWC")


def draw(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32)) / 3


def operations(fn, *args, platform="cpu"):
    """The names of the operations of a program for a platform."""
    traced = jax.jit(fn).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"stablehlo\.(\w+)", text)


def with_gradients(convolve):
    """Results, both gradients, and the gradient of what depends on those."""

    def gradients(images, kernel):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(convolve(*args))), (0, 1))(
            images, kernel
        )

    def second(images, kernel):
        def total(*args):
            return sum(jnp.sum(jnp.sin(x)) for x in gradients(*args))

        return jax.grad(total, (0, 1))(images, kernel)

    return lambda *args: (convolve(*args), gradients(*args), second(*args))


class TestConvolutions:
    @pytest.mark.parametrize(
        "size, kernel, strides, padding, dilation",
        [
            ((9, 7), 1, 1, "SAME", 1),
            ((9, 8), 1, 2, "SAME", 1),
            ((8, 8), 1, 3, ((1, 2), (0, 1)), 1),
            ((3, 3), 3, 1, "VALID", 1),
            ((5, 5), 3, 1, "VALID", 2),
            ((29, 30), 3, 1, "SAME", 1),
            ((57, 58), 3, 2, ((1, 1), (1, 0)), 1),
            ((34, 34), 3, 1, "VALID", 2),
        ],
    )
    def test_same_numbers_and_gradients(self, size, kernel, strides, padding, dilation):
        images, kernel = draw((2, *size, 3)), draw((kernel, kernel, 3, 4))

        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images,
                kernel,
                (strides, strides),
                padding,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=LAYOUT,
            )

        all_fn = with_gradients(convolve)
        expected = jax.jit(all_fn)(images, kernel)
        found = jax.jit(convolutions.fast_on_cpu(all_fn))(images, kernel)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            peak = float(jnp.max(jnp.abs(b)))
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * peak)

    @pytest.mark.parametrize("strides", [1, 2])
    def test_of_one_place_are_products_on_a_cpu_alone(self, strides):
        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images, kernel, (strides, strides), "SAME", dimension_numbers=LAYOUT
            )

        fast = convolutions.fast_on_cpu(
            jax.value_and_grad(lambda *args: jnp.sum(convolve(*args) ** 2), (0, 1))
        )
        args = draw((2, 8, 8, 3)), draw((1, 1, 3, 4))
        assert "convolution" not in operations(fast, *args)
        assert operations(fast, *args).count("dot_general") == 3
        for other in ("tpu", "cuda"):
            assert operations(fast, *args, platform=other).count("convolution") == 3
            assert "dot_general" not in operations(fast, *args, platform=other)

    def test_what_was_rewritten_is_left(self):
        """As where a bottleneck's step, fast itself, stands in a training step."""

        def gradient(images, kernel):
            return jax.grad(
                lambda x: jnp.sum(
                    jax.lax.conv_general_dilated(
                        x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT
                    )
                    ** 2
                )
            )(images)

        args = draw((2, 8, 8, 3)), draw((1, 1, 3, 4))
        once = convolutions.fast_on_cpu(gradient)
        twice = convolutions.fast_on_cpu(once)
        texts = [str(jax.make_jaxpr(fn)(*args)) for fn in (once, twice)]
        assert [text.count("platform_index[") for text in texts] == [2, 2]

    def test_in_conditions_and_loops_too(self):
        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT
            )

        def chosen(flag, images, kernel):
            gradient = jax.grad(lambda x: jnp.sum(convolve(x, kernel) ** 2))
            images = jax.lax.cond(flag, gradient, lambda x: x, images)
            return jax.lax.fori_loop(0, 2, lambda _, x: convolve(x, kernel), images)

        args = jnp.bool_(True), draw((2, 8, 8, 3)), draw((1, 1, 3, 3))
        fast = convolutions.fast_on_cpu(chosen)
        assert "convolution" not in operations(fast, *args)
        np.testing.assert_allclose(
            jax.jit(fast)(*args), jax.jit(chosen)(*args), rtol=1e-5, atol=1e-5
        )


class TestMaximum:
    @pytest.mark.parametrize(
        "window, strides, padding",
        [
            ((3, 3), (2, 2), ((1, 1), (1, 1))),
            ((2, 2), (2, 2), "VALID"),
            ((3, 2), (1, 2), "SAME"),
            ((5, 5), (2, 2), "SAME"),
        ],
    )
    def test_of_equal_ones_the_first_is_given_all(self, window, strides, padding):
        # Few different values, so that nearly every window has its maximum twice.
        images = jnp.round(draw((2, 9, 8, 3)))

        def gradient(images):
            return jax.grad(
                lambda x: jnp.sum(jnp.sin(nn.max_pool(x, window, strides, padding)))
            )(images)

        fast = convolutions.fast_on_cpu(gradient)
        np.testing.assert_allclose(
            jax.jit(fast)(images), jax.jit(gradient)(images), rtol=1e-6, atol=1e-6
        )
        is_kept = np.prod(window) > convolutions.MAX_WINDOW
        assert ("select_and_scatter" in operations(fast, images)) == is_kept
        assert "select_and_scatter" in operations(fast, images, platform="tpu")


class TestOrder:
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
        reordered = convolutions.fast_on_cpu(self.summed_gradients)
        # A gradient's kernel is [space, out, in]: its axes 2 and 3 change places.
        slow, fast = "rhs_spec=(2, 3, 0, 1)", "rhs_spec=(3, 2, 0, 1)"
        before = str(jax.make_jaxpr(self.summed_gradients)(images, kernel))
        after = str(jax.make_jaxpr(reordered)(images, kernel))
        assert slow in before and fast in after
        texts = {
            platform: jax.jit(reordered)
            .trace(images, kernel)
            .lower(lowering_platforms=(platform,))
            .as_text()
            for platform in ("cpu", "tpu", "cuda")
        }
        slow = "x[0, 1, o, i]->"
        assert slow not in texts["cpu"]
        for other in ("tpu", "cuda"):
            assert slow in texts[other]
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
                convolutions.fast_on_cpu(self.summed_gradients),
            )
        ]
        peak = float(jnp.max(jnp.abs(slopes[0])))
        np.testing.assert_allclose(slopes[1], slopes[0], rtol=0, atol=1e-5 * peak)


class TestDepthwise:
    @pytest.mark.parametrize(
        "size, taps, stride, padding",
        [
            ((9, 8), 3, 1, "SAME"),
            ((9, 8), 5, 2, "SAME"),
            ((7, 10), 3, 2, "VALID"),
            ((8, 8), 5, 2, [(2, 2), (1, 3)]),
        ],
    )
    def test_same_numbers_and_gradients(self, size, taps, stride, padding):
        images, kernel = draw((3, *size, 4)), draw((taps, taps, 1, 4))
        options = dict(dimension_numbers=LAYOUT, feature_group_count=4)

        def run(convolve, images, kernel):
            y, pull_back = jax.vjp(
                lambda *args: convolve(*args, (stride, stride), padding, **options),
                images,
                kernel,
            )
            return y, pull_back(jnp.cos(y))

        found = jax.jit(functools.partial(run, convolutions.depthwise))(images, kernel)
        expected = run(jax.lax.conv_general_dilated, images, kernel)
        # Sums of up to 25 taps, and of up to 300 places, of single precision.
        chex.assert_trees_all_close(found, expected, atol=1e-5)

    def test_keeps_the_dtype(self):
        images, kernel = draw((2, 8, 8, 4)), draw((3, 3, 1, 4))
        options = dict(dimension_numbers=LAYOUT, feature_group_count=4)
        args = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        y = convolutions.depthwise(*args, (1, 1), "SAME", **options)
        chex.assert_type(y, jnp.bfloat16)
        expected = convolutions.depthwise(images, kernel, (1, 1), "SAME", **options)
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02)

    def test_other_devices_get_the_convolution(self):
        """Lowered for a TPU, on a machine without one."""
        lowered = (
            jax.jit(
                lambda x, k: convolutions.depthwise(
                    x,
                    k,
                    (1, 1),
                    "SAME",
                    dimension_numbers=LAYOUT,
                    feature_group_count=4,
                )
            )
            .trace(draw((2, 8, 8, 4)), draw((3, 3, 1, 4)))
            .lower(lowering_platforms=("tpu",))
        )
        text = lowered.as_text()
        assert "stablehlo.convolution" in text and "stablehlo.while" not in text


def test_depthwise_is_exported_for_any_batch_size():
    """A batch without a number takes the plain convolution, with the same result."""
    from jax import export

    images = np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 1, 4)).astype(np.float32)

    def fn(images):
        return convolutions.depthwise(
            images,
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    (size,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((size, 6, 6, 4), np.float32)
    exported = export.export(jax.jit(fn), platforms=("cpu", "tpu"))(shape)
    np.testing.assert_allclose(exported.call(images), fn(images), rtol=1e-4, atol=1e-5)
