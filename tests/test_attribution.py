"""Attribution: the promises of its one interface."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import attribution, bottleneck, feature_stats
from ibsgl_jax.models.heads import PooledLinear
from tests import golden_net
from tests.attribution_case import ATTRS, CLASSES, IMAGES, PARAMS, assert_close_to_peak

DIFFERENTIABLE = sorted(set(attribution.METHODS) - {"ib", "random"})


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
        # Draws per channel [1, samples, K], none per cell [1, samples, H, W, K].
        assert "f32[1,2,4]" in jaxpr and "f32[1,2,4,4,4]" not in jaxpr

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
                num_shards=1,
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


class TestPredict:
    def test_chunks_equal_the_whole(self):
        logits = attribution.predict(
            features_fn, head_fn, PARAMS["inputs"], chunk_size=3
        )
        np.testing.assert_allclose(logits, PARAMS["logits"], rtol=1e-5, atol=1e-5)
