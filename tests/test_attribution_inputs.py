"""What attribution takes: heads, layers, keys, precisions; one line for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import attribution, feature_stats
from ibsgl_jax.models.heads import PooledLinear
from tests.attribution_case import IMAGES


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

    def test_moments_are_not_the_statistics(self):
        stats = feature_stats.init((8, 8, 3))
        with pytest.raises(ValueError, match="give feature_stats.moments of it"):
            self.run("ib", moments=stats)

    def test_an_option_is_no_array(self):
        with pytest.raises(
            ValueError, match="baseline is an array of shape .*a number"
        ):
            self.run("integrated_gradients", baseline=jnp.zeros((8, 8, 3)))

    def test_nor_a_list(self):
        with pytest.raises(ValueError, match=r"array of shape \(3,\): .*a number"):
            self.run("integrated_gradients", baseline=[0.0, 0.0, 0.0])

    def test_no_class_of_each_image(self):
        with pytest.raises(ValueError, match="give one class per image, or"):
            self.run("hirescam", classes=jnp.zeros((2, 0), int))

    @pytest.mark.parametrize(
        ("images", "size", "words"),
        [
            (IMAGES[:0], 4, r"shape \(0, .*N >= 1"),
            (IMAGES[0], 4, "give \\[N, H, W, 3\\]"),
            (IMAGES, 0, "chunk_size=0: must be at least 1"),
        ],
    )
    def test_images_to_predict(self, images, size, words):
        with pytest.raises(ValueError, match=words):
            attribution.predict(
                lambda x: x, lambda f: f.mean((1, 2)), images, chunk_size=size
            )

    def test_classes_by_name(self):
        fn = attribution.make_attribution_fn(
            "grad_cam", lambda x: x, lambda f: f.mean((1, 2))
        )
        images, classes = jnp.asarray(IMAGES[:2, :8, :8]), jnp.array([1, 2])
        np.testing.assert_array_equal(fn(images, classes=classes), fn(images, classes))
