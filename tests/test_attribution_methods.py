"""The methods of attribution, each against reference arrays or by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ibsgl_jax import attribution, saliency
from ibsgl_jax.models.heads import PooledLinear
from tests import golden_net
from tests.attribution_case import ATTRS, CLASSES, IMAGES, PARAMS, assert_close_to_peak

CAMS = golden_net.load("net1_cams")
CAM_NAMES = {
    "gradcam": "grad_cam",
    "hirescam": "hirescam",
    "gradcampp": "grad_cam_pp",
    "layercam": "layer_cam",
}
logits_fn = functools.partial(golden_net.logits, PARAMS)


def tapped_fn(images, perturbations):
    """The golden network with its three convolutions tapped, written by hand."""
    biases = []

    def conv_relu(x, layer):
        bias = PARAMS[f"{layer}_b"].reshape(1, 1, 1, -1)
        y = bias + jax.lax.conv_general_dilated(
            x,
            PARAMS[f"{layer}_w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        if perturbations is not None:
            y = y + perturbations[len(biases)]
        biases.append(jnp.broadcast_to(bias, y.shape))
        return jax.nn.relu(y)

    y = nn.max_pool(conv_relu(images, "conv1"), (2, 2), (2, 2))
    y = conv_relu(conv_relu(y, "conv2"), "conv3")
    pooled = jnp.mean(y, axis=(1, 2))
    return jnp.dot(pooled, PARAMS["fc_w"], precision="highest") + PARAMS["fc_b"][
        None
    ], biases


def both_classes(fn):
    """fn(classes [2]) for the true class and its rival, as the goldens' second axis."""
    return np.stack([fn(CLASSES[:, k]) for k in range(2)], axis=1)


def unit_range(maps):
    maps = maps - np.min(maps, axis=(-2, -1), keepdims=True)
    return maps / (1e-7 + np.max(maps, axis=(-2, -1), keepdims=True))


class TestGoldens:
    # The references' own tolerance is 5e-7 of the peak (raw) and 1e-6 (final).

    @pytest.mark.parametrize("tap", ["A", "B"])
    @pytest.mark.parametrize("name", CAM_NAMES)
    def test_cams(self, name, tap):
        head = functools.partial(golden_net.head, PARAMS, tap=tap)
        method = getattr(attribution, CAM_NAMES[name])
        features = jnp.asarray(PARAMS[f"act_{tap}"])
        raw = both_classes(jax.jit(lambda c: method(head, features, c, rectify=False)))
        assert_close_to_peak(raw, CAMS[f"{name}_{tap}_raw"], 5e-7)
        final = unit_range(np.maximum(raw, 0))
        final = unit_range(np.asarray(saliency.upsample(jnp.asarray(final), (32, 32))))
        np.testing.assert_allclose(final, CAMS[f"{name}_{tap}_final"], atol=1e-6)

    @pytest.mark.parametrize("tap", ["A", "B"])
    def test_feature_gradient(self, tap):
        head = functools.partial(golden_net.head, PARAMS, tap=tap)
        features = jnp.asarray(PARAMS[f"act_{tap}"])
        ours = both_classes(
            jax.jit(lambda c: attribution.class_gradient(head, features, c))
        )
        if tap == "A":
            assert_close_to_peak(ours, CAMS["grads_A"], 5e-7)
        else:
            spatial_mean = np.mean(ours, axis=(2, 3))
            assert_close_to_peak(spatial_mean, CAMS["grads_B_spatial_mean"], 5e-7)

    @pytest.mark.parametrize("name", CAM_NAMES)
    def test_cams_through_the_interface(self, name):
        features = functools.partial(golden_net.features, PARAMS, tap="A")
        head = functools.partial(golden_net.head, PARAMS, tap="A")
        maps = both_classes(
            lambda c: attribution.attribute(CAM_NAMES[name], features, head, IMAGES, c)
        )
        # The reference scales before it resizes; its 1e-7 in the scale shows there.
        np.testing.assert_allclose(unit_range(maps), CAMS[f"{name}_A_final"], atol=1e-5)

    def test_gradients(self):
        signed = both_classes(
            jax.jit(lambda c: attribution.gradient(logits_fn, IMAGES, c))
        )
        assert_close_to_peak(signed, ATTRS["saliency_signed"], 5e-7)
        assert_close_to_peak(np.abs(signed), ATTRS["saliency_abs"], 5e-7)
        product = both_classes(
            jax.jit(lambda c: attribution.input_x_gradient(logits_fn, IMAGES, c))
        )
        assert_close_to_peak(product, ATTRS["inputxgradient"], 5e-7)

    @pytest.mark.usefixtures("optimized")
    @pytest.mark.parametrize("rule", attribution.RULES)
    def test_integrated_gradients(self, rule):
        ours = both_classes(
            jax.jit(
                lambda c: attribution.integrated_gradients(
                    logits_fn, IMAGES, c, rule=rule
                )
            )
        )
        assert_close_to_peak(ours, ATTRS[f"ig50_{rule}"], 5e-7)
        if rule == "gausslegendre":
            at_image, at_zero = logits_fn(IMAGES), logits_fn(jnp.zeros_like(IMAGES))
            change = np.take_along_axis(np.asarray(at_image - at_zero), CLASSES, axis=1)
            delta = np.sum(ours, axis=(2, 3, 4)) - change
            # Float32 sums of 3,072 values of order 1e-2.
            np.testing.assert_allclose(
                delta, ATTRS["ig_delta_gausslegendre"], atol=1e-5
            )

    def test_full_grad(self):
        ours = both_classes(
            jax.jit(lambda c: attribution.full_grad(tapped_fn, IMAGES, c))
        )
        np.testing.assert_allclose(unit_range(ours), CAMS["fullgrad_final"], atol=1e-6)


