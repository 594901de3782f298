"""Tapping: both halves equal the model, cost their share, and refuse what is no cut."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from ibsgl_jax import attribution, models, tapping
from tests.test_models import random_variables

IMAGE_SHAPE = (24, 24, 3)


@functools.cache
def images(num=2):
    return jax.random.normal(jax.random.key(7), (num, *IMAGE_SHAPE))


@functools.cache
def resnet():
    model = models.create("small_resnet", num_classes=5, num_filters=8)
    return model, random_variables(model, images())


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.dense(self.dropout(x.mean((1, 2))))


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def check_halves(features_fn, head_fn, logits, images, features_shape):
    features = jax.jit(features_fn)(images)
    assert features.shape == features_shape
    # The same operations, fused differently.
    np.testing.assert_allclose(jax.jit(head_fn)(features), logits, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(jax.jit(head_fn)(features * 0.5) - logits).max()) > 1e-3


class TestLinen:
    def test_halves_give_the_model(self):
        model, variables = resnet()
        features_fn, head_fn = tapping.linen(
            model, variables, "layer2_0", image_shape=IMAGE_SHAPE, train=False
        )
        logits = jax.jit(model.apply)(variables, images())
        check_halves(features_fn, head_fn, logits, images(), (2, 4, 4, 16))

    def test_agrees_with_the_split_of_the_model(self):
        model, variables = resnet()
        features_fn, head_fn = tapping.linen(
            model, variables, "layer3_0", image_shape=IMAGE_SHAPE
        )
        features = jax.jit(models.make_features_fn(model, variables))(images())
        np.testing.assert_allclose(
            jax.jit(features_fn)(images()), features, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            jax.jit(head_fn)(features),
            models.make_head_fn(model, variables)(features),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_the_dead_half_vanishes(self):
        model, variables = resnet()
        features_fn, head_fn = tapping.linen(
            model, variables, "layer2_0", image_shape=IMAGE_SHAPE
        )
        whole = flops(functools.partial(model.apply, variables), images())
        first = flops(features_fn, images())
        second = flops(head_fn, jnp.ones((2, 4, 4, 16)))
        # Fusions at the cut shift a few operations.
        assert first + second == pytest.approx(whole, rel=0.02)
        assert first < 0.8 * whole and second < 0.8 * whole

    def test_head_takes_another_batch_size_and_other_image_sizes(self):
        model, variables = resnet()
        features_fn, head_fn = tapping.linen(
            model, variables, "layer2_0", image_shape=IMAGE_SHAPE
        )
        large = jnp.concatenate([images(), images()], axis=2)
        features = jax.jit(features_fn)(large)
        assert features.shape == (2, 4, 8, 16)
        copies = jnp.repeat(features, 3, axis=0)
        np.testing.assert_allclose(
            jax.jit(head_fn)(copies),
            np.repeat(jax.jit(model.apply)(variables, large), 3, axis=0),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_functions_are_pytrees_that_hold_the_weights(self):
        model, variables = resnet()
        features_fn, head_fn = tapping.linen(
            model, variables, "layer2_0", image_shape=IMAGE_SHAPE
        )
        traces = []

        @jax.jit
        def logits(features_fn, head_fn, images):
            traces.append(1)
            return head_fn(features_fn(images))

        zeros = jax.tree.map(jnp.zeros_like, (features_fn, head_fn))
        expected = jax.jit(model.apply)(variables, images())
        np.testing.assert_allclose(
            logits(features_fn, head_fn, images()), expected, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(logits(*zeros, images()), 0 * expected)
        assert len(traces) == 1

    def test_features_are_differentiable(self):
        model, variables = resnet()
        _, head_fn = tapping.linen(
            model, variables, "layer3_0", image_shape=IMAGE_SHAPE
        )
        gradient = jax.jit(jax.grad(lambda a: head_fn(a)[0, 1]))(
            jnp.ones((1, 4, 4, 32))
        )
        # Pooled linear: each place's gradient is the class's weights over the area.
        expected = variables["params"]["fc"]["kernel"][:, 1] / 16
        np.testing.assert_allclose(gradient[0, 2, 3], expected, rtol=1e-5)

    def test_missing_layer_lists_the_nearest(self):
        model, variables = resnet()
        with pytest.raises(ValueError, match="'layer3/0'; nearest names: layer3_0"):
            tapping.linen(model, variables, "layer3/0", image_shape=IMAGE_SHAPE)

    def test_inside_a_residual_block_is_no_cut(self):
        model, variables = resnet()
        with pytest.raises(ValueError, match="'layer2_0/bn1' does not cut the model"):
            tapping.linen(model, variables, "layer2_0/bn1", image_shape=IMAGE_SHAPE)

    def test_layer_used_twice_has_two_names(self):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x):
                conv = nn.Conv(3, (3, 3), name="conv")
                return conv(nn.relu(conv(x))).mean((1, 2))

        model = Twice()
        variables = random_variables(model, images())
        logits = jax.jit(model.apply)(variables, images())
        for layer in ("conv", "conv#2"):
            halves = tapping.linen(model, variables, layer, image_shape=IMAGE_SHAPE)
            check_halves(*halves, logits, images(), (2, *IMAGE_SHAPE))


class TestKept:
    def test_is_the_layer_of_the_pass_itself(self):
        model, variables = resnet()

        @jax.jit
        def step(variables, images):
            with tapping.kept("layer2_0") as outputs:
                logits, updated = model.apply(
                    variables, images, train=True, mutable=["batch_stats"]
                )
            assert list(outputs) == ["layer2_0"]
            return logits, updated, outputs["layer2_0"]

        logits, updated, inner = step(variables, images())
        expected, captured = model.apply(
            variables,
            images(),
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.path == ("layer2_0",),
        )
        (layer,) = captured["intermediates"]["layer2_0"]["__call__"]
        np.testing.assert_allclose(inner, layer, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(
            updated["batch_stats"], captured["batch_stats"], rtol=1e-4, atol=1e-5
        )

    def test_nothing_is_kept_without_a_layer(self):
        model, variables = resnet()
        with tapping.kept("") as outputs:
            jax.eval_shape(model.apply, variables, images())
        assert outputs == {}


class TestFinerLayer:
    @pytest.mark.parametrize(
        "name, size, layer",
        [
            ("small_resnet", 48, "layer1_0"),
            ("resnet18", 64, "layer3_1"),
            ("resnet50", 224, "layer3_5"),
            ("efficientnet_lite0", 224, "block10"),
        ],
    )
    def test_of_the_models(self, name, size, layer):
        model, shape = models.create(name, num_classes=3), (size, size, 3)
        variables = jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), "float32")
        )
        assert tapping.finer_layer(model, variables, shape) == layer

    def test_there_is_none(self):
        model, variables = resnet()
        with pytest.raises(ValueError, match="no layer with a map 100 times"):
            tapping.finer_layer(model, variables, IMAGE_SHAPE, times=100)


class TestNNX:
    @pytest.mark.parametrize("layer", ["norm", "blocks/0"])
    def test_halves_give_the_model_in_eval_mode(self, layer):
        model = NNXNet(nnx.Rngs(0))
        halves = tapping.nnx(model, layer, image_shape=IMAGE_SHAPE)
        assert type(model.norm) is nnx.BatchNorm
        assert not model.norm.use_running_average
        model.eval()
        check_halves(*halves, model(images()), images(), (2, 12, 12, 4))

    def test_the_dead_half_vanishes(self):
        model = NNXNet(nnx.Rngs(0))
        features_fn, head_fn = tapping.nnx(model, "blocks/0", image_shape=IMAGE_SHAPE)
        model.eval()
        graph, state = nnx.split(model)
        whole = flops(lambda x: nnx.merge(graph, state)(x), images())
        first = flops(features_fn, images())
        second = flops(head_fn, jnp.ones((2, 12, 12, 4)))
        # Fusions at the cut shift a few operations.
        assert first + second == pytest.approx(whole, rel=0.02)
        assert first < 0.8 * whole and second < 0.8 * whole

    def test_missing_layer_lists_the_nearest(self):
        with pytest.raises(ValueError, match="nearest names: blocks/1, blocks/0"):
            tapping.nnx(NNXNet(nnx.Rngs(0)), "block/1", image_shape=IMAGE_SHAPE)


class TestSplit:
    def test_haiku(self):
        def forward(x):
            x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x))
            x = jax.nn.relu(hk.Conv2D(6, 3)(x))
            return hk.Linear(5)(x.mean((1, 2)))

        network = hk.without_apply_rng(hk.transform(forward))
        params = random_variables(network, images())

        def call(params, images, tap):
            def interceptor(next_fn, args, kwargs, context):
                output = next_fn(*args, **kwargs)
                called = context.method_name == "__call__"
                return tap(context.module.module_name, output) if called else output

            with hk.intercept_methods(interceptor):
                return network.apply(params, images)

        assert tapping.layer_names(call, params, IMAGE_SHAPE) == {
            "conv2_d": (12, 12, 4),
            "conv2_d_1": (12, 12, 6),
            "linear": (5,),
        }
        halves = tapping.split(call, params, "conv2_d", image_shape=IMAGE_SHAPE)
        logits = network.apply(params, images())
        check_halves(*halves, logits, images(), (2, 12, 12, 4))

    def test_bare_function(self):
        params = {"conv": jnp.ones((3, 8)), "dense": jnp.eye(8)[:, :5]}

        def call(params, images, tap):
            features = tap("conv", jax.nn.relu(images @ params["conv"]))
            return features.mean((1, 2)) @ params["dense"]

        halves = tapping.split(call, params, "conv", image_shape=IMAGE_SHAPE)
        logits = call(params, images(), lambda name, output: output)
        check_halves(*halves, logits, images(), (2, 24, 24, 8))

    def test_a_jitted_stage_is_looked_into(self):
        @jax.jit
        def both(x, y):
            return x + 1, y + 1

        def call(scale, images, tap):
            features = tap("first", images * scale)
            unused, features = both(images, features)
            return features.mean((1, 2))

        halves = tapping.split(call, 2.0, "first", image_shape=IMAGE_SHAPE)
        logits = call(2.0, images(), lambda name, output: output)
        check_halves(*halves, logits, images(), (2, *IMAGE_SHAPE))


class TestLayerNames:
    def test_linen(self):
        model, variables = resnet()
        names = tapping.layer_names(model, variables, IMAGE_SHAPE)
        assert names["conv1"] == (8, 8, 8)
        assert names["layer2_0/downsample_bn"] == (4, 4, 16)
        assert names["layer3_0"] == (4, 4, 32)
        assert list(names)[-1] == "fc"

    def test_needs_shapes_only(self):
        model = models.create("resnet50", num_classes=1000)
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        assert tapping.layer_names(model, variables)["layer2_3"] == (28, 28, 512)

    def test_nnx(self):
        names = tapping.layer_names(NNXNet(nnx.Rngs(0)), image_shape=IMAGE_SHAPE)
        assert names["blocks/1"] == (12, 12, 4)
        assert set(names) == {
            "stem",
            "norm",
            "blocks/0",
            "blocks/1",
            "dropout",
            "dense",
        }


class _Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x))


class _Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.remat(_Inner)(name="block")(x)
        return nn.Dense(3, name="fc")(x.mean((1, 2)))


class _Repeated(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return _Inner(name="block")(x), jnp.mean(x)


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        repeated = nn.scan(
            _Repeated,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = repeated(name="blocks")(x, None)
        x = nn.jit(nn.remat(_Inner))(name="last")(x)
        return nn.Dense(3, name="fc")(x.mean((1, 2)))


@pytest.mark.parametrize(
    "model, layers",
    [
        (_Rematerialised(), ["stem", "block", "fc"]),
        (_Scanned(), ["stem", "blocks/block", "last", "fc"]),
    ],
    ids=["remat", "scan"],
)
def test_what_remat_and_scan_return_is_tapped(model, layers):
    """As in the network without them, whose layers' outputs nothing hides."""
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    names = tapping.layer_names(model, variables, (8, 8, 3))
    assert list(names) == layers

    def after(layer):
        """The plain layers up to one, by hand."""
        params = variables["params"]
        x = nn.Conv(4, (3, 3)).apply({"params": params["stem"]}, images)
        for name in layers[1 : layers.index(layer) + 1]:
            branch = params
            for part in name.split("/"):
                branch = branch[part]
            for i in range(3) if "/" in name else [None]:
                one = jax.tree.map(lambda p, i=i: p if i is None else p[i], branch)
                x = _Inner().apply({"params": one}, x)
        return x

    for layer in layers[:-1]:
        features_fn, head_fn = tapping.linen(
            model, variables, layer, image_shape=(8, 8, 3)
        )
        features = jax.jit(features_fn)(images)
        np.testing.assert_allclose(features, after(layer), atol=1e-6)
        logits = jax.jit(head_fn)(features)
        np.testing.assert_allclose(logits, model.apply(variables, images), atol=1e-6)
        gradient = jax.grad(lambda x, fn=head_fn: fn(x)[:, 1].sum())(features)
        assert jnp.abs(gradient).max() > 0


def test_layers_inside_remat_are_refused_in_one_line():
    model, images = _Rematerialised(), jnp.ones((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="'block/conv' runs inside nn.remat"):
        tapping.linen(model, variables, "block/conv", image_shape=(8, 8, 3))
    features_fn, head_fn = tapping.linen(
        model, variables, "stem", image_shape=(8, 8, 3)
    )
    np.testing.assert_allclose(
        jax.jit(lambda x: head_fn(features_fn(x)))(images),
        model.apply(variables, images),
        rtol=1e-5,
    )
    tapped_fn = attribution.make_tapped_fn(model, variables)
    with pytest.raises(ValueError, match="'block/conv' runs inside nn.remat"):
        attribution.full_grad(tapped_fn, images, jnp.zeros(2, jnp.int32))
