import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import saliency
from ibsgl_jax.models import PooledLinear
from tests import golden_net, reference

MODEL = golden_net.load("net1_model")
CAMS = golden_net.load("net1_cams")


def golden_head(tap):
    return lambda a: golden_net.head(MODEL, a, tap)


def small_case(seed=0, size=(3, 4), channels=5, num_classes=4, n=3):
    """A head with a convolution's worth of space dependence, squared: not linear."""
    draw = np.random.default_rng(seed)
    weights = draw.normal(size=(*size, channels, num_classes)).astype(np.float32)
    features = draw.uniform(0.1, 1.0, (n, *size, channels)).astype(np.float32)

    def head_fn(a):
        return jnp.tanh(jnp.einsum("nhwk,hwkc->nc", a, weights, precision="highest"))

    return head_fn, jnp.asarray(features)


class TestGoldens:
    # Measured by the arrays' authors: 5e-7 of the peak between two implementations.
    @pytest.mark.parametrize("tap", ["A", "B"])
    @pytest.mark.parametrize(
        ("weighting", "method"), [("elementwise", "hirescam"), ("pooled", "gradcam")]
    )
    def test_maps_before_the_relu(self, tap, weighting, method):
        maps = saliency.class_saliencies(
            golden_head(tap),
            jnp.asarray(MODEL[f"act_{tap}"]),
            jnp.asarray(CAMS["classes"]),
            weighting=weighting,
            rectify=False,
        )
        expected = CAMS[f"{method}_{tap}_raw"]
        peak = np.abs(expected).max()
        np.testing.assert_allclose(maps, expected, rtol=0, atol=5e-7 * peak)

    def test_runner_up_of_the_eight_images(self):
        labels, others = MODEL["classes"].T
        np.testing.assert_array_equal(
            saliency.runner_up(jnp.asarray(MODEL["logits"]), jnp.asarray(labels)),
            others,
        )

    def test_maps_of_two_classes_differ(self):
        maps = saliency.class_saliencies(
            golden_head("B"), jnp.asarray(MODEL["act_B"]), jnp.asarray(CAMS["classes"])
        )
        for map_c, map_p in np.asarray(maps):
            assert np.corrcoef(map_c.ravel(), map_p.ravel())[0, 1] < 0.9