class TwoBlocks(nn.Module):
    """Convolutions with and without bias, BatchNorm, ReLU, pooling, a dense layer."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3), name="conv1")(images)
        x = nn.relu(nn.BatchNorm(not train, name="bn1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(not train, name="bn2")(x))
        return nn.Dense(5, name="fc")(jnp.mean(x, axis=(1, 2)))


class TestFullGradients:
    def test_completeness_on_linen(self):
        images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
        model = TwoBlocks()
        # Off the defaults: every bias, scale, running mean and variance matters.
        draws = np.random.default_rng(2)
        variables = jax.tree.map(
            lambda x: np.float32(draws.uniform(-0.5, 1.0, x.shape) ** 2 + 0.1),
            jax.eval_shape(model.init, jax.random.key(0), images),
        )
        logits = jax.jit(model.apply)(variables, images)
        classes = jnp.array([0, 3, 4])
        tapped = attribution.make_tapped_fn(model, variables)
        tapped_logits, biases = jax.jit(lambda x: tapped(x, None))(images)
        np.testing.assert_allclose(tapped_logits, logits, rtol=1e-5)
        assert [b.shape[1:] for b in biases] == [
            (8, 8, 8),
            (8, 8, 8),
            (4, 4, 8),
            (5,),
        ]
        at_input, at_biases = jax.jit(attribution.full_gradients)(
            tapped, images, classes
        )
        total = sum(jnp.sum(x.reshape(3, -1), axis=1) for x in (at_input, *at_biases))
        expected = logits[jnp.arange(3), classes]
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        # The check can fail: without the biases the sum is far off.
        only_input = jnp.sum(at_input.reshape(3, -1), axis=1)
        assert np.min(np.abs(only_input - expected)) > 0.01

    def test_batch_norm_bias_counts_the_running_mean(self):
        model = nn.BatchNorm(use_running_average=True)
        images = jnp.ones((1, 2, 2, 3))
        variables = {
            "params": {"scale": jnp.full(3, 2.0), "bias": jnp.full(3, 0.5)},
            "batch_stats": {"mean": jnp.full(3, 3.0), "var": jnp.full(3, 4.0)},
        }
        _, (bias,) = attribution.make_tapped_fn(model, variables)(images, None)
        # 0.5 - 2 * 3 / sqrt(4 + 1e-5)
        np.testing.assert_allclose(bias, jnp.full((1, 2, 2, 3), -2.5), rtol=1e-5)


class TestSmoothGrad:
    def test_without_noise_is_the_gradient(self):
        run = functools.partial(attribution.smooth_grad, logits_fn, IMAGES)
        run = functools.partial(run, num_samples=3, noise_level=0.0)
        plain = jax.jit(run)(CLASSES[:, 0], key=jax.random.key(0))
        assert_close_to_peak(plain, ATTRS["saliency_signed"][:, 0], 1e-6)

    def test_noise_scales_with_the_image_range(self):
        # For y = sum x^3 / 3 the gradient is x^2; its mean under noise is x^2 + std^2.
        images = jnp.zeros((1, 8, 8, 3)).at[0, 0, 0].set(2.0)
        smoothed = attribution.smooth_grad(
            lambda x: jnp.sum(x**3, axis=(1, 2, 3))[:, None] / 3,
            images,
            jnp.zeros(1, int),
            key=jax.random.key(0),
            num_samples=400,
            noise_level=0.1,
        )
        # std = 0.2; the mean of 189 * 400 squares is within 2 %.
        np.testing.assert_allclose(jnp.mean(smoothed[0, 1:]), 0.04, rtol=0.02)


class TestGradCamPlusPlus:
    def test_finite_where_the_denominator_vanishes(self):
        # Negative features: 2 g^2 + S g^3 = 0 for S = -2 / g.
        features = jnp.full((1, 2, 2, 1), -0.5)
        head = PooledLinear(jnp.full((1, 1), 4.0), jnp.zeros(1))

        def total(features):
            return jnp.sum(
                attribution.grad_cam_pp(
                    head, features, jnp.zeros(1, int), rectify=False
                )
            )

        value, slope = jax.jit(jax.value_and_grad(total))(features)
        assert np.isfinite(value) and np.all(np.isfinite(slope))
