import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import feature_stats
from tests import golden_net, reference

update = jax.jit(feature_stats.update)
merge = jax.jit(feature_stats.merge)
moments = jax.jit(feature_stats.moments, static_argnames="active_threshold")
update_moving = jax.jit(feature_stats.update_moving, static_argnames="decay")

SHAPE = (2, 3, 4)


def draw_features(n, seed=0, offset=0.0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, *SHAPE)) * (draw.random((n, *SHAPE)) < 0.6)
    return (x + offset).astype(np.float32)


def stats_of(*batches):
    state = feature_stats.init(SHAPE)
    for batch in batches:
        state = update(state, batch)
    return state


def assert_close(a, b, atol=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


class TestGoldens:
    @pytest.mark.parametrize("tap", ["A", "B"])
    @pytest.mark.parametrize("sizes", [(8,), (3, 1, 4)])
    def test_the_estimator_over_eight_images(self, tap, sizes):
        model = golden_net.load("net1_model")
        expected = golden_net.load("net1_iba_stats")
        images = jnp.asarray(model["inputs"])
        features = golden_net.features(model, images, tap)
        state = feature_stats.init(features.shape[1:])
        for batch in np.split(features, np.cumsum(sizes)[:-1]):
            state = update(state, batch)
        mean, std, active = moments(state)
        # 4e-5: the tolerance that the arrays' authors give. At tap B the activations
        # (up to 555) of the two networks differ by 1.4e-4 already, and the expected
        # std is 5.9e-5 from the float64 value of ours.
        atol = {"A": 4e-5, "B": 7e-5}[tap]
        np.testing.assert_allclose(mean, expected[f"mini_mean_{tap}"], atol=atol)
        np.testing.assert_allclose(std, expected[f"mini_std_{tap}"], atol=atol)
        exact = np.asarray(features, np.float64)
        np.testing.assert_allclose(mean, exact.mean(0), atol=2e-5)
        np.testing.assert_allclose(std, exact.std(0, ddof=1), atol=2e-5)
        np.testing.assert_array_equal(active, expected[f"mini_active_{tap}"])
        dead = expected[f"mini_std_{tap}"] == 0
        assert dead.any()
        np.testing.assert_array_equal(np.asarray(std)[dead], 0.0)


class TestUpdate:
    def test_any_split_into_batches_equals_numpy(self):
        x = draw_features(23)
        draw = np.random.default_rng(1)
        for cuts in ([], [1], [1, 2, 3], sorted(draw.choice(22, 6, replace=False) + 1)):
            state = stats_of(*np.split(x, cuts))
            mean, std, active = moments(state)
            np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
            np.testing.assert_allclose(std, x.std(0, ddof=1), rtol=1e-5)
            np.testing.assert_array_equal(active, (x != 0).mean(0) > 0.01)
            assert state.count == 23
            np.testing.assert_array_equal(state.nonzero, (x != 0).sum(0))

    @pytest.mark.parametrize("dtype", [bool, np.float32])
    def test_mask_leaves_examples_out_whatever_they_hold(self, dtype):
        x = draw_features(6)
        mask = np.array([1, 0, 1, 1, 0, 0], dtype)
        padded = x.copy()
        padded[1], padded[4], padded[5] = np.nan, np.inf, 1e30
        expected = stats_of(x[[0, 2, 3]])
        assert_close(update(feature_stats.init(SHAPE), padded, mask), expected)

    def test_batch_masked_away_changes_nothing(self):
        before = stats_of(draw_features(5))
        after = update(before, np.full((2, *SHAPE), np.nan, np.float32), np.zeros(2))
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_large_offset_keeps_its_digits(self):
        # Mean 1e4, deviation 1: a sum of squares (1e8 n, exact to 8 n in float32)
        # would lose the variance. Each input is rounded to 5e-4, hence 1e-3.
        x = draw_features(300, offset=1e4)
        _, std, _ = moments(stats_of(*np.split(x, [7, 8, 100])))
        expected = x.astype(np.float64).std(0, ddof=1)
        np.testing.assert_allclose(std, expected, rtol=1e-3)

    def test_bfloat16_is_summed_in_float32(self):
        x = jnp.asarray(draw_features(50)).astype(jnp.bfloat16)
        assert_close(stats_of(x), stats_of(x.astype(jnp.float32)), atol=0)

    def test_eight_devices_equal_one(self):
        assert jax.device_count() == 8
        x = draw_features(40)
        mask = np.arange(40) % 3 != 0
        start = stats_of(draw_features(4, seed=2))
        sharded = jax.pmap(
            functools.partial(feature_stats.update, axis_name="devices"),
            axis_name="devices",
            in_axes=(None, 0, 0),
        )(start, x.reshape(8, 5, *SHAPE), mask.reshape(8, 5))
        expected = update(start, x, mask)
        for device in (0, 7):
            assert_close([leaf[device] for leaf in sharded], expected)

    def test_a_device_with_nothing_but_padding(self):
        x = draw_features(8)
        x[3] = np.nan
        mask = np.arange(8) != 3
        sharded = jax.pmap(
            functools.partial(feature_stats.update, axis_name="devices"),
            axis_name="devices",
            in_axes=(None, 0, 0),
        )(feature_stats.init(SHAPE), x[:, None], mask[:, None])
        assert_close([leaf[0] for leaf in sharded], stats_of(x[mask]))

    def test_shape_mismatch_is_refused(self):
        with pytest.raises(AssertionError):
            feature_stats.update(feature_stats.init((2, 2, 4)), draw_features(3))

    def test_a_layer_without_places_is_told_what_to_do(self):
        with pytest.raises(ValueError, match="a map needs"):
            feature_stats.update(feature_stats.init((8,)), jnp.ones((4, 8)))


class TestMerge:
    def test_associative_and_commutative(self):
        a, b, c = (stats_of(draw_features(n, seed=n)) for n in (1, 6, 30))
        assert_close(merge(a, b), merge(b, a))
        assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))

    def test_equals_one_pass(self):
        x, y = draw_features(9, seed=1), draw_features(14, seed=2)
        assert_close(merge(stats_of(x), stats_of(y)), stats_of(np.concatenate([x, y])))

    def test_empty_is_neutral(self):
        empty, some = feature_stats.init(SHAPE), stats_of(draw_features(5))
        for merged in (merge(empty, some), merge(some, empty)):
            for x, y in zip(merged, some, strict=True):
                np.testing.assert_array_equal(x, y)
        for leaf in merge(empty, empty):
            np.testing.assert_array_equal(leaf, 0.0)