class TestClassSaliency:
    def test_by_hand(self):
        # logits = mean over 2 cells of A @ W; W = [[2, 0], [-4, 6]]. For class 0 the
        # gradient is (2, -4) / 2 = (1, -2) in each cell, for class 1 (0, 3).
        head = PooledLinear(jnp.array([[2.0, 0.0], [-4.0, 6.0]]), jnp.zeros(2))
        features = jnp.array([[[[3.0, 1.0], [1.0, 5.0]]]])  # [1, 1, 2, 2]
        features = jnp.concatenate([features, features])
        classes = jnp.array([0, 1])
        # Cell 1, class 0: 3 - 2 = 1; cell 2: 1 - 10 = -9. Class 1: 3 and 15.
        signed = saliency.class_saliency(head, features, classes, rectify=False)
        np.testing.assert_array_equal(signed, [[[1.0, -9.0]], [[3.0, 15.0]]])
        rectified = saliency.class_saliency(head, features, classes)
        np.testing.assert_array_equal(rectified, [[[1.0, 0.0]], [[3.0, 15.0]]])

    def test_pooled_linear_head_matches_numpy_and_both_weightings_coincide(self):
        kernel, bias = MODEL["fc_w"], MODEL["fc_b"]
        head = PooledLinear(jnp.asarray(kernel), jnp.asarray(bias))
        features = jnp.asarray(MODEL["act_B"])
        labels = jnp.asarray(MODEL["classes"][:2, 0])
        expected = np.stack(
            [
                reference.pooled_linear_saliency(a, kernel, c)
                for a, c in zip(features, labels, strict=True)
            ]
        )
        for weighting in saliency.WEIGHTINGS:
            maps = saliency.class_saliency(
                head, features, labels, weighting=weighting, rectify=False
            )
            # float32 sums of 32 terms.
            np.testing.assert_allclose(maps, expected, atol=1e-6 * expected.max())

    def test_weightings_differ_for_a_head_that_looks_at_places(self):
        head_fn, features = small_case()
        labels = jnp.array([0, 1, 2])
        elementwise = saliency.class_saliency(head_fn, features, labels)
        pooled = saliency.class_saliency(head_fn, features, labels, weighting="pooled")
        assert np.abs(elementwise - pooled).max() > 0.1 * np.abs(pooled).max()

    def test_jit_and_each_image_alone_equal_the_batch(self):
        head_fn, features = small_case()
        labels = jnp.array([0, 3, 2])
        batch = saliency.class_saliency(head_fn, features, labels)
        jitted = jax.jit(lambda a, c: saliency.class_saliency(head_fn, a, c))
        np.testing.assert_allclose(jitted(features, labels), batch, atol=1e-6)
        for i in range(3):
            alone = saliency.class_saliency(
                head_fn, features[i : i + 1], labels[i : i + 1]
            )
            np.testing.assert_allclose(alone[0], batch[i], atol=1e-6)

    def test_vmap_over_images_equals_the_batch(self):
        head_fn, features = small_case()
        labels = jnp.array([0, 3, 2])
        one = jax.vmap(
            lambda a, c: saliency.class_saliency(head_fn, a[None], c[None])[0]
        )
        np.testing.assert_allclose(
            one(features, labels),
            saliency.class_saliency(head_fn, features, labels),
            atol=1e-6,
        )

    def test_several_classes_equal_one_at_a_time_from_one_call_of_the_head(self):
        head_fn, features = small_case()
        calls = []

        def counted(a):
            calls.append(a.shape)
            return head_fn(a)

        classes = jnp.array([[0, 1], [2, 3], [1, 1]])
        logits, both = saliency.logits_and_saliencies(counted, features, classes)
        assert len(calls) == 1
        np.testing.assert_allclose(logits, head_fn(features), atol=1e-6)
        for m in range(2):
            np.testing.assert_allclose(
                both[:, m],
                saliency.class_saliency(head_fn, features, classes[:, m]),
                atol=1e-6,
            )

    def test_classes_may_depend_on_the_logits(self):
        head_fn, features = small_case()
        predicted = jnp.argmax(head_fn(features), axis=-1)
        _, maps = saliency.logits_and_saliencies(
            head_fn, features, lambda logits: jnp.argmax(logits, -1, keepdims=True)
        )
        np.testing.assert_allclose(
            maps[:, 0], saliency.class_saliency(head_fn, features, predicted), atol=1e-6
        )

    def test_class_out_of_range_gives_a_zero_map(self):
        head_fn, features = small_case()
        maps = saliency.class_saliency(head_fn, features, jnp.array([4, -1, 99]))
        np.testing.assert_array_equal(maps, 0.0)

    def test_bfloat16_features_give_float32_maps(self):
        head_fn, features = small_case()
        low = features.astype(jnp.bfloat16)
        maps = saliency.class_saliency(head_fn, low, jnp.array([0, 1, 2]))
        assert maps.dtype == jnp.float32
        expected = saliency.class_saliency(
            head_fn, low.astype(jnp.float32), jnp.array([0, 1, 2])
        )
        np.testing.assert_array_equal(maps, expected)

    def test_gradient_through_the_gradient(self):
        # y_c = sum_hwk w_kc A^2, so dy/dA = 2 w A, L = sum_k 2 w A^2 and
        # dL/dA = 4 w A: second derivatives of the head are not lost.
        draw = np.random.default_rng(0)
        w = draw.normal(size=(3, 4)).astype(np.float32)
        features = draw.uniform(0.1, 1.0, (2, 2, 2, 3)).astype(np.float32)

        def total(a):
            maps = saliency.class_saliency(
                lambda a: jnp.einsum("nhwk,kc->nc", a * a, w, precision="highest"),
                a,
                jnp.array([1, 3]),
                rectify=False,
            )
            return jnp.sum(maps)

        expected = 4 * w.T[[1, 3]][:, None, None] * features
        gradient = jax.jit(jax.grad(total))(features)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    def test_unknown_weighting_is_named(self):
        head_fn, features = small_case()
        with pytest.raises(ValueError, match="weighting='average'"):
            saliency.class_saliency(
                head_fn, features, jnp.array([0, 1, 2]), weighting="average"
            )

    def test_compiles_once(self):
        head_fn, features = small_case()
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def maps(a, c):
            return saliency.class_saliency(head_fn, a, c)

        for _ in range(2):
            maps(features, jnp.array([0, 1, 2]))


