"""Tokens [N, T, D]: read as the map they are, the prefix kept, signs allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ibsgl_jax import (
    attribution,
    bottleneck,
    feature_stats,
    guidance,
    losses,
    saliency,
    tapping,
    tokens,
)

GRID, PREFIX, WIDTH, CLASSES = (3, 4), 2, 6, 5
IMAGE_SHAPE = (12, 16, 3)
CONFIG = guidance.GuidanceConfig(
    bottleneck=bottleneck.BottleneckConfig(num_steps=3, num_samples=1),
    rectify_features=False,
)
LABELS = jnp.array([1, 4, 0])


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


KERNELS = draw(0, WIDTH, WIDTH), draw(1, WIDTH, CLASSES)


def head_on_maps(maps):
    """[N, h, w, D] -> [N, C]: something curved that looks at all places."""
    hidden = jnp.tanh(maps @ KERNELS[0])
    return (hidden * jax.nn.softmax(maps, axis=(1, 2))).sum((1, 2)) @ KERNELS[1]


def head_on_tokens(features):
    """The same of tokens in the grid, plus what the prefix says."""
    cells = features[:, PREFIX:].reshape(-1, *GRID, WIDTH)
    return head_on_maps(cells) + jnp.tanh(features[:, :PREFIX].sum(1)) @ KERNELS[1]


def given():
    features = draw(2, 3, PREFIX + 12, WIDTH)
    return tokens.on_grid(head_on_tokens, grid=GRID, prefix=PREFIX), features


def same_as_map(features):
    """(head, maps) that have the prefix of these features built in."""
    before = jnp.tanh(features[:, :PREFIX].sum(1)) @ KERNELS[1]

    def head_fn(maps):
        return head_on_maps(maps) + jnp.tile(before, (len(maps) // len(before), 1))

    return head_fn, features[:, PREFIX:].reshape(-1, *GRID, WIDTH)


def cells_of(moments):
    return feature_stats.Moments(*(m[PREFIX:].reshape(*GRID, WIDTH) for m in moments))


@jax.jit
def moments_of(features):
    many = jnp.concatenate([features, 2 * features, -features])
    return feature_stats.moments(
        feature_stats.update(feature_stats.init(many.shape[1:]), many)
    )


class TestFind:
    @pytest.mark.parametrize(
        ("num_tokens", "image_size", "given", "found"),
        [
            (196, None, {}, ((14, 14), 0)),
            (197, None, {}, ((14, 14), 1)),
            (201, (224, 224), {}, ((14, 14), 5)),
            (1370, (518, 518), {}, ((37, 37), 1)),
            (50, (224, 224), {}, ((7, 7), 1)),
            (16, (24, 40), {}, ((3, 5), 1)),
            (301, (240, 320), {}, ((15, 20), 1)),
            (257, (230, 230), {}, ((16, 16), 1)),  # patches of 14 leave 6 pixels over
            (16, None, {"prefix": 7}, ((3, 3), 7)),
            (14, None, {"grid": (3, 4)}, ((3, 4), 2)),
            (14, (50, 50), {"grid": [2, 6], "prefix": 2}, ((2, 6), 2)),
        ],
    )
    def test_grids(self, num_tokens, image_size, given, found):
        assert tokens.find(num_tokens, image_size, **given) == found

    @pytest.mark.parametrize(
        ("num_tokens", "image_size", "given", "words"),
        [
            (190, (224, 224), {}, "190 tokens are no grid of an image of 224 x 224"),
            (35, None, {"prefix": 1}, "35 tokens are no square with 1 before it"),
            (197, None, {"grid": (14, 13), "prefix": 1}, "a prefix of 1 make 183"),
            (9, None, {"grid": (5, 5)}, "make 25 tokens, the layer has 9: give h"),
            (197, None, {"prefix": 198}, "prefix=198: the layer has only 197"),
            (9, None, {"grid": 3}, "grid=3: give"),
            (9, None, {"grid": (3, 0)}, r"grid=\(3, 0\): give \(h, w\), two positive"),
            (9, None, {"grid": (3, 3), "prefix": -1}, "prefix=-1: give a number"),
        ],
    )
    def test_what_is_no_grid_is_one_line(self, num_tokens, image_size, given, words):
        with pytest.raises(ValueError, match=words) as info:
            tokens.find(num_tokens, image_size, **given)
        assert "\n" not in str(info.value)

    def test_a_head_that_names_another_number(self):
        head_fn, features = given()
        with pytest.raises(ValueError, match="give h \\* w \\+ prefix = 13"):
            saliency.class_saliency(head_fn, features[:, 1:], LABELS)


class TestAsMap:
    def test_round_trip_and_prefix(self):
        head_fn, features = given()
        map_head_fn, maps, layout = tokens.as_map(head_fn, features)
        assert layout == (GRID, PREFIX) and maps.shape == (3, *GRID, WIDTH)
        np.testing.assert_array_equal(maps[1, 2, 3], features[1, PREFIX + 11])
        np.testing.assert_array_equal(tokens.from_map(maps, features, layout), features)
        copies = jnp.concatenate([maps, 2 * maps])
        expected = jnp.concatenate(
            [head_fn(features), head_fn(tokens.from_map(2 * maps, features, layout))]
        )
        np.testing.assert_allclose(map_head_fn(copies), expected, rtol=1e-5)

    def test_maps_pass(self):
        features = draw(3, 2, 3, 4, WIDTH)
        found = tokens.as_map(head_on_maps, features)
        assert found == (head_on_maps, features, None) or found[1] is features

    def test_a_head_is_an_argument_of_jit(self):
        head_fn, features = given()
        traces = []

        @jax.jit
        def logits(head_fn, features):
            traces.append(1)
            return head_fn(features)

        np.testing.assert_allclose(
            logits(head_fn, features), head_on_tokens(features), rtol=1e-5
        )
        logits(head_fn, features)
        assert len(traces) == 1


class TestEveryFunctionOnFeatures:
    """Tokens give what the map that they are gives, their prefix built in."""

    @pytest.mark.parametrize(
        "method", ["hirescam", "grad_cam", "grad_cam_pp", "layer_cam"]
    )
    def test_cams(self, method):
        head_fn, features = given()
        cam = functools.partial(attribution.METHODS[method], rectify=False)
        found = jax.jit(lambda x: cam(head_fn, x, LABELS))(features)
        expected = jax.jit(lambda x: cam(*same_as_map(x), LABELS))(features)
        assert found.shape == (3, *GRID)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("num_samples", [1, 3])
    def test_bottleneck(self, num_samples):
        head_fn, features = given()
        moments = moments_of(features)
        config = bottleneck.BottleneckConfig(num_steps=4, num_samples=num_samples)
        key = jax.random.key(0)

        @jax.jit
        def both(features, moments):
            options = (LABELS, moments)
            found = bottleneck.attribute(
                key, head_fn, features, *options, config=config
            )
            options = (LABELS, cells_of(moments))
            return found, bottleneck.attribute(
                key, *same_as_map(features), *options, config=config
            )

        found, expected = both(features, moments)
        assert found.capacity.shape == (3, *GRID, WIDTH)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        assert float(found.saliency.min()) >= -1e-6 and float(found.saliency.max()) > 0

    def test_statistics_with_a_mask(self):
        features = draw(4, 5, 14, WIDTH).at[4].set(jnp.nan)
        stats = feature_stats.update(
            feature_stats.init((14, WIDTH)), features, jnp.arange(5) < 4
        )
        np.testing.assert_allclose(stats.mean, features[:4].mean(0), atol=1e-6)

    def test_guide_moves_the_grid_alone(self):
        head_fn, features = given()
        moments = moments_of(features)
        key = jax.random.key(0)

        @jax.jit
        def both(features, moments):
            options = {"config": CONFIG}
            found = guidance.guide(key, head_fn, features, LABELS, moments, **options)
            head, maps = same_as_map(features)
            cells = cells_of(moments)
            return found, guidance.guide(key, head, maps, LABELS, cells, **options)

        found, expected = both(features, moments)
        target = found.target_features
        np.testing.assert_array_equal(target[:, :PREFIX], features[:, :PREFIX])
        np.testing.assert_allclose(
            target[:, PREFIX:].reshape(-1, *GRID, WIDTH),
            expected.target_features,
            rtol=1e-3,
            atol=1e-3,
        )
        np.testing.assert_allclose(found.relative_move, 0.1, rtol=1e-4)
        assert float((found.target_loss - found.loss).max()) < 0

    @pytest.mark.slow
    def test_penalty_has_a_gradient_in_the_grid(self):
        head_fn, features = given()

        @jax.jit
        def total(features):
            stats = feature_stats.init(features.shape[1:])
            found = guidance.penalty(
                jax.random.key(0),
                head_fn,
                features,
                LABELS,
                stats,
                1000,
                config=CONFIG,
                only_right=False,
            )
            return jnp.sum(found.penalty), found

        gradient, found = jax.grad(total, has_aux=True)(features)
        assert jnp.isfinite(gradient).all()
        assert float(jnp.abs(gradient[:, PREFIX:]).min(axis=(1, 2)).max()) > 0
        np.testing.assert_allclose(gradient[:, :PREFIX], 0.0, atol=1e-7)
        # mu * (.1 ||cells||)^2 / (2 ||tokens||^2)
        share = jnp.sum(features[:, PREFIX:] ** 2, (1, 2)) / jnp.sum(
            features**2, (1, 2)
        )
        np.testing.assert_allclose(found.penalty, 10 * 0.005 * share, rtol=1e-3)


class TestTapping:
    def call(self, kernel, images, tap):
        patches = images.reshape(-1, 3, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        cells = patches.reshape(len(images), 12, 48) @ kernel
        first = jnp.mean(cells, axis=1, keepdims=True)
        found = tap("block", jnp.concatenate([first, 0 * first + 1, cells], axis=1))
        return {"logits": head_on_tokens(found), "features": found}

    def split(self, **options):
        kernel = draw(5, 48, WIDTH)
        options = {"image_shape": IMAGE_SHAPE, "output": "logits"} | options
        return tapping.split(self.call, kernel, "block", **options)

    @pytest.mark.parametrize("method", ["ib", "layer_cam", "random"])
    def test_images_to_maps(self, method):
        features_fn, head_fn = self.split()
        assert head_fn.layout == (GRID, PREFIX)
        images = draw(6, 3, *IMAGE_SHAPE)
        features = features_fn(images)
        assert features.shape == (3, 14, WIDTH)
        options = {"key": jax.random.key(0), "moments": moments_of(features)}
        if method == "ib":
            options["config"] = CONFIG.bottleneck
        maps = attribution.attribute(method, features_fn, head_fn, images, **options)
        assert maps.shape == (3, 12, 16) and jnp.isfinite(maps).all()
        # A head that does not know its grid: the image's sides tell.
        plain = attribution.attribute(
            method, features_fn, head_on_tokens, images, **options
        )
        np.testing.assert_allclose(plain, maps, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                {"prefix": 3},
                "'block': 14 tokens are no grid of an image of 12 x 16 w",
            ),
            ({"grid": (4, 4)}, "'block': grid=.4, 4. make 16 tokens, the layer has 14"),
            ({"prefix": 15}, "'block': prefix=15: the layer has only 14 tokens"),
            ({"output": "logit"}, "output='logit': the head returns a dict with 'log"),
        ],
    )
    def test_bad_input_is_one_line(self, options, words):
        with pytest.raises(ValueError, match=words) as info:
            self.split(**options)
        assert "\n" not in str(info.value)

    def test_a_grid_for_a_map(self):
        call = lambda w, x, tap: tap("first", x * w).mean((1, 2))  # noqa: E731
        with pytest.raises(ValueError, match="no tokens .T, D.: leave grid"):
            tapping.split(call, 2.0, "first", image_shape=IMAGE_SHAPE, grid=(3, 4))


class TestSignedDivergence:
    def test_by_hand(self):
        # Mean square 10, differences 1 and 2 of 2 elements: (1 + 4) / 2 / 20.
        a, b = jnp.array([[[[2.0], [-4.0]]]]), jnp.array([[[[1.0], [-2.0]]]])
        found = losses.feature_kl(a, b, signed=True)
        np.testing.assert_allclose(found, [0.125], rtol=1e-6)
        # One channel: its own mean square, plus a tenth of it, is the variance.
        found = losses.feature_kl(a, b, over="spatial", signed=True)
        np.testing.assert_allclose(found, [0.125 / 1.1], rtol=1e-6)

    @pytest.mark.parametrize("over", losses.KL_EXTENTS)
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e25])
    def test_finite_at_any_scale(self, over, scale):
        a, b = scale * draw(7, 2, 3, 4, 5), scale * draw(8, 2, 3, 4, 5)
        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda a: losses.feature_kl(a, b, over=over, signed=True).sum()
            )
        )(a)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
        assert (value > 0) == (scale > 0)

    def test_gradient(self):
        a, b = draw(7, 2, 3, 4, 5), draw(8, 2, 3, 4, 5)
        slope = jax.grad(lambda a: losses.feature_kl(a, b, signed=True)[0])(a)[0]
        np.testing.assert_allclose(
            slope, (a - b)[0] / 60 / jnp.mean(a[0] ** 2), rtol=1e-4
        )
        check_grads(
            lambda d: losses.feature_kl(b + d, b, signed=True) * jnp.mean(b**2),
            (jnp.zeros_like(b),),
            order=1,
            modes=["rev"],
        )

    def test_negative_features_learn(self):
        """The reading without a sign is blind to them."""
        a, b = -jnp.ones((1, 2, 2, 3)), -2 * jnp.ones((1, 2, 2, 3))
        slopes = [
            jax.grad(lambda a, s=signed: losses.feature_kl(a, b, signed=s)[0])(a)
            for signed in (False, True)
        ]
        assert float(jnp.abs(slopes[0]).max()) == 0
        assert float(slopes[1].min()) > 0
