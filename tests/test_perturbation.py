"""Perturbation curves, against reference arrays, dense algebra and linear models."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.imputation import make_hole, solved_directly
from ibsgl_jax import imputation, metrics, perturbation
from tests import golden_net

MAPS = ("gcamB", "layerA", "gcamB16", "rand", "gauss", "zeros", "ones", "seg")
ATOL = 3e-6  # the reference arrays' own float32 rounding

NET = golden_net.load("net1_model")
GOLDEN = golden_net.load("net1_metrics")
IMAGES = np.asarray(NET["inputs"])
LABELS = np.asarray(NET["labels"])
BASELINES = {"zero": np.zeros_like(IMAGES), "blur": GOLDEN["blur_baseline"]}


def golden_prob(images):
    return metrics.probability(golden_net.logits(NET, images), LABELS)


golden_curves = jax.jit(
    functools.partial(perturbation.deletion_insertion, golden_prob, IMAGES)
)


def brightness(images):
    """A model whose score is the mean of the image: linear, so curves are known."""
    return jnp.mean(images, axis=(1, 2, 3))


def random_case(num=3, size=(8, 8), seed=0):
    generator = np.random.default_rng(seed)
    images = generator.uniform(size=(num, *size, 2)).astype(np.float32)
    return images, generator.uniform(size=(num, *size)).astype(np.float32)


# One call of each measure, for the properties they share.
MEASURES = {
    "deletion_insertion": lambda images, maps: perturbation.deletion_insertion(
        brightness, images, maps, 0.0, num_steps=5
    ),
    "degradation": lambda images, maps: perturbation.degradation(
        brightness, images, maps, perturbation.mean_baseline(images), tile=3
    ),
    "road": lambda images, maps: perturbation.road(
        jax.random.key(0), brightness, images, maps, fractions=(0.2, 0.6)
    ),
    "sensitivity_n": lambda images, maps: perturbation.sensitivity_n(
        jax.random.key(0), brightness, images, maps, num_features=6, num_masks=7
    ),
}


JITTED = {name: jax.jit(measure) for name, measure in MEASURES.items()}


def per_image(result):
    """The arrays of a result that have one row per image, as NumPy arrays."""
    if not hasattr(result, "_asdict"):
        return [np.asarray(result)]
    fields = result._asdict()
    return [np.asarray(fields[name]) for name in fields if name != "fractions"]


class TestEveryMeasure:
    @pytest.mark.parametrize("name", MEASURES)
    def test_jit_and_vmap_equal_eager(self, name):
        images, maps = random_case()
        eager = MEASURES[name](images, maps)
        chex.assert_trees_all_close(JITTED[name](images, maps), eager, atol=1e-5)
        stacked = jax.jit(jax.vmap(MEASURES[name]))(images[None], maps[None])
        unstacked = jax.tree.map(lambda x: x[0], stacked)
        chex.assert_trees_all_close(unstacked, eager, atol=1e-5)

    @pytest.mark.parametrize("name", MEASURES)
    def test_images_do_not_interact(self, name):
        images, maps = random_case()
        with_nan = maps.copy()
        with_nan[1, 2, 3] = np.nan
        batch = per_image(JITTED[name](images, with_nan))
        for i in (0, 2):
            alone = np.full(3, i)  # a batch of only this image
            for mixed, single in zip(
                batch, per_image(JITTED[name](images[alone], maps[alone])), strict=True
            ):
                np.testing.assert_allclose(mixed[i], single[0], atol=1e-6)
        assert all(np.isnan(values[1]).all() for values in batch)

    @pytest.mark.parametrize("name", MEASURES)
    def test_constant_maps_are_finite(self, name):
        images, maps = random_case()
        for value in (0.0, 0.1):
            got = JITTED[name](images, np.full_like(maps, value))
            chex.assert_tree_all_finite(got)


class TestBlurBaseline:
    def test_golden(self):
        got = perturbation.blur_baseline(IMAGES)
        np.testing.assert_allclose(got, GOLDEN["blur_baseline"], atol=ATOL)

    def test_border_is_not_repeated(self):
        # Weights (a, b, a) with b + 2a = 1; the row 0 1 0 0 is mirrored to 1 |0 1 0 0|
        # 0, so that the left end sees the 1 twice.
        image = np.float32([0, 1, 0, 0]) * np.ones((1, 4, 1), np.float32)
        got = perturbation.blur_baseline(image[..., None], sigma=1.0, kernel_size=3)[
            0, 0, :, 0
        ]
        a = np.exp(-0.5) / (1 + 2 * np.exp(-0.5))
        np.testing.assert_allclose(got, [2 * a, 1 - 2 * a, a, 0], rtol=1e-6)

    def test_even_kernel(self):
        with pytest.raises(ValueError, match="odd"):
            perturbation.blur_baseline(IMAGES, kernel_size=10)


class TestMeanBaseline:
    def test_colour_of_each_image(self):
        images = np.stack([np.full((2, 3, 3), 1.0), np.full((2, 3, 3), 5.0)])
        got = perturbation.mean_baseline(images)
        np.testing.assert_array_equal(got[:, 0, 0], [[1] * 3, [5] * 3])


class TestDeletePixels:
    def test_most_salient_go(self):
        maps = np.array([[[4.0, 1.0], [3.0, 2.0]]])
        got = perturbation.delete_pixels(
            np.ones((1, 2, 2, 3)), maps, -1.0, fraction=0.5
        )
        np.testing.assert_array_equal(got[0, ..., 0], [[-1, 1], [-1, 1]])


class TestDeletionInsertion:
    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize("name", MAPS)
    def test_golden(self, name, baseline):
        maps = np.asarray(GOLDEN[f"{name}__map32"])
        got = golden_curves(maps, BASELINES[baseline])
        prefix = f"{name}__{baseline}"
        np.testing.assert_array_equal(got.fractions, GOLDEN[f"{prefix}_fractions"])
        for kind in ("deletion", "insertion"):
            for field, key in ((kind, f"{kind}_curve"), (f"{kind}_auc",) * 2):
                np.testing.assert_allclose(
                    getattr(got, field), GOLDEN[f"{prefix}_{key}"], atol=ATOL
                )

    def test_by_hand(self):
        # Pixels 4 3 2 1 in the order of the map, score = mean = 10/4. Deleting two a
        # step leaves 10, 3, 0 quarters, inserting gives 0, 7, 10. Trapezoid, width
        # 1/2: deletion (10 + 2*3 + 0)/16 = 1, insertion (0 + 14 + 10)/16 = 1.5.
        images = np.array([4.0, 3.0, 2.0, 1.0]).reshape(1, 2, 2, 1)
        got = perturbation.deletion_insertion(
            brightness, images, images[..., 0], 0.0, num_steps=2
        )
        np.testing.assert_allclose(got.deletion[0], [2.5, 0.75, 0.0])
        np.testing.assert_allclose(got.insertion[0], [0.0, 1.75, 2.5])
        np.testing.assert_allclose(got.deletion_auc, 1.0)
        np.testing.assert_allclose(got.insertion_auc, 1.5)

    def test_whole_numbers_are_ranked_as_they_are(self):
        images, maps = random_case()
        maps = np.round(255 * maps / maps.max()).astype(np.uint8)
        maps[:, 0] = 0
        run = functools.partial(
            perturbation.deletion_insertion, brightness, images, baseline=0.0
        )
        chex.assert_trees_all_equal(run(maps=maps), run(maps=maps.astype(np.float32)))
        mask = maps > 100
        chex.assert_trees_all_equal(run(maps=mask), run(maps=mask.astype(np.float32)))

    def test_a_model_that_gives_more_than_a_probability(self):
        images, maps = random_case(num=1)
        with pytest.raises(ValueError, match=r"\[1, 2\] of 1 images: give the prob"):
            perturbation.deletion_insertion(
                lambda x: jnp.ones((len(x), 2)), images, maps, 0.0
            )

    def test_more_steps_than_pixels(self):
        # As above one pixel at a time: 10 6 3 1 0 quarters, and 0 for the idle steps;
        # (10 + 2 * (6 + 3 + 1) + 0) / 4 * 1/8 = 30/32.
        images = np.array([4.0, 3.0, 2.0, 1.0]).reshape(1, 2, 2, 1)
        got = perturbation.deletion_insertion(
            brightness, images, images[..., 0], 0.0, num_steps=6
        )
        np.testing.assert_allclose(got.fractions, [0, 0.25, 0.5, 0.75, 1, 1, 1])
        np.testing.assert_allclose(got.deletion[0] * 4, [10, 6, 3, 1, 0, 0, 0])
        np.testing.assert_allclose(got.deletion_auc, 30 / 32)

    def test_the_model_is_traced_once(self):
        traces = []

        def model(images):
            traces.append(images.shape)
            return brightness(images)

        jax.eval_shape(
            lambda x, m: perturbation.deletion_insertion(model, x, m, 0.0),
            *random_case(),
        )
        assert traces == [(3, 8, 8, 2)]  # no more images at a time than given


class TestDegradation:
    def test_by_hand(self):
        # Tiles of 2 x 2 that hold 4 3 / 2 1, the map in the same order, one tile a
        # step: MoRF leaves 10 6 3 1 0 quarters, LeRF 10 9 7 4 0. The differences
        # 0 3 4 3 0 quarters under the trapezoid of width 1/4: 10/16.
        values = np.array([[4.0, 3.0], [2.0, 1.0]])
        image = np.kron(values, np.ones((2, 2)))[None, :, :, None]
        got = perturbation.degradation(brightness, image, image[..., 0], 0.0, tile=2)
        np.testing.assert_allclose(got.fractions, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(got.morf[0] * 4, [10, 6, 3, 1, 0])
        np.testing.assert_allclose(got.lerf[0] * 4, [10, 9, 7, 4, 0])
        np.testing.assert_allclose(got.area, 10 / 16)

    def test_whole_tiles_go_by_their_mean(self):
        # 3 x 2 tiles, those at the border smaller. The model adds 2^tile for a tile
        # that is there, so its value names the tiles that are left; a part of a tile
        # would be a fraction.
        tile_of = np.arange(7)[:, None] // 3 * 2 + np.arange(5) // 3
        sizes = np.bincount(tile_of.ravel())
        code = (2.0**tile_of / sizes[tile_of])[None, :, :, None]
        maps = np.random.default_rng(0).uniform(size=(1, 7, 5))
        means = [maps[0][tile_of == t].mean() for t in range(6)]
        got = perturbation.degradation(
            lambda x: jnp.sum(x * code, axis=(1, 2, 3)),
            np.ones((1, 7, 5, 1)),
            maps,
            0.0,
            tile=3,
            num_steps=3,
        )
        rising = 2.0 ** np.argsort(means)
        wanted = [rising[: 6 - k].sum() for k in (0, 2, 4, 6)]
        np.testing.assert_allclose(got.morf[0], wanted, atol=1e-4)
        wanted = [rising[k:].sum() for k in (0, 2, 4, 6)]
        np.testing.assert_allclose(got.lerf[0], wanted, atol=1e-4)


impute = jax.jit(perturbation.noisy_linear_imputation)


class TestNoisyLinearImputation:
    KEY = jax.random.key(0)

    def test_equals_a_dense_solver(self):
        images, _ = random_case(num=2, size=(12, 11))
        removed = np.random.default_rng(4).uniform(size=(2, 12, 11)) < 0.7
        got = impute(self.KEY, images, removed, noise=0.0)
        for image, gone, mine in zip(images, removed, got, strict=True):
            wanted = dense_imputation(image, gone)
            # Conjugate gradients stop at a relative residual of 1e-5.
            np.testing.assert_allclose(mine, wanted, atol=1e-4)

    def test_ramp_is_restored(self):
        # A linear function is its own weighted mean wherever all eight neighbours
        # exist, so a hole away from the border is filled exactly.
        y, x = np.mgrid[0:12, 0:11] / 10.0
        image = np.stack([2 * y - x, x])
        images = np.stack([image, -image]).transpose(0, 2, 3, 1)
        removed = np.zeros((2, 12, 11), bool)
        removed[:, 2:8, 2:9] = True
        got = impute(self.KEY, images, removed, noise=0.0)
        np.testing.assert_allclose(got, images, atol=1e-4)

    def test_noise_only_on_removed_pixels(self):
        images = np.ones((2, 12, 11, 2))
        removed = np.zeros((2, 12, 11), bool)
        removed[:, :9] = True
        got = impute(self.KEY, images, removed, noise=0.01)
        np.testing.assert_array_equal(got[:, 9:], 1.0)
        # 198 draws: the deviation of their deviation is 5 %, taken three times.
        np.testing.assert_allclose(np.std(got[:, :9]), 0.01, rtol=0.15)

    def test_everything_or_nothing_removed(self):
        images, _ = random_case(num=2, size=(12, 11))
        removed = np.zeros((2, 12, 11), bool)
        removed[0] = True
        got = impute(self.KEY, images, removed, noise=0.0)
        np.testing.assert_array_equal(got[0], 0)
        np.testing.assert_array_equal(got[1], images[1])


def dense_imputation(image, gone):
    """The same equations, pixel by pixel, solved by NumPy."""
    image, gone = np.asarray(image, np.float64), np.asarray(gone)
    height, width = gone.shape
    index = {pixel: i for i, pixel in enumerate(zip(*np.nonzero(gone), strict=True))}
    matrix = np.zeros((len(index), len(index)))
    right = np.zeros((len(index), image.shape[-1]))
    for (y, x), i in index.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near = (y + dy, x + dx)
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if (dy, dx) == (0, 0) or not inside:
                    continue
                weight = 1 / 12 if dy and dx else 1 / 6
                matrix[i, i] += weight
                if near in index:
                    matrix[i, index[near]] -= weight
                else:
                    right[i] += weight * image[near]
    filled = image.copy()
    filled[gone] = np.linalg.solve(matrix, right)
    return filled


class TestRoad:
    def test_order(self):
        # The map marks the bright square on black. MoRF at 16/64 fills it from its
        # black surrounding; LeRF at 48/64 removes all but the square, and what is
        # filled from it alone is bright.
        maps = np.zeros((1, 8, 8), np.float32)
        maps[0, 2:6, 2:6] = 1
        run = functools.partial(
            perturbation.road,
            jax.random.key(0),
            brightness,
            maps[..., None],
            maps,
            fractions=(0.25, 0.75),
            noise=0.0,
        )
        morf, lerf = run(order="morf"), run(order="lerf")
        np.testing.assert_allclose(morf[0, 0], 0.0, atol=1e-4)
        np.testing.assert_allclose(lerf[0, 1], 1.0, atol=1e-4)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_in_double_precision(self, dtype):
        images, maps = (x.astype(dtype) for x in random_case())
        run = functools.partial(perturbation.road, jax.random.key(0), brightness)
        single = run(images.astype(np.float32), maps.astype(np.float32))
        with jax.enable_x64(True):
            np.testing.assert_allclose(run(images, maps), single, atol=1e-4)

    def test_unknown_order(self):
        images, maps = random_case()
        with pytest.raises(ValueError, match="morf"):
            perturbation.road(
                jax.random.key(0), brightness, images, maps, order="random"
            )


@jax.jit
def linear_sensitivity(images, maps, weights, num_features):
    """``sensitivity_n`` of the linear model 0.1 + sum(weights * image)."""
    return perturbation.sensitivity_n(
        jax.random.key(1),
        lambda x: 0.1 + jnp.sum(x * weights[None], axis=(1, 2, 3)),
        images,
        maps,
        num_features=num_features,
        num_masks=20,
    )


class TestSensitivityN:
    def test_exact_attribution_of_a_linear_model(self):
        # The map weights * x loses exactly the logit that its pixels carry.
        images, _ = random_case()
        weights = np.random.default_rng(2).normal(size=(8, 8, 2))
        maps = np.sum(images * weights, axis=-1)
        for n in (1, 5, 50):
            got = linear_sensitivity(images, maps, weights, n)
            np.testing.assert_allclose(got, 1.0, atol=1e-5)
            got = linear_sensitivity(images, -maps, weights, n)
            np.testing.assert_allclose(got, -1.0, atol=1e-5)

    def test_sets_have_n_pixels(self):
        # Ones under a model that counts them: every set of n costs 2n, whatever the
        # map says, so nothing correlates; sets of varying size would.
        images, maps = random_case()
        got = linear_sensitivity(np.ones_like(images), maps, np.ones((8, 8, 2)), 9)
        np.testing.assert_array_equal(got, 0)

    def test_constant_map_or_model(self):
        images, maps = random_case()
        weights = np.ones((8, 8, 2))
        flat = linear_sensitivity(images, np.full_like(maps, 0.1), weights, 5)
        np.testing.assert_array_equal(flat, 0)
        deaf = linear_sensitivity(images, maps, weights * 0, 5)
        np.testing.assert_array_equal(deaf, 0)


class TestSensitivitySizes:
    def test_by_hand(self):
        # 0.8 * 125 = 100 = 10^2 in five steps of 10^(1/2): 1 3.16 10 31.6 100.
        sizes = perturbation.sensitivity_sizes(125, num_sizes=5)
        np.testing.assert_array_equal(sizes, [1, 3, 10, 32, 100])

    def test_small_image_has_no_repetitions(self):
        sizes = perturbation.sensitivity_sizes(10)
        np.testing.assert_array_equal(sizes, np.arange(1, 9))


class TestImputation:
    @pytest.mark.parametrize(
        "size", [61, *(pytest.param(n, marks=pytest.mark.slow) for n in (224, 448))]
    )
    def test_equals_a_direct_solution(self, size):
        """Holes of 10, 50 and 90 %, discs and scattered pixels, in one call."""
        generator = np.random.default_rng(0)
        coarse = generator.normal(size=(1, 7, 7, 2)).astype(np.float32)
        image = np.asarray(jax.image.resize(coarse, (1, size, size, 2), "linear"))[0]
        image = image + 0.1 * generator.normal(size=image.shape).astype(np.float32)
        holes = np.stack(
            [
                make_hole(kind, fraction, size)
                for kind in ("disc", "scattered")
                for fraction in (0.1, 0.5, 0.9)
            ]
        )
        found, iterations = jax.jit(imputation.solve)(
            np.broadcast_to(image, (6, *image.shape)), holes
        )
        assert int(jnp.max(iterations)) < 30
        for one, hole in zip(found, holes, strict=True):
            # Rounding of float32 grows with the number of unknowns across.
            np.testing.assert_allclose(
                one, solved_directly(image, hole), atol=4e-6 * size
            )
            np.testing.assert_array_equal(one[~hole], image[~hole])

    def test_the_whole_image_and_nothing(self):
        images = jnp.ones((2, 5, 6, 1))
        holes = jnp.stack([jnp.ones((5, 6), bool), jnp.zeros((5, 6), bool)])
        found, iterations = imputation.solve(images, holes)
        np.testing.assert_array_equal(found, [jnp.zeros((5, 6, 1)), images[1]])
        np.testing.assert_array_equal(iterations, 0)
