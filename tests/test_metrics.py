"""Measures of maps: values derived by hand, and what all of them share."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ibsgl_jax import metrics, saliency


def random_maps(num, seed=0, size=(6, 7)):
    return np.random.default_rng(seed).uniform(size=(num, *size)).astype(np.float32)


def left_half(num, size=(6, 7)):
    return filled(np.zeros((num, *size), bool), np.s_[:, :, : size[1] // 2], True)


def filled(array, index, value):
    """A copy of the array with a value written at an index."""
    array = array.copy()
    array[index] = value
    return array


# Every function of maps, for the properties they share.
PAIRS = {
    "box_share": metrics.box_share,
    "pointing_hit": metrics.pointing_hit,
    "pointing_first": lambda m, k: metrics.pointing_hit(m, k, ties="first"),
    "pointing_near": lambda m, k: metrics.pointing_hit(m, k, tolerance=2),
    "iou": metrics.iou,
    "iou_curve": metrics.iou_curve,
    "best_iou": metrics.best_iou,
    "bounding_box_ratio": lambda m, k: metrics.bounding_box_ratio(m, k, max_area=1.0),
}
OTHER = saliency.normalize(random_maps(4, seed=9))
SINGLES = {
    "overlap": lambda m, k: metrics.overlap(m, OTHER[: len(m)]),
    "cosine": lambda m, k: metrics.cosine(m, OTHER[: len(m)]),
    "rank_correlation": lambda m, k: metrics.rank_correlation(m, OTHER[: len(m)]),
    "mass": lambda m, k: metrics.mass(m),
    "map_area": lambda m, k: metrics.map_area(m),
    "match_area": lambda m, k: metrics.match_area(m, 0.3),
    "explanation_map": lambda m, k: metrics.explanation_map(
        k[..., None].astype(jnp.float32), m
    ),
    "min_max": lambda m, k: metrics.explanation_map(
        k[..., None].astype(jnp.float32), m, normalization="min-max"
    ),
    "keep_top": lambda m, k: metrics.keep_top(k[..., None].astype(jnp.float32), m),
}
MEASURES = PAIRS | SINGLES
JITTED = {name: jax.jit(measure) for name, measure in MEASURES.items()}


class TestEveryMeasure:
    @pytest.mark.parametrize("name", MEASURES)
    def test_jit_and_vmap_equal_eager(self, name):
        maps, mask = random_maps(4), left_half(4)
        eager = MEASURES[name](maps, mask)
        jitted = JITTED[name](maps, mask)
        chex.assert_trees_all_close(jitted, eager, atol=1e-6)
        stacked = jax.jit(jax.vmap(MEASURES[name]))(maps[None], mask[None])
        unstacked = jax.tree.map(lambda x: x[0], stacked)
        chex.assert_trees_all_close(unstacked, eager, atol=1e-6)

    @pytest.mark.parametrize("name", PAIRS)
    def test_empty_mask_and_nan_map_do_not_count(self, name):
        maps = filled(random_maps(4), (1, 0, 0), np.nan)
        mask = filled(left_half(4), 2, False)
        score, count = map(np.asarray, JITTED[name](maps, mask))
        np.testing.assert_array_equal(count, [1, 0, 0, 1])
        np.testing.assert_array_equal(score[1:3], 0)  # an empty mask is no hit
        alone = np.asarray(JITTED[name](random_maps(4), left_half(4))[0])
        np.testing.assert_array_equal(score[[0, 3]], alone[[0, 3]])

    @pytest.mark.parametrize("name", SINGLES)
    @pytest.mark.parametrize("bad", (np.nan, np.inf))
    def test_a_bad_map_spoils_only_itself(self, name, bad):
        maps, mask = random_maps(4), left_half(4)
        got = np.asarray(JITTED[name](filled(maps, (1, 0, 0), bad), mask))
        alone = np.asarray(JITTED[name](maps, mask))
        np.testing.assert_array_equal(got[[0, 2, 3]], alone[[0, 2, 3]])
        assert np.isnan(got[1]).all()

    @pytest.mark.parametrize("name", MEASURES)
    def test_constant_maps_are_finite(self, name):
        for value in (0.0, 1e-20, 1e4, -1.0):
            got = JITTED[name](np.full((4, 6, 7), value), left_half(4))
            chex.assert_tree_all_finite(got)

    @pytest.mark.parametrize("name", PAIRS)
    def test_a_map_without_saliency_locates_nothing(self, name):
        score, count = JITTED[name](np.zeros((4, 6, 7)), left_half(4))
        np.testing.assert_array_equal(count, 1)
        # By row-major order a share of the first pixels is in any mask on the left.
        if name != "bounding_box_ratio":
            np.testing.assert_array_equal(score, np.zeros_like(score))

    @pytest.mark.parametrize("name", [*PAIRS, "cosine", "rank_correlation", "map_area"])
    def test_scale_does_not_matter(self, name):
        maps, mask = random_maps(4), left_half(4)
        for scale in (1e-20, 1e4):
            scaled = JITTED[name](maps * scale, mask)
            chex.assert_trees_all_close(scaled, JITTED[name](maps, mask), atol=1e-5)


class TestPixelRanks:
    def test_of_no_map(self):
        assert metrics.pixel_ranks(jnp.zeros((0, 3, 2))).shape == (0, 3, 2)

    def test_ties_keep_row_major_order(self):
        maps = np.array([[[1.0, 5.0], [5.0, 2.0]]])
        np.testing.assert_array_equal(metrics.pixel_ranks(maps)[0], [[3, 0], [1, 2]])


class TestBoxesToMask:
    def test_centre_decides(self):
        # Centres at .125 .375 .625 .875: rows 1, 2 lie in [.3, .7), column 3 in
        # [.8, 1); the second box holds no centre, the third is inside out.
        boxes = np.array([[0.3, 0.8, 0.7, 1.0], [0.2, 0.0, 0.3, 1.0], [1, 1, 0, 0]])
        got = metrics.boxes_to_mask(boxes, (4, 4))
        wanted = np.zeros((3, 4, 4), bool)
        wanted[0, 1:3, 3] = True
        np.testing.assert_array_equal(got, wanted)

    def test_not_square(self):
        box = np.array([[0.0, 0.0, 0.5, 0.5]])
        assert metrics.boxes_to_mask(box, (2, 8))[0].sum() == 4

    def test_nan_is_empty(self):
        assert not metrics.boxes_to_mask(np.full((1, 4), np.nan), (4, 4)).any()


class TestExplanationMap:
    IMAGE = np.array([[[[10.0], [20.0]]]])  # one image of two pixels

    def test_normalizations(self):
        maps = np.array([[[1.0, 2.0]]])
        # max: (1/2, 1); min-max: (0, 1); none: (1, 2).
        for kind, wanted in (
            ("max", [5.0, 20.0]),
            ("min-max", [0.0, 20.0]),
            ("none", [10.0, 40.0]),
        ):
            got = metrics.explanation_map(self.IMAGE, maps, normalization=kind)
            np.testing.assert_allclose(got[0, 0, :, 0], wanted)

    def test_negative_saliency_hides_the_pixel_and_does_not_invert_it(self):
        maps = np.array([[[-3.0, 2.0]]])
        got = metrics.explanation_map(self.IMAGE, maps)
        np.testing.assert_allclose(got[0, 0, :, 0], [0.0, 20.0])
        assert got.mean() == 20.0 * metrics.map_area(maps)[0]  # the same share

    def test_baseline_shows_where_the_map_is_zero(self):
        maps = np.array([[[1.0, 2.0]]])
        got = metrics.explanation_map(self.IMAGE, maps, baseline=4.0)
        np.testing.assert_allclose(got[0, 0, :, 0], [7.0, 20.0])  # half 10, half 4

    def test_unknown_normalization(self):
        with pytest.raises(ValueError, match="min-max"):
            metrics.explanation_map(self.IMAGE, np.ones((1, 1, 2)), normalization="l2")


class TestKeepTop:
    def test_half_of_the_pixels(self):
        image = np.arange(1.0, 5.0).reshape(1, 2, 2, 1)
        maps = np.array([[[0.1, 0.9], [0.2, 0.3]]])
        got = metrics.keep_top(image, maps, baseline=-1.0)
        np.testing.assert_array_equal(got[0, ..., 0], [[-1, 2], [-1, 4]])

    def test_half_of_a_constant_map_too(self):
        got = metrics.keep_top(np.ones((1, 4, 4, 3)), np.ones((1, 4, 4)))
        assert got.sum() == 8 * 3

    def test_bad_fraction(self):
        with pytest.raises(ValueError, match="fraction"):
            metrics.keep_top(np.ones((1, 2, 2, 1)), np.ones((1, 2, 2)), fraction=50)


class TestDrop:
    def test_divided_by_the_original_score(self):
        # (.8 - .2) / .8 = .75; the absolute drop is .6. .5 -> .9 rises: no drop.
        prob, explained = np.array([0.8, 0.5]), np.array([0.2, 0.9])
        np.testing.assert_allclose(metrics.drop(prob, explained), [0.75, 0.0])
        lost = metrics.absolute_drop(prob, explained)
        np.testing.assert_allclose(lost, [0.6, 0.0], rtol=1e-6)

    def test_zero_score_has_nothing_to_lose(self):
        got = metrics.drop(np.array([0.0, 0.0]), np.array([0.0, 0.5]))
        np.testing.assert_array_equal(got, 0)
        assert np.isfinite(jax.grad(lambda p: metrics.drop(p, p * 0).sum())(got)).all()

    def test_tiny_score_is_exact(self):
        # An epsilon in the denominator would make this 5e-3.
        got = metrics.drop(np.array([1e-9]), np.array([5e-10]))
        np.testing.assert_allclose(got, 0.5, rtol=1e-6)

    def test_images_that_rise_stay_in_the_mean(self):
        # Drops 1/2, 0, 0, 0: the mean over all images is 1/8, not 1/2.
        drops = metrics.drop(np.full(4, 0.4), np.array([0.2, 0.5, 0.6, 0.4]))
        total, count = metrics.sum_and_count(drops)
        np.testing.assert_allclose(total / count, 0.125, rtol=1e-6)

    def test_fewer_scores_than_images_is_an_error(self):
        with pytest.raises(AssertionError):
            metrics.drop(np.ones(4), np.ones(1))


class TestIncrease:
    def test_strict(self):
        got = metrics.increase(np.full(3, 0.5), np.array([0.5, 0.6, 0.4]))
        np.testing.assert_array_equal(got, [0, 1, 0])

    def test_nan_is_no_answer(self):
        assert np.isnan(metrics.increase(np.array([0.5]), np.array([np.nan])))[0]


class TestBoxShare:
    def test_by_hand(self):
        # Positive saliency 1 + 2 + 5, of it 1 + 5 inside; the -9 counts as zero.
        maps = np.array([[[1.0, 2.0], [5.0, -9.0]]])
        mask = np.array([[[1, 0], [1, 1]]])
        share, _ = metrics.box_share(maps, mask)
        np.testing.assert_allclose(share, 0.75)


class TestPointingHit:
    def test_ties(self):
        maps = np.array([[[3.0, 1.0, 3.0]]])
        mask = np.array([[[False, False, True]]])
        assert metrics.pointing_hit(maps, mask, ties="any")[0] == 1
        assert metrics.pointing_hit(maps, mask, ties="first")[0] == 0

    def test_tolerance_is_strict(self):
        # The peak is 5 = sqrt(9 + 16) pixels from the only pixel of the mask.
        maps = filled(np.zeros((1, 8, 9)), (0, 0, 0), 1.0)
        mask = filled(np.zeros((1, 8, 9), bool), (0, 3, 4), True)
        for ties in metrics.TIES:
            hits = [
                float(metrics.pointing_hit(maps, mask, tolerance=t, ties=ties)[0][0])
                for t in (0, 5, 6)
            ]
            assert hits == [0, 0, 1]

    def test_options(self):
        maps = np.ones((1, 2, 2))
        with pytest.raises(ValueError, match="ties"):
            metrics.pointing_hit(maps, maps, ties="last")
        with pytest.raises(ValueError, match="tolerance"):
            metrics.pointing_hit(maps, maps, tolerance=-1)


class TestIou:
    MAPS = np.array([[[8.0, 6.0], [3.0, 0.0]]])  # shares of the maximum 1, .75, .375
    MASK = np.array([[[True, False], [True, False]]])

    @pytest.mark.parametrize(
        "threshold, wanted",
        # Predicted 3, 2, 1 pixels of which 2, 1, 1 lie in the mask of 2; at .375 the
        # third pixel is not strictly above.
        [(0.0, 2 / 3), (0.3, 2 / 3), (0.375, 1 / 3), (0.8, 1 / 2)],
    )
    def test_by_hand(self, threshold, wanted):
        score, _ = metrics.iou(self.MAPS, self.MASK, threshold=threshold)
        np.testing.assert_allclose(score, wanted, rtol=1e-6)

    def test_curve_holds_the_single_scores(self):
        scores, count = metrics.iou_curve(self.MAPS, self.MASK, num_thresholds=4)
        singles = [
            metrics.iou(self.MAPS, self.MASK, threshold=k / 4)[0] for k in range(4)
        ]
        np.testing.assert_array_equal(scores, np.stack(singles, axis=1))
        chex.assert_shape(count, (1,))

    def test_best(self):
        score, _ = metrics.best_iou(self.MAPS, self.MASK, num_thresholds=10)
        np.testing.assert_allclose(score, 2 / 3, rtol=1e-6)

    def test_threshold_range(self):
        with pytest.raises(ValueError, match="threshold"):
            metrics.iou(self.MAPS, self.MASK, threshold=1.0)


class TestBoundingBoxRatio:
    def test_by_hand(self):
        # A box of 2 pixels; the two most salient are one of them and one outside.
        maps = np.array([[[9.0, 8.0, 7.0], [0.0, 0.0, 0.0]]])
        box = np.array([[[True, False, True], [False, False, False]]])
        ratio, count = metrics.bounding_box_ratio(maps, box, max_area=0.34)
        assert (float(ratio[0]), float(count[0])) == (0.5, 1.0)

    def test_large_boxes_do_not_count(self):
        box = np.zeros((4, 42), bool)  # .33 of 42 pixels is 13.86
        box[0, :13] = box[1, :14] = box[2, :1] = True
        _, count = metrics.bounding_box_ratio(random_maps(4), box.reshape(4, 6, 7))
        np.testing.assert_array_equal(count, [1, 0, 1, 0])


class TestOverlap:
    def test_by_hand(self):
        # min: 1 + 0 + 2 = 3; sum: 4 + 1 + 4 = 9; 2 * 3 / 9.
        c, p = np.array([[[1.0, 1.0, 2.0]]]), np.array([[[3.0, 0.0, 2.0]]])
        np.testing.assert_allclose(metrics.overlap(c, p), 2 / 3, rtol=1e-6)

    def test_ends(self):
        maps = random_maps(4)
        np.testing.assert_allclose(metrics.overlap(maps, maps), 1.0, rtol=1e-6)
        c, p = filled(maps, np.s_[:, :3], 0), filled(maps, np.s_[:, 3:], 0)
        np.testing.assert_array_equal(metrics.overlap(c, p), 0)
        np.testing.assert_array_equal(metrics.overlap(maps * 0, maps * 0), 0)


class TestCosine:
    def test_by_hand(self):
        a = np.array([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[1.0, 2.0]]])
        b = np.array([[[4.0, 3.0]], [[0.0, 2.0]], [[1.0, 1.0]], [[-1.0, -2.0]]])
        got = metrics.cosine(a, b)  # 24/25, orthogonal, all-zero, opposite
        np.testing.assert_allclose(got, [0.96, 0, 0, -1], atol=1e-6)


class TestMassAndArea:
    def test_by_hand(self):
        maps = np.array([[[2.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        np.testing.assert_allclose(metrics.mass(maps), [4, 0])
        np.testing.assert_allclose(metrics.map_area(maps), [0.5, 0])  # mean(1 .5 .5 0)

    def test_constant_map_fills_the_image(self):
        np.testing.assert_allclose(metrics.map_area(np.full((1, 3, 3), 7.0)), 1.0)


class TestMatchArea:
    def test_by_hand(self):
        # (1 + .5^e) / 2 = 5/8 needs .5^e = 1/4, e = 2.
        got = metrics.match_area(np.array([[[6.0, 3.0]]]), 0.625)
        np.testing.assert_allclose(got, [[[1.0, 0.25]]], atol=1e-6)

    @pytest.mark.parametrize("area", (0.05, 0.2, 0.5, 0.9))
    def test_area_is_reached_and_order_kept(self, area):
        maps = random_maps(4) * np.array([1e-6, 1.0, 10.0, 1e4])[:, None, None]
        got = metrics.match_area(maps, area)
        np.testing.assert_allclose(metrics.map_area(got), area, atol=1e-5)
        np.testing.assert_array_equal(
            np.argmax(got.reshape(4, -1), 1), np.argmax(maps.reshape(4, -1), 1)
        )
        assert (np.diff(np.sort(got.reshape(4, -1)), axis=1) >= 0).all()

    def test_area_per_image(self):
        areas = np.array([0.1, 0.2, 0.3, 0.4])
        got = metrics.map_area(metrics.match_area(random_maps(4), areas))
        np.testing.assert_allclose(got, areas, atol=1e-5)

    def test_maps_that_no_power_changes(self):
        maps = np.stack([np.zeros((2, 2)), np.full((2, 2), 3.0)])
        got = metrics.match_area(maps, 0.3)
        np.testing.assert_array_equal(got, np.stack([maps[0], np.ones((2, 2))]))

    def test_out_of_reach(self):
        # One positive pixel of four: no power goes beyond area 1/4.
        maps = np.array([[[5.0, 0.0], [0.0, 0.0]]])
        got = metrics.map_area(metrics.match_area(maps, 0.5))
        np.testing.assert_allclose(got, 0.25)


rank_correlation = jax.jit(metrics.rank_correlation)


class TestRankCorrelation:
    def test_equals_scipy_with_ties(self):
        a = np.round(random_maps(4, seed=1) * 5)  # many equal values
        b = np.round(a + 3 * random_maps(4, seed=2))
        wanted = [
            scipy.stats.spearmanr(np.ravel(x), np.ravel(y)).statistic
            for x, y in zip(np.asarray(a), np.asarray(b), strict=True)
        ]
        np.testing.assert_allclose(rank_correlation(a, b), wanted, atol=1e-6)

    def test_any_rising_function_gives_one(self):
        maps = random_maps(4)
        np.testing.assert_allclose(rank_correlation(maps, maps**3), 1.0)
        np.testing.assert_allclose(rank_correlation(maps, -maps), -1.0)

    def test_constant_map_gives_zero(self):
        got = rank_correlation(np.full((4, 6, 7), 0.1), random_maps(4))
        np.testing.assert_array_equal(got, 0)


class TestPearson:
    def test_equals_numpy(self):
        a, b = np.random.default_rng(0).normal(size=(2, 3, 20))
        wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(metrics.pearson(a, b), wanted, atol=1e-6)

    def test_constant_whose_mean_rounds(self):
        # Seven times 0.1 in float32 has a mean that is not 0.1.
        constant = np.full((1, 7), 0.1)
        np.testing.assert_array_equal(metrics.pearson(constant, constant), 0)
