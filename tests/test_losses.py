"""Losses of maps: by hand, in NumPy, and against the ancestor's arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ibsgl_jax import losses, saliency
from tests import golden_net, reference

ICASC = golden_net.load("net1_icasc")
PAIRS = sorted({name.split("__")[0] for name in ICASC if "__" in name})


# Their functions return NaN for these; ours must not.
BROKEN_PAIRS = ("const_t", "zero_both", "zero_t")
BRANCHES = {"s055_w200": (200.0, 0.55), "s025_w100": (100.0, 0.25)}
MAP_LOSSES = {
    "categorical": losses.saliency_cross_entropy,
    "bernoulli": functools.partial(losses.saliency_cross_entropy, kind="bernoulli"),
    "suppression": losses.saliency_suppression,
    "masked": lambda c, p: losses.saliency_suppression(
        c, p, losses.soft_mask(saliency.normalize(c.astype(jnp.float32)))
    ),
    "excess": losses.runner_up_excess,
    "cosine": losses.runner_up_cosine,
    "mass": lambda c, p: losses.runner_up_mass(c, p, c),
}
JITTED = {name: jax.jit(fn) for name, fn in MAP_LOSSES.items()}
GRADS = {
    name: jax.jit(jax.grad(lambda c, p, fn=fn: jnp.sum(fn(c, p)), (0, 1)))
    for name, fn in MAP_LOSSES.items()
}


def draw_maps(n=4, seed=0, size=(3, 4)):
    """Two stacks of maps with zeros in them, as after a ReLU."""
    draw = np.random.default_rng(seed)
    c, p = np.maximum(draw.normal(0.5, 1.0, (2, n, *size)), 0)
    c[:, 0, 0] = 2.5  # none is all zero
    return c.astype(np.float32), p.astype(np.float32)


def folded(maps):
    """The maps of a whole call as one image."""
    return jnp.asarray(maps).reshape(1, -1, maps.shape[-1])


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def ancestor(At, Aconf, low, high, omega, share):
    """Their formula in our functions: (half of L_as, mask) and the gradients.

    Their mask is sigmoid(omega (scaled - share max(At))), At scaled to [0, 1] by
    constants. Scaled has maximum 1, so our threshold, a share of the map's own
    maximum, is share max(At).
    """
    scaled = (At - low) / jnp.where(high > low, high - low, 1.0)
    mask = losses.soft_mask(scaled, omega=omega, threshold=share * high)
    return losses.saliency_suppression(At, Aconf, mask)[0], mask


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("pair", PAIRS)
class TestAncestorGoldens:
    def test_mask_value_and_gradients(self, pair, branch):
        At, Aconf = (folded(ICASC[f"{pair}__{name}"]) for name in ("At", "Aconf"))
        theirs = {
            name: ICASC[f"{pair}__{branch}__{name}"]
            for name in ("mask", "L_as", "dLas_dAt", "dLas_dAconf")
        }
        omega, share = BRANCHES[branch]
        (value, mask), gradients = ancestor(At, Aconf, At.min(), At.max(), omega, share)
        for array in (value, mask, *gradients):
            assert np.all(np.isfinite(array))
        assert 0 <= value <= 0.5
        if pair in BROKEN_PAIRS:
            assert np.isnan(theirs["L_as"])
            return
        # omega amplifies the rounding of the scaled map: 200 x 6e-8 = 1e-5.
        np.testing.assert_allclose(mask, folded(theirs["mask"]), atol=2e-5)
        # They print a factor 2.
        np.testing.assert_allclose(2 * value, theirs["L_as"], rtol=2e-5, atol=1e-7)
        for ours, name in zip(gradients, ("dLas_dAt", "dLas_dAconf"), strict=True):
            expected = folded(theirs[name])
            size = float(np.abs(expected).max())
            np.testing.assert_allclose(2 * ours, expected, rtol=0, atol=3e-5 * size)


def test_ancestor_pairs_that_break_are_the_known_ones():
    broken = {
        pair for pair in PAIRS if np.isnan(ICASC[f"{pair}__s055_w200__L_as"]).any()
    }
    assert broken == set(BROKEN_PAIRS)


class TestSaliencyCrossEntropy:
    def test_categorical_by_hand(self):
        # Without a floor to speak of, s = (1, 3) / 4 and t = (1, 1) / 2:
        # -(log 1/4 + log 3/4) / 2 = log 4 - log(3) / 2.
        value = losses.saliency_cross_entropy(
            jnp.array([[[1.0, 3.0]]]), jnp.array([[[5.0, 5.0]]]), floor=1e-7
        )
        np.testing.assert_allclose(value, [math.log(4) - math.log(3) / 2], rtol=1e-6)

    def test_bernoulli_by_hand(self):
        # s = (1/2, 1 - floor) after dividing by 2, t = (1/2, 1): the first cell gives
        # log 2, the second -log(1 - floor); the mean is over two cells.
        value = losses.saliency_cross_entropy(
            jnp.array([[[1.0, 2.0]]]),
            jnp.array([[[3.0, 6.0]]]),
            kind="bernoulli",
            floor=0.01,
        )
        expected = (math.log(2) - math.log(0.99)) / 2
        np.testing.assert_allclose(value, [expected], rtol=1e-6)

    @pytest.mark.parametrize("kind", losses.CROSS_ENTROPIES)
    def test_numpy(self, kind):
        c, p = draw_maps()
        p[:, 1, 1] = 3.0
        expected = [
            reference.saliency_cross_entropy(a, b, kind=kind)
            for a, b in zip(c, p, strict=True)
        ]
        np.testing.assert_allclose(JITTED[kind](c, p), expected, rtol=1e-5)

    @pytest.mark.parametrize("kind", losses.CROSS_ENTROPIES)
    def test_smallest_at_the_target(self, kind):
        c, p = draw_maps()
        p[:, 1, 1] = 3.0
        assert np.all(JITTED[kind](p, p) < JITTED[kind](c, p))
        gradient, _ = GRADS[kind](p, p)
        away, _ = GRADS[kind](c, p)
        if kind == "categorical":  # bernoulli's clip at the peak moves the minimum
            assert np.abs(gradient).max() < 1e-5 * np.abs(away).max()

    @pytest.mark.parametrize("kind", losses.CROSS_ENTROPIES)
    def test_gradient_against_differences(self, kind):
        c, p = draw_maps(n=1, size=(2, 2))
        c = c + 0.5 + np.arange(4, dtype=np.float32).reshape(2, 2)  # peak stays put
        # Differences of a float32 value: 1e-7 / 1e-2 and the step squared.
        check_grads(
            lambda x: JITTED[kind](x, p),
            (c,),
            order=1,
            modes=["rev"],
            eps=1e-2,
            atol=5e-3,
            rtol=5e-3,
        )

    def test_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match="kind='cat'"):
            losses.saliency_cross_entropy(*draw_maps(), kind="cat")


class TestSaliencySuppression:
    def test_by_hand(self):
        # min = (1, 0, 2), sums 4 + 5 = 9: 3 / 9; masked by (1, 1, 1/2): 2 / 9.
        c, p = jnp.array([[[1.0, 0.0, 3.0]]]), jnp.array([[[2.0, 1.0, 2.0]]])
        mask = jnp.array([[[1.0, 1.0, 0.5]]])
        np.testing.assert_allclose(losses.saliency_suppression(c, p), [3 / 9])
        np.testing.assert_allclose(losses.saliency_suppression(c, p, mask), [2 / 9])

    def test_range(self):
        c, p = draw_maps()
        np.testing.assert_allclose(JITTED["suppression"](c, c), 0.5, rtol=1e-6)
        p[c > 0] = 0.0
        np.testing.assert_array_equal(JITTED["suppression"](c, p), 0.0)

    def test_numpy_and_symmetry(self):
        c, p = draw_maps()
        expected = list(map(reference.saliency_suppression, c, p))
        np.testing.assert_allclose(JITTED["suppression"](c, p), expected, rtol=1e-5)
        np.testing.assert_allclose(JITTED["suppression"](p, c), expected, rtol=1e-5)

    def test_gradient_by_hand(self):
        # (sum min) / (sum c + p) = m / T. Where c is the smaller: 1/T - m/T^2, else
        # -m/T^2; with c = (1, 3), p = (2, 1): m = 2, T = 7.
        c, p = jnp.array([[[1.0, 3.0]]]), jnp.array([[[2.0, 1.0]]])
        by_c, by_p = GRADS["suppression"](c, p)
        lower, upper = 1 / 7 - 2 / 49, -2 / 49
        np.testing.assert_allclose(by_c, [[[lower, upper]]], rtol=1e-5)
        np.testing.assert_allclose(by_p, [[[upper, lower]]], rtol=1e-5)

    @pytest.mark.parametrize("dtype", [bool, jnp.bfloat16])
    def test_mask_of_another_dtype(self, dtype):
        maps = jnp.ones((2, 1, 2, 2), jnp.bfloat16)
        mask = jnp.array([[[1, 0], [0, 0]]], dtype)
        assert losses.saliency_suppression(*maps, mask).tolist() == [1 / 8]

    def test_mask_of_another_shape_is_refused(self):
        c, p = draw_maps()
        with pytest.raises(AssertionError):
            losses.saliency_suppression(c, p, jnp.ones((4, 3, 1)))


class TestRunnerUpExcess:
    def test_by_hand(self):
        # L^p = (1, 1, 2) against a quarter of (4, 3, 0) = (1, .75, 0): the first cell
        # is at the limit and stays out; (1 + 2) / (7 + 4).
        c, p = jnp.array([[[4.0, 3.0, 0.0]]]), jnp.array([[[1.0, 1.0, 2.0]]])
        np.testing.assert_allclose(losses.runner_up_excess(c, p), [3 / 11], rtol=1e-6)

    @pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
    def test_numpy(self, fraction):
        c, p = draw_maps()
        expected = [
            reference.runner_up_excess(a, b, fraction=fraction)
            for a, b in zip(c, p, strict=True)
        ]
        value = losses.runner_up_excess(c, p, fraction=fraction)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_gradient_reaches_the_runner_up_only(self):
        # d/dL^p is 1 / total where selected, 0 elsewhere: no quotient rule.
        c, p = draw_maps()
        by_c, by_p = GRADS["excess"](c, p)
        np.testing.assert_array_equal(by_c, 0.0)
        expected = (p > 0.25 * c) / (c + p).sum((1, 2), keepdims=True)
        np.testing.assert_allclose(by_p, expected, rtol=1e-5)

    def test_negative_fraction_is_named(self):
        with pytest.raises(ValueError, match=r"fraction=-0\.1"):
            losses.runner_up_excess(*draw_maps(), fraction=-0.1)


class TestRunnerUpCosine:
    def test_by_hand(self):
        # (3, 4, 0) . (4, 3, 0) / 25, and maps of disjoint cells.
        c = jnp.array([[[3.0, 4.0, 0.0]], [[3.0, 4.0, 0.0]]])
        p = jnp.array([[[4.0, 3.0, 0.0]], [[0.0, 0.0, 2.0]]])
        np.testing.assert_allclose(
            losses.runner_up_cosine(c, p), [24 / 25, 0.0], rtol=1e-6
        )

    def test_cannot_be_lowered_by_losing_mass(self):
        """Unlike the excess: its gradient is at right angles to L^p itself."""
        c, p = draw_maps()
        by_c, by_p = GRADS["cosine"](c, p)
        np.testing.assert_array_equal(by_c, 0.0)
        radial = np.sum(np.asarray(by_p) * p, axis=(1, 2))
        size = np.linalg.norm(by_p, axis=(1, 2)) * np.linalg.norm(p, axis=(1, 2))
        assert np.all(size > 0.01)
        np.testing.assert_allclose(radial / size, 0.0, atol=1e-5)
        _, excess = GRADS["excess"](c, p)
        assert np.all(np.sum(np.asarray(excess) * p, axis=(1, 2)) > 0.01)


class TestRunnerUpMass:
    def test_by_hand(self):
        # (1 + 3 / 2) / 10 inside a teacher of maximum 4; a teacher elsewhere.
        c = jnp.array([[[2.0, 2.0, 0.0]], [[2.0, 2.0, 0.0]]])
        p = jnp.array([[[1.0, 3.0, 2.0]], [[1.0, 3.0, 0.0]]])
        teacher = jnp.array([[[4.0, 2.0, 0.0]], [[0.0, 0.0, 1.0]]])
        np.testing.assert_allclose(
            losses.runner_up_mass(c, p, teacher), [0.25, 0.0], rtol=1e-6
        )

    def test_falls_through_the_runner_up_inside_the_teacher_only(self):
        c, p = draw_maps()
        teacher, _ = draw_maps(seed=1)
        by_c, by_p, by_teacher = jax.grad(
            lambda *maps: jnp.sum(losses.runner_up_mass(*maps)), (0, 1, 2)
        )(c, p, teacher)
        np.testing.assert_array_equal(by_c, 0.0)
        np.testing.assert_array_equal(by_teacher, 0.0)
        scaled = teacher / teacher.max((1, 2), keepdims=True)
        expected = scaled / (c + p).sum((1, 2), keepdims=True)
        np.testing.assert_allclose(by_p, expected, rtol=1e-5)


class TestSoftMask:
    def test_by_hand(self):
        # Maximum 2, threshold 1.1: omega (2 - 1.1) = 0.9 omega, and -0.1, -1.1.
        mask = losses.soft_mask(jnp.array([[[2.0, 1.0, 0.0]]]), omega=10.0)
        expected = [1 / (1 + math.exp(-x)) for x in (9.0, -1.0, -11.0)]
        np.testing.assert_allclose(mask, [[expected]], rtol=1e-5)

    def test_each_map_has_its_own_maximum(self):
        c, _ = draw_maps()
        c = c * np.array([1, 10, 0.1, 1], np.float32)[:, None, None]
        expected = np.stack([reference.soft_mask(each) for each in c])
        np.testing.assert_allclose(losses.soft_mask(c), expected, atol=1e-4)

    def test_gradient_holds_the_maximum_constant(self):
        # d sigmoid(omega (L - t max)) / dL = omega m (1 - m) in the cell itself only.
        c = jnp.array([[[1.0, 0.55, 0.5]]])
        mask = losses.soft_mask(c, omega=20.0)
        gradient = jax.grad(lambda x: jnp.sum(losses.soft_mask(x, omega=20.0)))(c)
        np.testing.assert_allclose(gradient, 20 * mask * (1 - mask), rtol=1e-4)


@pytest.mark.parametrize("name", MAP_LOSSES)
class TestEveryMapLoss:
    def test_one_value_per_example_independent_of_the_others(self, name):
        c, p = draw_maps()
        together = JITTED[name](c, p)
        assert together.shape == (4,) and together.dtype == jnp.float32
        order = np.array([3, 1, 0, 2])
        np.testing.assert_array_equal(JITTED[name](c[order], p[order]), together[order])
        spoilt = c.copy()
        spoilt[2] = np.nan
        np.testing.assert_array_equal(
            np.delete(JITTED[name](spoilt, p), 2), np.delete(together, 2)
        )

    def test_eager_and_vmap_equal_jit(self, name):
        c, p = draw_maps()
        expected = JITTED[name](c, p)
        np.testing.assert_allclose(MAP_LOSSES[name](c, p), expected, rtol=1e-5)
        one = jax.vmap(lambda a, b: MAP_LOSSES[name](a[None], b[None])[0])
        np.testing.assert_allclose(one(c, p), expected, rtol=1e-5)

    @pytest.mark.parametrize("scale", [1e-20, 1e4, 1e20])
    def test_common_scale_does_not_matter(self, name, scale):
        c, p = draw_maps()
        np.testing.assert_allclose(
            JITTED[name](scale * c, scale * p), JITTED[name](c, p), rtol=1e-4
        )
        # Of degree zero: the gradient scales with the reciprocal.
        for scaled, plain in zip(
            GRADS[name](scale * c, scale * p), GRADS[name](c, p), strict=True
        ):
            np.testing.assert_allclose(
                scale * scaled, plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max()
            )

    def test_extremes_are_finite(self, name):
        zero = np.zeros((3, 4), np.float32)
        one_hot, other = zero.copy(), zero.copy()
        one_hot[1, 2] = other[0, 0] = 1.0
        ones, (c, _) = np.ones_like(zero), draw_maps(n=1)
        cases = [zero, one_hot, other, ones, c[0], 1e-20 * c[0], 1e4 * c[0]]
        pairs = [(a, b) for a in cases for b in cases]
        first, second = (np.stack(side) for side in zip(*pairs, strict=True))
        value = JITTED[name](first, second)
        assert np.all(np.isfinite(value))
        assert np.all(value >= 0)
        for gradient in GRADS[name](first, second):
            assert np.all(np.isfinite(gradient))
        # An all-zero map gets no gradient.
        blank = GRADS[name](zero[None], zero[None])
        for gradient in blank:
            np.testing.assert_array_equal(gradient, 0.0)

    def test_bfloat16_is_computed_in_float32(self, name):
        c, p = (jnp.asarray(x).astype(jnp.bfloat16) for x in draw_maps())
        low = JITTED[name](c, p)
        high = JITTED[name](c.astype(jnp.float32), p.astype(jnp.float32))
        np.testing.assert_allclose(low, high, rtol=1e-6)

    def test_shapes_are_checked(self, name):
        c, p = draw_maps()
        with pytest.raises(AssertionError):
            MAP_LOSSES[name](c, p[:, :2])
        with pytest.raises(AssertionError):
            MAP_LOSSES[name](c[0], p[0])


@pytest.mark.parametrize("kind", losses.CROSS_ENTROPIES)
class TestEveryCrossEntropy:
    def test_each_map_has_its_own_scale(self, kind):
        c, p = draw_maps()
        np.testing.assert_allclose(
            JITTED[kind](1e3 * c, 1e-3 * p), JITTED[kind](c, p), rtol=1e-4
        )

    def test_no_gradient_into_the_target(self, kind):
        _, by_target = GRADS[kind](*draw_maps())
        np.testing.assert_array_equal(by_target, 0.0)

    def test_all_zero_map_is_uniform_or_zero(self, kind):
        _, p = draw_maps()
        zero = np.zeros_like(p)
        value = JITTED[kind](zero, p)
        if kind == "categorical":
            np.testing.assert_allclose(value, math.log(12), rtol=1e-5)
        else:  # -mean(t) log(floor) - mean(1 - t) log(1 - floor)
            t = p / p.max((1, 2), keepdims=True)
            expected = -t.mean((1, 2)) * math.log(1e-3)
            expected -= (1 - t).mean((1, 2)) * math.log(1 - 1e-3)
            np.testing.assert_allclose(value, expected, rtol=1e-4)
        gradient, _ = GRADS[kind](zero, p)
        np.testing.assert_array_equal(gradient, 0.0)
