"""Attribution: the reference arrays, and the one interface's promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ibsgl_jax import attribution, bottleneck, feature_stats, saliency
from ibsgl_jax.models.heads import PooledLinear
from tests import golden_net

PARAMS = golden_net.load("net1_model")
CAMS = golden_net.load("net1_cams")
ATTRS = golden_net.load("net1_attrs")
IMAGES = jnp.asarray(PARAMS["inputs"][:2])
CLASSES = PARAMS["classes"][:2]
CAM_NAMES = {
    "gradcam": "grad_cam",
    "hirescam": "hirescam",
    "gradcampp": "grad_cam_pp",
    "layercam": "layer_cam",
}
DIFFERENTIABLE = sorted(set(attribution.METHODS) - {"ib", "random"})
logits_fn = functools.partial(golden_net.logits, PARAMS)


def features_fn(images):
    return golden_net.features(PARAMS, images, "B")


def head_fn(features):
    return golden_net.head(PARAMS, features, "B")


def smooth_features_fn(images, perturbations=None):
    """One convolution without a corner, so that maps have a numerical derivative."""
    y = jax.lax.conv_general_dilated(
        images,
        PARAMS["conv1_w"][..., :4],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return jax.nn.softplus(y if perturbations is None else y + perturbations[0])


def smooth_head_fn(features):
    pooled = jnp.mean(features, axis=(1, 2))
    return jnp.square(jnp.dot(pooled, PARAMS["fc_w"][:4], precision="highest"))


def smooth_tapped_fn(images, perturbations):
    features = smooth_features_fn(images, perturbations)
    return smooth_head_fn(features), [jnp.full_like(features, 0.5)]


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


def assert_close_to_peak(actual, expected, tolerance):
    peak = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * peak)


MOMENTS = feature_stats.Moments(
    mean=jnp.full((4, 4, 4), 0.7),
    std=jnp.full((4, 4, 4), 3.0),
    active=jnp.ones((4, 4, 4), bool),
)
# What each method needs beyond the images, for the smooth network.
OPTIONS = {method: {} for method in attribution.METHODS} | {
    "ib": dict(
        key=jax.random.key(0),
        moments=MOMENTS,
        config=bottleneck.BottleneckConfig(num_steps=3, num_samples=2),
    ),
    "smooth_grad": dict(key=jax.random.key(0), num_samples=2),
    "random": dict(key=jax.random.key(0)),
    "integrated_gradients": dict(num_steps=3),
    "full_grad": dict(tapped_fn=smooth_tapped_fn),
}


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


class TestAttribute:
    @pytest.mark.parametrize("method", attribution.METHODS)
    def test_neighbours_and_place_do_not_matter(self, method):
        images = jnp.asarray(PARAMS["inputs"][:5, 12:20, 12:20])
        classes = PARAMS["labels"][:5]
        run = functools.partial(
            attribution.attribute,
            method,
            smooth_features_fn,
            smooth_head_fn,
            **OPTIONS[method],
        )
        maps = run(images, classes)
        chex.assert_shape(maps, (5, 8, 8))
        assert maps.dtype == jnp.float32
        assert np.all(np.isfinite(maps)) and np.max(np.abs(maps)) > 0
        # The ragged last chunk holds image 4 and a copy; then every place is another.
        chunked = run(images, classes, chunk_size=2)
        # Other batch sizes sum in another order; Adam steps pass that on.
        assert_close_to_peak(chunked, maps, 1e-5)
        backwards = run(images[::-1], classes[::-1], chunk_size=2)
        assert_close_to_peak(backwards[::-1], maps, 1e-5)

    @pytest.mark.parametrize("method", attribution.RANDOM_METHODS)
    def test_keys_per_image_travel_with_the_image(self, method):
        images = jnp.broadcast_to(IMAGES[:1, 12:20, 12:20], (3, 8, 8, 3))
        keys = jax.random.split(jax.random.key(5), 3)
        run = functools.partial(
            attribution.attribute,
            method,
            smooth_features_fn,
            smooth_head_fn,
            images,
            np.zeros(3, int),
        )
        maps = run(**OPTIONS[method] | {"key": keys}, chunk_size=2)
        assert np.max(np.abs(maps[0] - maps[1])) > 5e-5 * np.max(np.abs(maps))
        one = run(**OPTIONS[method] | {"key": keys[1]}, chunk_size=2)
        assert_close_to_peak(one[1], maps[1], 1e-5)
        legacy = run(
            **OPTIONS[method] | {"key": jax.random.key_data(keys[1])}, chunk_size=2
        )
        np.testing.assert_array_equal(legacy, one)

    def test_default_class_is_the_predicted_one(self):
        images = jnp.asarray(PARAMS["inputs"])
        predicted = np.argmax(PARAMS["logits"], axis=-1)
        run = functools.partial(
            attribution.attribute, "hirescam", features_fn, head_fn, images
        )
        np.testing.assert_array_equal(run(), run(predicted))
        assert np.max(np.abs(run() - run((predicted + 1) % 10))) > 0.1

    def test_bottleneck_at_an_inner_layer_is_in_bits_per_pixel(self):
        stats = golden_net.load("net1_iba_stats")
        moments = feature_stats.Moments(
            *(stats[f"{name}_A"] for name in ("mean", "std", "active"))
        )
        options = OPTIONS["ib"] | {"moments": moments}
        features = functools.partial(golden_net.features, PARAMS, tap="A")
        head = functools.partial(golden_net.head, PARAMS, tap="A")
        maps = attribution.attribute(
            "ib", features, head, IMAGES, chunk_size=1, **options
        )
        bits = jax.jit(
            lambda features, classes: (
                bottleneck.attribute(
                    options["key"],
                    head,
                    features,
                    classes,
                    moments,
                    config=options["config"],
                ).saliency
            )
        )(PARAMS["act_A"], np.argmax(PARAMS["logits"][:2], axis=-1))
        # 16 x 16 cells -> 32 x 32 pixels; bilinear weights with clamped edges keep
        # the sum.
        np.testing.assert_allclose(
            np.sum(maps, axis=(1, 2)), np.sum(bits, axis=(1, 2)), rtol=1e-4
        )

    def test_pooled_head_keeps_its_shortcut(self):
        head = PooledLinear(jnp.asarray(PARAMS["fc_w"][:4]), jnp.zeros(10))

        def explain(images):
            return attribution.attribute(
                "ib", smooth_features_fn, head, images, chunk_size=1, **OPTIONS["ib"]
            )

        jaxpr = str(jax.make_jaxpr(explain)(IMAGES[:, 12:20, 12:20]))
        # Draws per channel [samples, 1, K], none per cell [samples, 1, H, W, K].
        assert "f32[2,1,4]" in jaxpr and "f32[2,1,4,4,4]" not in jaxpr

    def test_one_trace_for_many_calls(self):
        traced = chex.assert_max_traces(features_fn, n=2)  # classes are checked once
        head = PooledLinear(jnp.asarray(PARAMS["fc_w"]), jnp.asarray(PARAMS["fc_b"]))
        for i in range(3):
            scaled = PooledLinear(head.kernel * (1.0 + i), head.bias)
            maps = attribution.attribute(
                "hirescam", traced, scaled, IMAGES + i, CLASSES[:, i % 2], chunk_size=1
            )
        assert np.all(np.isfinite(maps))

    def test_a_thousand_images_in_the_memory_of_one_chunk(self):
        def temporary_bytes(num_images):
            arguments = (jax.tree_util.Partial(f) for f in (features_fn, head_fn))
            images = jax.ShapeDtypeStruct((num_images, 32, 32, 3), jnp.float32)
            classes = jax.ShapeDtypeStruct((num_images,), jnp.int32)
            lowered = attribution._attribute.lower(
                *arguments,
                None,
                images,
                classes,
                None,
                None,
                method="input_x_gradient",
                channels="sum",
                chunk_size=10,
                options=(),
            )
            return lowered.compile().memory_analysis().temp_size_in_bytes

        one_chunk = temporary_bytes(10)
        # One float32 feature map of layer 1 alone would be 65 MB for 1000 images.
        assert one_chunk > 1e6
        assert temporary_bytes(1000) < 1.5 * one_chunk

    def test_an_inner_layer_takes_the_memory_of_one_chunk(self):
        """The bottleneck there holds num_samples copies of every image of a chunk."""

        shape = 16, 16, 32
        moments = feature_stats.Moments(
            jnp.zeros(shape), jnp.ones(shape), jnp.ones(shape, bool)
        )

        def temporary_bytes(num_images):
            images = jax.ShapeDtypeStruct((num_images, 32, 32, 3), jnp.float32)
            classes = jax.ShapeDtypeStruct((num_images,), jnp.int32)
            explain = functools.partial(
                attribution.attribute,
                "ib",
                functools.partial(golden_net.features, PARAMS, tap="A"),
                functools.partial(golden_net.head, PARAMS, tap="A"),
                chunk_size=2,
                key=jax.random.key(0),
                moments=moments,
            )
            compiled = jax.jit(explain).lower(images, classes).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        one_chunk = temporary_bytes(2)
        # Ten noisy copies of two images' features, float32, and as much of gradients.
        assert one_chunk > 2 * 10 * 2 * 4 * np.prod(shape)
        assert temporary_bytes(64) < 1.1 * one_chunk

    @pytest.mark.parametrize("method", DIFFERENTIABLE)
    def test_gradient_in_images(self, method):
        images = IMAGES[:, 12:20, 12:20]

        @jax.jit
        @jax.value_and_grad
        def total(images):
            maps = attribution.attribute(
                method,
                smooth_features_fn,
                smooth_head_fn,
                images,
                CLASSES[:, 0],
                **OPTIONS[method],
            )
            return 100 * jnp.sum(jnp.square(maps))

        slope = total(images)[1]
        norm = float(jnp.linalg.norm(slope))
        assert np.isfinite(norm) and norm > 0
        # Up and down the gradient by a small step: twice the step times the norm.
        step = 0.01 * slope / norm
        climb = (total(images + step)[0] - total(images - step)[0]) / 0.02
        np.testing.assert_allclose(climb, norm, rtol=0.01)

    @pytest.mark.parametrize("method", ["hirescam", "gradient"])
    def test_gradient_in_head_params(self, method):
        head = PooledLinear(jnp.asarray(PARAMS["fc_w"][:4]), jnp.zeros(10))

        def total(head, chunk_size=2):
            return jnp.sum(
                attribution.attribute(
                    method,
                    smooth_features_fn,
                    head,
                    IMAGES,
                    CLASSES[:, 0],
                    chunk_size=chunk_size,
                )
            )

        slope = jax.jit(jax.grad(total))(head)
        assert np.max(np.abs(slope.kernel)) > 0
        chunked = jax.jit(jax.grad(functools.partial(total, chunk_size=1)))(head)
        assert_close_to_peak(chunked.kernel, slope.kernel, 1e-5)

    def test_gradient_in_what_a_closure_holds(self):
        def total(kernel):
            def head(features):
                return jnp.mean(features, axis=(1, 2)) @ kernel

            maps = attribution.attribute("hirescam", features_fn, head, IMAGES)
            return jnp.sum(maps)

        kernel = jnp.asarray(PARAMS["fc_w"])
        value, slope = jax.jit(jax.value_and_grad(total))(kernel)
        # The maps are linear in the kernel where they are not cut off.
        np.testing.assert_allclose(jnp.sum(slope * kernel), value, rtol=1e-4)

    def test_works_inside_jit(self):
        run = functools.partial(
            attribution.attribute, "layer_cam", features_fn, head_fn, chunk_size=1
        )
        jitted = jax.jit(run)(IMAGES, jnp.asarray(CLASSES[:, 0]))
        np.testing.assert_allclose(jitted, run(IMAGES, CLASSES[:, 0]), rtol=1e-6)

    def test_channels(self):
        run = functools.partial(
            attribution.attribute,
            "gradient",
            features_fn,
            head_fn,
            IMAGES,
            CLASSES[:, 0],
        )
        signed = ATTRS["saliency_signed"][:, 0]
        assert_close_to_peak(run(channels="sum"), np.sum(signed, axis=-1), 1e-6)
        assert_close_to_peak(run(), np.sum(np.abs(signed), axis=-1), 1e-6)

    @pytest.mark.parametrize(
        "change, line",
        [
            (dict(method="gradcam"), "no method 'gradcam'.*hirescam"),
            (dict(classes=np.zeros(3, int)), "give one class per image"),
            (dict(classes=np.array([0, 10])), "class 10 is out of range.*0 to 9"),
            (dict(classes=np.array([-1, 0])), "class -1 is out of range"),
            (dict(classes=np.array([0.0, 1.0])), "give integers"),
            (dict(method="ib"), "'ib' needs moments"),
            (dict(method="ib", key=jax.random.key(0)), "'ib' needs moments"),
            (
                dict(method="random", key=jax.random.split(jax.random.key(0), 5)),
                "keys .N., one per image",
            ),
            (dict(method="full_grad"), "'full_grad' needs tapped_fn.*make_tapped_fn"),
            (dict(chunk_size=0), "chunk_size=0"),
            (dict(channels="max"), "channels='max'"),
            (dict(images=np.zeros((2, 8, 8, 3), np.uint8)), "uint8: give floats"),
            (dict(images=np.zeros((0, 8, 8, 3), np.float32)), "N >= 1"),
            (dict(method="integrated_gradients", rule="simpson"), "rule='simpson'"),
            (dict(method="integrated_gradients", num_steps=0), "num_steps=0"),
            (
                dict(method="smooth_grad", key=jax.random.key(0), num_samples=0),
                "num_samples=0",
            ),
        ],
    )
    def test_errors_name_the_mend(self, change, line):
        arguments = dict(method="hirescam", images=IMAGES) | change
        method, images = arguments.pop("method"), arguments.pop("images")
        with pytest.raises(ValueError, match=line) as raised:
            attribution.attribute(method, features_fn, head_fn, images, **arguments)
        assert "\n" not in str(raised.value)


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


class TestPredict:
    def test_chunks_equal_the_whole(self):
        logits = attribution.predict(
            features_fn, head_fn, PARAMS["inputs"], chunk_size=3
        )
        np.testing.assert_allclose(logits, PARAMS["logits"], rtol=1e-5, atol=1e-5)


class TestWhatIsExpected:
    """One line for a head, a layer or a key of another kind, from every method."""

    MOMENTS = feature_stats.Moments(
        jnp.zeros((4, 4, 5)), jnp.ones((4, 4, 5)), jnp.ones((4, 4, 5), bool)
    )

    def run(self, method, head=lambda f: f.mean((1, 2)), layer=lambda x: x, **options):
        def features_fn(images):
            return layer(jnp.concatenate([images, images[..., :2]], -1)[:, ::2, ::2])

        def tapped_fn(images, perturbations):
            del perturbations
            return head(features_fn(images)), []

        return attribution.attribute(
            method,
            features_fn,
            head,
            options.pop("images", jnp.ones((2, 8, 8, 3))),
            **{
                "classes": jnp.zeros(2, jnp.int32),
                "key": jax.random.key(0),
                "moments": self.MOMENTS,
                "tapped_fn": tapped_fn,
                **options,
            },
        )

    @pytest.mark.parametrize("method", attribution.METHODS)
    @pytest.mark.parametrize(
        ("head", "words"),
        [
            (lambda f: (f.mean((1, 2)), f), "tuple of 2"),
            (
                lambda f: {"logits": f.mean((1, 2))},
                r"dict with .*\(features\)\['logits",
            ),
            (lambda f: f.mean((1, 2, 3)), "one logit per image"),
            (lambda f: f, r"logits \[N, C\], floats"),
            (lambda f: f.mean((1, 2)).argmax(-1, keepdims=True), "int32"),
        ],
    )
    def test_head(self, method, head, words):
        with pytest.raises(ValueError, match=words) as error:
            self.run(method, head)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "head",
        [
            lambda f: f.mean((1, 2))[:, :1],
            PooledLinear(jnp.ones((5, 1)), jnp.zeros(1)),
        ],
    )
    def test_one_logit_has_no_bottleneck(self, head):
        with pytest.raises(ValueError, match="one logit, whose softmax is 1") as error:
            self.run("ib", head)
        assert "\n" not in str(error.value)
        maps = self.run("ib", lambda f: jnp.concatenate([-head(f), head(f)], -1) / 2)
        assert jnp.any(maps > 0)
        assert jnp.any(self.run("grad_cam", head) > 0)

    @pytest.mark.parametrize("method", attribution.FEATURE_METHODS)
    def test_layers_that_are_no_map(self, method):
        with pytest.raises(ValueError, match="a map needs"):
            self.run(method, lambda f: f, layer=lambda x: x.mean((1, 2)))

    @pytest.mark.parametrize("method", attribution.RANDOM_METHODS)
    @pytest.mark.parametrize("key", [0, 1.5, "a", np.int64(3), np.zeros(2), None])
    def test_key(self, method, key):
        with pytest.raises(ValueError, match=r"jax\.random\.key\(0\)"):
            self.run(method, key=key)

    @pytest.mark.parametrize(
        ("method", "dtype"),
        [
            *((name, jnp.bfloat16) for name in attribution.METHODS if name != "ib"),
            ("smooth_grad", jnp.float16),
            ("integrated_gradients", jnp.float16),
        ],
    )
    def test_half_precision_images(self, method, dtype):
        images = IMAGES[:2, :8, :8].astype(dtype)
        low = self.run(method, images=images)
        high = self.run(method, images=images.astype(jnp.float32))
        assert low.dtype == jnp.float32
        peak = float(jnp.max(jnp.abs(high)))
        np.testing.assert_allclose(low, high, atol=0.03 * peak)

    def test_classes_by_name(self):
        fn = attribution.make_attribution_fn(
            "grad_cam", lambda x: x, lambda f: f.mean((1, 2))
        )
        images, classes = jnp.asarray(IMAGES[:2, :8, :8]), jnp.array([1, 2])
        np.testing.assert_array_equal(fn(images, classes=classes), fn(images, classes))
