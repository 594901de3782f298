"""Models: published sizes, the split at the tap, BatchNorm's modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import models
from ibsgl_jax.models.efficientnet_lite import Stage
from ibsgl_jax.models.vgg import adaptive_average_pool

# Tiny versions of every architecture, with an image size that they take.
TINY = {
    "small_resnet": (dict(num_filters=4), 48),
    "resnet18": (dict(num_filters=4, stage_sizes=(1, 1)), 32),
    "resnet50": (dict(num_filters=2, stage_sizes=(1, 2)), 32),
    "vgg16": (dict(stage_widths=(2, 3, 4, 5, 6), dense_features=8), 32),
    "efficientnet_lite0": (
        dict(
            stages=(Stage(1, 3, 1, 1, 4), Stage(2, 5, 2, 6, 6)),
            stem_filters=4,
            head_filters=8,
        ),
        32,
    ),
}


def random_variables(model, images):
    """Variables drawn without the initializers, which compile slowly."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 10
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def create_tiny(name, **more):
    options, size = TINY[name]
    model = models.create(name, num_classes=5, **options, **more)
    images = np.random.default_rng(1).normal(size=(4, size, size, 3))
    images = images.astype(np.float32)
    return model, random_variables(model, images), images


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class TestCreate:
    # The numbers that torchvision and EfficientNet-Lite's authors publish.
    @pytest.mark.parametrize(
        ("name", "num_parameters", "tap"),
        [
            ("resnet18", 11_689_512, (7, 7, 512)),
            ("resnet34", 21_797_672, (7, 7, 512)),
            ("resnet50", 25_557_032, (7, 7, 2048)),
            ("resnet101", 44_549_160, (7, 7, 2048)),
            ("vgg16", 138_357_544, (14, 14, 512)),
            ("efficientnet_lite0", 4_652_008, (7, 7, 1280)),
        ],
    )
    def test_published_sizes(self, name, num_parameters, tap):
        model = models.create(name, num_classes=1000)
        images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        assert count(variables["params"]) == num_parameters
        features = jax.eval_shape(
            functools.partial(model.apply, method="features"), variables, images
        )
        assert features.shape == (2, *tap)
        assert jax.eval_shape(model.apply, variables, images).shape == (2, 1000)

    def test_small_resnet_is_small(self):
        model = models.create("small_resnet", num_classes=10)
        images = jnp.zeros((1, 48, 48, 3))
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        features = jax.eval_shape(
            functools.partial(model.apply, method="features"), variables, images
        )
        assert features.shape == (1, 8, 8, 64)
        assert count(variables["params"]) == 78_810

    def test_unknown_name_lists_the_nearest(self):
        with pytest.raises(ValueError, match="'resnet-50'; nearest names: resnet50"):
            models.create("resnet-50", num_classes=3)

    def test_unknown_stem(self):
        with pytest.raises(ValueError, match="stem must be"):
            models.create("resnet18", num_classes=3, stem="tiny").init(
                jax.random.key(0), jnp.zeros((1, 32, 32, 3))
            )


@pytest.mark.parametrize("name", TINY)
class TestSplit:
    def test_head_of_features_is_the_model(self, name):
        model, variables, images = create_tiny(name)
        logits = jax.jit(model.apply)(variables, images)
        features = jax.jit(models.make_features_fn(model, variables))(images)
        assert features.ndim == 4 and features.min() >= 0
        assert float(jnp.std(features)) > 0.01
        # The same sums, fused differently.
        head_fn = jax.jit(models.make_head_fn(model, variables))
        np.testing.assert_allclose(head_fn(features), logits, rtol=1e-5, atol=1e-5)

    def test_bfloat16_computes_logits_in_float32(self, name):
        model, variables, images = create_tiny(name, dtype=jnp.bfloat16)
        features = jax.eval_shape(models.make_features_fn(model, variables), images)
        head_fn = models.make_head_fn(model, variables)
        assert features.dtype == jnp.bfloat16
        assert jax.eval_shape(head_fn, features).dtype == jnp.float32


class TestMakeHeadFn:
    @pytest.mark.parametrize("name", ["small_resnet", "efficientnet_lite0"])
    def test_pooled_linear_where_it_is_one(self, name):
        model, variables, _ = create_tiny(name)
        assert isinstance(models.make_head_fn(model, variables), models.PooledLinear)

    def test_closure_elsewhere(self):
        model, variables, _ = create_tiny("vgg16")
        head_fn = models.make_head_fn(model, variables)
        assert not isinstance(head_fn, models.PooledLinear)