class TestRunnerUp:
    def test_by_hand(self):
        logits = jnp.array([[1.0, 5.0, 3.0], [9.0, 2.0, 2.0], [-7.0, -8.0, -9.0]])
        # Label on the peak, label on the peak with a tie behind, label at the bottom.
        np.testing.assert_array_equal(
            saliency.runner_up(logits, jnp.array([1, 0, 2])), [2, 1, 0]
        )

    def test_never_the_label(self):
        draw = np.random.default_rng(0)
        logits = jnp.asarray(draw.normal(size=(200, 5)), jnp.float32)
        labels = jnp.asarray(draw.integers(0, 5, 200))
        other = saliency.runner_up(logits, labels)
        assert not np.any(other == labels)
        rest = np.array(logits)
        rest[np.arange(200), labels] = -np.inf
        np.testing.assert_array_equal(other, rest.argmax(-1))
        assert other.dtype == jnp.int32

    def test_never_the_label_where_all_others_are_impossible(self):
        logits = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf]])
        other = saliency.runner_up(logits, jnp.array([0, 1]))
        assert other[0] != 0 and other[1] != 1

    def test_one_class_is_refused(self):
        with pytest.raises(ValueError, match="two classes"):
            saliency.runner_up(jnp.zeros((2, 1)), jnp.zeros(2, int))


class TestUpsample:
    def test_by_hand(self):
        # Half-pixel centres: outputs at -1/4, 1/4, 3/4, 5/4 of the cells 0 and 1.
        maps = jnp.array([[[0.0, 4.0]]])
        np.testing.assert_allclose(
            saliency.upsample(maps, (1, 4)), [[[0.0, 1.0, 3.0, 4.0]]], atol=1e-6
        )

    def test_constant_stays_and_shape(self):
        maps = jnp.full((2, 3, 5), 2.5)
        out = saliency.upsample(maps, (9, 11))
        assert out.shape == (2, 9, 11)
        np.testing.assert_allclose(out, 2.5, rtol=1e-6)


class TestNormalize:
    def test_by_hand(self):
        maps = jnp.array([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
        np.testing.assert_array_equal(
            saliency.normalize(maps),
            [[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [0.0, 0.0]]],
        )

    @pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4, 1e20])
    def test_scale_does_not_matter_and_gradient_is_finite(self, scale):
        maps = jnp.asarray(np.random.default_rng(0).random((2, 3, 3)), jnp.float32)
        value = saliency.normalize(scale * maps)
        expected = saliency.normalize(maps) if scale else 0.0
        np.testing.assert_allclose(value, expected, atol=1e-6)

        def total(m):
            return jnp.sum(jnp.square(saliency.normalize(m)))

        gradient = jax.grad(total)(scale * maps)
        # Degree zero: scale * gradient is the gradient at scale 1.
        expected = jax.grad(total)(maps) if scale else 0.0
        np.testing.assert_allclose(scale * gradient, expected, atol=1e-5)
        assert np.all(np.isfinite(gradient))