class TestMoments:
    def test_by_hand(self):
        # One element seen as 1, 0, 5: mean 2, deviations -1, -2, 3, m2 = 14, std of
        # divisor 2 = sqrt(7); non-zero in 2 of 3.
        state = feature_stats.init((1, 1, 1))
        state = update(state, jnp.array([1.0, 0.0, 5.0]).reshape(3, 1, 1, 1))
        mean, std, active = moments(state)
        np.testing.assert_allclose(mean, 2.0)
        np.testing.assert_allclose(std, np.sqrt(7.0), rtol=1e-6)
        assert active.dtype == bool and active.all()

    def test_fewer_than_two_examples_have_no_deviation(self):
        for state in (feature_stats.init(SHAPE), stats_of(draw_features(1))):
            mean, std, active = moments(state)
            assert np.all(np.isfinite(mean))
            np.testing.assert_array_equal(std, 0.0)

    def test_threshold_is_strict(self):
        # One of 100 is exactly the share 0.01: inactive; two of 100 are active.
        x = np.zeros((100, 1, 1, 2), np.float32)
        x[:1, ..., 0] = x[:2, ..., 1] = 1.0
        state = update(feature_stats.init((1, 1, 2)), x)
        np.testing.assert_array_equal(moments(state).active, [[[False, True]]])
        lenient = moments(state, active_threshold=0.005).active
        np.testing.assert_array_equal(lenient, [[[True, True]]])
        strict = moments(state, active_threshold=0.02).active
        np.testing.assert_array_equal(strict, [[[False, False]]])

    def test_negative_values_are_active(self):
        state = update(feature_stats.init((1, 1, 1)), np.full((3, 1, 1, 1), -2.0))
        assert moments(state).active.all()


class TestUpdateMoving:
    def test_first_batch_is_exact(self):
        x = draw_features(12)
        state = update_moving(feature_stats.init(SHAPE), x)
        assert_close(state, stats_of(x), atol=0)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
    def test_equals_naive_weights(self, decay):
        batches = [draw_features(n, seed=n) for n in (4, 1, 7, 4, 5)]
        state = feature_stats.init(SHAPE)
        for batch in batches:
            state = update_moving(state, batch, decay=decay)
        mean, m2, count, nonzero = reference.weighted_moments(
            batches, decay ** np.arange(4, -1, -1)
        )
        assert_close(state, (count, mean, m2, nonzero))

    def test_follows_a_shift(self):
        # A jump from 0 to 8 once the weight has settled (200 batches leave .95^200 =
        # 4e-5 to go): 60 batches later the old values keep .95^60 = 5 % of it.
        state = feature_stats.init(SHAPE)
        for _ in range(200):
            state = update_moving(state, np.zeros((2, *SHAPE), np.float32))
        for _ in range(60):
            state = update_moving(state, np.full((2, *SHAPE), 8.0, np.float32))
        np.testing.assert_allclose(state.mean, 8 * (1 - 0.95**60), rtol=1e-3)

    def test_devices_agree_with_one(self):
        x = draw_features(16)
        start = stats_of(draw_features(4, seed=2))
        sharded = jax.pmap(
            functools.partial(
                feature_stats.update_moving, decay=0.9, axis_name="devices"
            ),
            axis_name="devices",
            in_axes=(None, 0),
        )(start, x.reshape(8, 2, *SHAPE))
        assert_close([leaf[5] for leaf in sharded], update_moving(start, x, decay=0.9))

    @pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
    def test_decay_out_of_range_is_named(self, decay):
        with pytest.raises(ValueError, match=f"decay={decay}"):
            feature_stats.update_moving(
                feature_stats.init(SHAPE), draw_features(2), decay=decay
            )