class TestPooledLinear:
    def test_value(self):
        # Mean over the two places is (2, 3); times the kernel, plus the bias.
        features = jnp.array([[[[1.0, 2.0], [3.0, 4.0]]]])
        head = models.PooledLinear(jnp.array([[1.0, 0.0], [10.0, 1.0]]), jnp.ones(2))
        np.testing.assert_array_equal(head(features), [[33.0, 4.0]])

    def test_is_a_pytree_argument(self):
        head = models.PooledLinear(jnp.ones((3, 2)), jnp.zeros(2))
        features = jnp.ones((1, 2, 2, 3))
        kernel_grad = jax.jit(jax.grad(lambda h: h(features).sum()))(head).kernel
        np.testing.assert_array_equal(kernel_grad, np.ones((3, 2)))

    def test_leading_axes(self):
        head = models.PooledLinear(jnp.ones((3, 2)), jnp.zeros(2))
        assert head(jnp.ones((7, 4, 2, 2, 3))).shape == (7, 4, 2)


class TestBatchNorm:
    def train_step(self, model, variables, images):
        return model.apply(variables, images, True, mutable=["batch_stats"])

    @pytest.mark.parametrize("name", ["small_resnet", "resnet50", "efficientnet_lite0"])
    def test_train_updates_every_statistic(self, name):
        model, variables, images = create_tiny(name)
        _, updated = jax.jit(functools.partial(self.train_step, model))(
            variables, images
        )
        changed = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)),
            variables["batch_stats"],
            updated["batch_stats"],
        )
        assert all(jax.tree.leaves(changed))

    def test_axis_name_gives_the_whole_batch_on_every_device(self):
        model, variables, images = create_tiny("small_resnet")
        step = jax.jit(functools.partial(self.train_step, model))
        logits, updated = step(variables, images)
        parallel = model.clone(axis_name="batch")
        # vmap with an axis name reduces as pmap does, and needs no second device.
        parallel_step = jax.vmap(
            functools.partial(self.train_step, parallel),
            in_axes=(None, 0),
            axis_name="batch",
        )
        logits_p, updated_p = jax.jit(parallel_step)(
            variables, images.reshape(2, 2, *images.shape[1:])
        )
        # Sums over halves in another order.
        np.testing.assert_allclose(logits_p.reshape(4, -1), logits, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6),
            updated_p["batch_stats"],
            updated["batch_stats"],
        )

    def test_axis_name_is_not_needed_in_eval_or_init(self):
        model, _, images = create_tiny("small_resnet", axis_name="batch")
        # Tracing is where an unbound axis name would raise.
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
        assert logits.shape == (4, 5)

    @pytest.mark.parametrize(("zero_init", "last_scale"), [(True, 0.0), (False, 1.0)])
    def test_zero_init_of_the_last_scale(self, zero_init, last_scale):
        block = models.BottleneckBlock(2, zero_init=zero_init)
        variables = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
        scale = variables["params"]["bn3"]["scale"]
        np.testing.assert_array_equal(scale, np.full(8, last_scale))


class TestVGG:
    def test_dropout_needs_a_key_and_acts_in_train_only(self):
        model, variables, images = create_tiny("vgg16")

        @jax.jit
        def apply(key):
            return model.apply(variables, images, True, rngs={"dropout": key})

        one, other = apply(jax.random.key(0)), apply(jax.random.key(1))
        assert float(jnp.abs(one - other).max()) > 0

    def test_too_small_an_image(self):
        model, variables, _ = create_tiny("vgg16")
        with pytest.raises(ValueError, match="at least 32 pixels .* not 31 x 40"):
            model.apply(variables, jnp.zeros((1, 31, 40, 3)))


class TestAdaptiveAveragePool:
    def test_overlapping_bins(self):
        # 5 places in 3 bins: [0, 2), [1, 4), [3, 5).
        features = jnp.arange(5.0).reshape(1, 5, 1, 1)
        pooled = adaptive_average_pool(features, (3, 1))
        np.testing.assert_allclose(pooled.ravel(), [0.5, 2.0, 3.5], rtol=1e-6)

    def test_fewer_places_than_bins(self):
        features = jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)
        pooled = adaptive_average_pool(features, (2, 3))
        np.testing.assert_allclose(pooled[0, 0, :, 0], [1.0, 1.5, 2.0], rtol=1e-6)
        np.testing.assert_array_equal(pooled[0, 0], pooled[0, 1])


def test_dropout_of_an_image_depends_on_its_own_key_alone():
    model = models.VGG((1,), stage_widths=(4,), num_classes=3, dense_features=16)
    features = jax.random.uniform(jax.random.key(0), (4, 4, 4, 4))
    init = jax.jit(functools.partial(model.init, method="head"))
    variables = init(jax.random.key(1), features)
    keys = jax.random.split(jax.random.key(2), 4)

    @jax.jit
    def head(features, keys):
        return model.apply(variables, features, train=True, keys=keys, method="head")

    whole = head(features, keys)
    halves = [head(features[i : i + 2], keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=1e-5)
    same = head(jnp.stack([features[0]] * 4), keys)
    assert len(np.unique(np.asarray(same)[:, 0])) == 4

    @functools.partial(jax.jit, static_argnames="train")
    def by_flax(key, train):
        rngs = {"dropout": key}
        return model.apply(variables, features, train=train, method="head", rngs=rngs)

    assert not np.allclose(by_flax(keys[0], True), by_flax(keys[0], False))
