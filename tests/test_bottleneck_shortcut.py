"""The bottleneck of a pooled linear head: its shortcut, pieces and platforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ibsgl_jax import bottleneck
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import PooledLinear
from tests import reference
from tests.bottleneck_case import (
    IBA,
    MODEL,
    SHORT,
    SOFTMAX,
    assert_close,
    cells_first,
    correlation,
    generic,
    golden_moments,
    loop_arguments,
    run_small,
    small_case,
)


class TestPooledShortcut:
    def test_logits_have_the_moments_of_the_generic_path(self, monkeypatch):
        head, features, labels, moments = small_case(n=1)
        config = BottleneckConfig(beta=0.0, num_samples=40_000)
        alpha = jnp.asarray(np.random.default_rng(1).normal(size=features.shape))
        alpha = alpha.astype(jnp.float32)
        mean, covariance = reference.pooled_head_moments(
            alpha[0], features[0], *_clamped(moments), head.kernel, head.bias, sigma=1.0
        )
        num_classes = len(mean)

        def first_two_moments(logits, labels, num_copies):
            # In place of the cross-entropy: its mean over samples is the result.
            logits = logits.reshape(-1, num_copies, num_classes)
            centred = logits - jnp.asarray(mean, jnp.float32)[None, None]
            products = centred[..., :, None] * centred[..., None, :]
            products = products.reshape(*logits.shape[:-1], num_classes**2)
            return jnp.concatenate([centred, products], axis=-1)

        monkeypatch.setattr(jax, "value_and_grad", _value_only)
        blur = bottleneck.make_blur(features.shape[1:3], 1.0)
        key = jax.random.key(0)
        for make, shape in (
            (bottleneck._pooled_value_and_grad, features.shape[3:]),
            (bottleneck._generic_value_and_grad, features.shape[1:]),
        ):
            arguments = loop_arguments(features, labels, moments)
            evaluate = jax.jit(make(head, *arguments, blur, config, first_two_moments))
            noise = jax.random.normal(key, (1, config.num_samples, *shape))
            with jax.numpy_rank_promotion("allow"):  # the moments have an axis more
                both = np.asarray(evaluate(cells_first(alpha), noise)[0])[0]
            shift, spread = both[:num_classes], both[num_classes:]
            spread = spread.reshape(num_classes, num_classes)
            variance = np.diag(covariance)
            # Standard errors of a Gaussian's sample moments; 5 of them, 12 numbers.
            error = np.sqrt(variance / config.num_samples)
            assert np.all(np.abs(shift) < 5 * error)
            error = np.sqrt(
                (np.outer(variance, variance) + covariance**2) / config.num_samples
            )
            assert np.all(np.abs(spread - covariance) < 5 * error)
            # The tolerance separates right from wrong: 5 errors are 3.5 % here.
            assert np.all(5 * np.diag(error) < 0.04 * variance)

    @pytest.mark.parametrize("sigma", [1.0, None])
    def test_written_gradient_is_that_of_its_loss(self, sigma):
        head, features, labels, moments = small_case()
        blur = bottleneck.make_blur(features.shape[1:3], sigma)
        draw = np.random.default_rng(2)
        alpha = jnp.asarray(draw.normal(size=features.shape) * 3, jnp.float32)
        noise = jnp.asarray(draw.normal(size=(1, 3, 5)), jnp.float32)
        alpha = cells_first(alpha)
        value_and_grad = bottleneck._pooled_value_and_grad(
            head, *loop_arguments(features, labels, moments), blur, SHORT, SOFTMAX
        )
        _, written = jax.jit(value_and_grad)(alpha, noise)
        autodiff = jax.jit(jax.grad(lambda a: jnp.sum(value_and_grad(a, noise)[0])))
        # The last channel is inactive: no noise, so autodiff meets sqrt(0).
        np.testing.assert_array_equal(written[..., -1], 0.0)
        expected = autodiff(alpha)[..., :-1]
        np.testing.assert_allclose(
            written[..., :-1], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )

    def test_same_map_as_the_generic_path(self):
        head = PooledLinear(jnp.asarray(MODEL["fc_w"]), jnp.asarray(MODEL["fc_b"]))
        features, labels = jnp.asarray(MODEL["act_B"]), jnp.asarray(IBA["target"])
        key, moments = jax.random.key(0), golden_moments("B")

        def maps(pooled, num_samples):
            config = BottleneckConfig(num_samples=num_samples)
            return run_small(
                key, head, features, labels, moments, config=config, pooled=pooled
            ).saliency

        expected, many = maps(False, 60), maps(True, 60)
        for i in range(2):
            # Measured over eight images with 100 samples: .992 to 1. (One sample gives
            # .97 in the median over images and keys, as in the generic path, and .56
            # at worst: the features here are sparse with peaks of 500, so the noise
            # is strong.)
            assert correlation(many[i], expected[i]) > 0.98

    @pytest.mark.parametrize("case", ["plain", "relu", "noise", "closure"])
    def test_taken_for_a_pooled_linear_head_only(self, case, monkeypatch):
        head, features, labels, moments = small_case()
        taken = []

        def spy(name):
            original = getattr(bottleneck, name)

            def make(*args, **options):
                taken.append(name)
                return original(*args, **options)

            monkeypatch.setattr(bottleneck, name, make)

        spy("_pooled_value_and_grad")
        spy("_generic_value_and_grad")
        noise = jnp.zeros((4, 3, *features.shape)) if case == "noise" else None
        jax.eval_shape(
            lambda: bottleneck.attribute(
                jax.random.key(0),
                generic(head) if case == "closure" else head,
                features,
                labels,
                moments,
                config=dataclasses.replace(SHORT, relu=case == "relu"),
                noise=noise,
            )
        )
        path = "_pooled" if case == "plain" else "_generic"
        # Three times for the shortcut: on a CPU, on a TPU, elsewhere.
        assert set(taken) == {f"{path}_value_and_grad"}

    @pytest.mark.parametrize("num_keys", [0, 4])
    def test_pieces_equal_the_whole(self, num_keys, monkeypatch):
        """A CPU takes a few images at a time; nothing shows of it."""
        case = small_case(n=4)
        key = jax.random.key(3)
        key = jax.random.split(key, num_keys) if num_keys else key
        whole = run_small(key, *case)
        monkeypatch.setattr(bottleneck, "CPU_IMAGES", 2)
        head, *rest = case
        pieces = jax.jit(
            lambda key, *rest: bottleneck.attribute(key, head, *rest, config=SHORT)
        )(key, *rest)
        assert_close(pieces, whole)

    def test_a_cpu_takes_pieces_that_one_thread_keeps(self):
        size = functools.partial(bottleneck.piece_size, platform="cpu")
        assert size((64, 8, 8, 64)) == 4
        assert size((64, 2, 2, 512)) == 8
        assert size((64, 1, 1, 8)) == 8  # never more
        assert size((16, 7, 7, 2048)) == 8  # one image is too much
        assert size((6, 8, 8, 64)) == 6  # does not divide

    def test_a_tpu_takes_pieces_by_their_size(self):
        size = functools.partial(bottleneck.piece_size, platform="tpu")
        # 16 images of ResNet-50's features are 6.4 MB; small ones go all at once.
        assert size((128, 7, 7, 2048)) == 16
        assert size((128, 14, 14, 512)) == 16
        assert size((512, 8, 8, 64)) == 512
        assert size((24, 7, 7, 2048)) == 24  # does not divide
        assert size((3, 2000, 2000, 8)) == 1
        assert bottleneck.piece_size((128, 7, 7, 2048), platform="cuda") == 128

    def test_the_rules_of_a_tpu_give_the_same_maps(self, monkeypatch):
        """Its pieces and its blur, run here."""
        case = small_case(n=4)
        ours = run_small(jax.random.key(3), *case)
        monkeypatch.setattr(bottleneck, "TPU_PIECE", 2 * case[1][0].size)
        assert bottleneck.piece_size(case[1].shape, platform="tpu") == 2
        # The form of a TPU in the place of every other.
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args)
        )
        head, *rest = case
        theirs = jax.jit(
            lambda key, *rest: bottleneck.attribute(key, head, *rest, config=SHORT)
        )(jax.random.key(3), *rest)
        assert_close(theirs, ours)

    def test_every_platform_is_exported_with_its_own_form(self):
        """Pieces of the batch on a CPU, one product for the blur on a TPU."""
        head, features, labels, moments = small_case(n=16)
        fn = jax.jit(
            lambda f: (
                bottleneck.attribute(
                    jax.random.key(0), head, f, labels, moments, config=SHORT
                ).saliency
            )
        )
        texts = {
            platform: export.export(fn, platforms=(platform,))(features).mlir_module()
            for platform in ("cpu", "tpu", "cuda")
        }
        loops = {name: text.count("stablehlo.while") for name, text in texts.items()}
        assert loops["cpu"] > loops["cuda"] == loops["tpu"]
        products = {n: text.count("stablehlo.dot_general") for n, text in texts.items()}
        assert products["tpu"] < products["cuda"] == products["cpu"]
        everywhere = export.export(fn, platforms=("cpu", "tpu", "cuda"))(features)
        assert everywhere.mlir_module().count("stablehlo.while") > loops["cpu"]
        np.testing.assert_array_equal(everywhere.call(features), fn(features))

    def test_low_precision_kernel_is_used_in_float32(self):
        head, *args = small_case()
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
        high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
        key = jax.random.key(0)
        assert_close(run_small(key, low, *args), run_small(key, high, *args))


def _clamped(moments):
    return moments._replace(std=np.maximum(moments.std, 0.01))


def _value_only(fn, has_aux):
    """jax.value_and_grad without the gradient, for a loss that is not a scalar's."""
    del has_aux
    return lambda *args: (fn(*args), jnp.zeros_like(args[0]))
