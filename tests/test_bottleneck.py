import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from ibsgl_jax import bottleneck, feature_stats, saliency, targets
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.models import PooledLinear
from tests import golden_net, reference

MODEL = golden_net.load("net1_model")
STATS = golden_net.load("net1_iba_stats")
IBA = golden_net.load("net1_iba")
CONFIGS = {
    "relu0_sig1": BottleneckConfig(),
    "relu1_sig1": BottleneckConfig(relu=True),
    "relu0_signone": BottleneckConfig(blur_sigma=None),
    "relu0_sig1_beta1": BottleneckConfig(beta=1.0),
}
GOLDEN_RUNS = [(tap, name) for tap in "AB" for name in CONFIGS]
SHORT = BottleneckConfig(num_steps=4, num_samples=3)
SOFTMAX = targets.make_loss_fn("softmax")


def golden_noise():
    eps = golden_net.load("eps")
    noise = eps["eps_q"].astype(np.float32) * eps["scale"]
    return np.moveaxis(noise, 0, 2)  # [step, sample, image, H, W, K]


def golden_moments(tap):
    names = ("mean", "std", "active")
    return Moments(*(jnp.asarray(STATS[f"{name}_{tap}"]) for name in names))


def golden_head(tap):
    return lambda a: golden_net.head(MODEL, a, tap)


@functools.cache
def golden_run(tap, name):
    run = jax.jit(
        lambda features, labels, noise: bottleneck.attribute(
            None,
            golden_head(tap),
            features,
            labels,
            golden_moments(tap),
            config=CONFIGS[name],
            noise=noise,
        )
    )
    return jax.tree.map(
        np.asarray, run(MODEL[f"act_{tap}"], IBA["target"], golden_noise())
    )


def cells_first(maps):
    """[N, H, W, K] as the loop inside ``attribute`` holds it: [H, W, N, K]."""
    return jnp.moveaxis(jnp.asarray(maps), 0, 2)


def cells_last(maps):
    return jnp.moveaxis(maps, 2, 0)


def loop_arguments(features, labels, moments):
    """The arguments of ``attribute`` in the layout of its loop."""
    return (
        cells_first(features),
        labels,
        Moments(*(m[:, :, None] for m in moments)),
    )


@functools.cache
def golden_steps(tap):
    """The ten steps of image 0 one by one: gradients, and alpha before and after."""
    features, config = jnp.asarray(MODEL[f"act_{tap}"][:1]), BottleneckConfig()
    blur = bottleneck.make_blur(features.shape[1:3], config.blur_sigma)
    value_and_grad = jax.jit(
        bottleneck._generic_value_and_grad(
            golden_head(tap),
            *loop_arguments(
                features, jnp.asarray(IBA["target"][:1]), golden_moments(tap)
            ),
            blur,
            config,
            SOFTMAX,
        )
    )
    tx = bottleneck.make_adam(config.learning_rate, config.num_steps)
    update = jax.jit(tx.update)
    alpha = cells_first(jnp.full(features.shape, config.initial_alpha))
    opt_state, alphas, gradients = tx.init(alpha), [alpha], []
    for noise in golden_noise()[:, :, :1]:
        _, gradient = value_and_grad(alpha, noise)
        updates, opt_state = update(gradient, opt_state)
        alpha = optax.apply_updates(alpha, updates)
        alphas.append(alpha)
        gradients.append(gradient)
    return np.stack(alphas)[:, :, :, 0], np.stack(gradients)[:, :, :, 0]


def small_case(n=3, size=(3, 4), channels=5, num_classes=3, seed=0):
    """(head, features, labels, moments) with one inactive and one constant channel."""
    draw = np.random.default_rng(seed)
    shape = (*size, channels)
    head = PooledLinear(
        jnp.asarray(3 * draw.normal(size=(channels, num_classes)), jnp.float32),
        jnp.asarray(draw.normal(size=num_classes), jnp.float32),
    )
    features = jnp.asarray(draw.gamma(1.0, 1.0, (n, *shape)), jnp.float32)
    std = draw.uniform(0.3, 1.5, shape).astype(np.float32)
    active = np.ones(shape, bool)
    if channels > 1:
        std[..., 0] = 0.0  # clamped to min_std
        active[..., -1] = False
    moments = Moments(
        mean=jnp.asarray(draw.uniform(0.5, 1.5, shape), jnp.float32),
        std=jnp.asarray(std),
        active=jnp.asarray(active),
    )
    return head, features, jnp.asarray(np.arange(n) % num_classes), moments


def generic(head):
    """The same head behind a function, which hides that it is pooled and linear."""
    return lambda a: head(a)


@functools.partial(jax.jit, static_argnames=("config", "pooled"))
def _run_small(key, head, features, labels, moments, alpha, config, pooled):
    return bottleneck.attribute(
        key,
        head if pooled else generic(head),
        features,
        labels,
        moments,
        config=dataclasses.replace(config, initial_alpha=alpha),
    )


def run_small(
    key, head, features, labels, moments, *, alpha=5.0, config=SHORT, pooled=True
):
    return _run_small(key, head, features, labels, moments, alpha, config, pooled)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(leaf))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


@pytest.mark.parametrize(("tap", "name"), GOLDEN_RUNS)
class TestGoldenRuns:
    # The reference's own float32 rounding against float64 is 2e-4 in the loss
    # (1 - lambda by cancellation), 1.3e-4 bits in the map; ours is nearer to float64.
    def test_losses(self, tap, name):
        losses = golden_run(tap, name).losses.T
        np.testing.assert_allclose(losses, IBA[f"{tap}_{name}_loss"], atol=3e-4)
        split = (
            IBA[f"{tap}_{name}_model_loss"]
            + CONFIGS[name].beta * IBA[f"{tap}_{name}_information_loss"]
        )
        np.testing.assert_allclose(losses, split, atol=3e-4)

    def test_alpha_after_the_last_step(self, tap, name):
        expected = IBA[f"{tap}_{name}_alpha_final"]
        np.testing.assert_allclose(golden_run(tap, name).alpha, expected, atol=3e-4)

    def test_capacity_before_the_last_step(self, tap, name):
        nats = golden_run(tap, name).capacity
        np.testing.assert_allclose(
            nats, IBA[f"{tap}_{name}_capacity_nats"], rtol=1e-5, atol=3e-4
        )
        np.testing.assert_allclose(
            nats.sum((1, 2, 3)),
            IBA[f"{tap}_{name}_cap_steps_total_nats"][:, -1],
            rtol=2e-5,
        )

    def test_map_in_bits_per_pixel(self, tap, name):
        maps = golden_run(tap, name).saliency
        for ours, run32, run64 in zip(
            maps,
            IBA[f"{tap}_{name}_saliency_bits"],
            IBA[f"{tap}_{name}_saliency_bits_f64run"],
            strict=True,
        ):
            per_pixel = reference.resize_reflecting(ours, (32, 32)) / 4
            for expected in (run32, run64):
                np.testing.assert_allclose(
                    per_pixel, expected, atol=2e-5 * expected.max()
                )
            # Our own upsampling clamps the border; inside it is the same.
            upsampled = saliency.upsample(ours[None], (32, 32))[0] / 4
            np.testing.assert_allclose(
                upsampled[1:-1, 1:-1], per_pixel[1:-1, 1:-1], rtol=1e-5
            )


@pytest.mark.parametrize("tap", ["A", "B"])
class TestGoldenSteps:
    def test_map_at_the_features_resolution(self, tap):
        expected = IBA[f"{tap}_relu0_sig1_saliency_bits_native16"]
        np.testing.assert_allclose(
            golden_run(tap, "relu0_sig1").saliency, expected, rtol=1e-5, atol=1e-3
        )

    def test_gradient_of_the_first_step(self, tap):
        expected = IBA[f"{tap}_relu0_sig1_grad_step1_img0"]
        gradient = golden_steps(tap)[1][0]
        # 1 - lambda is .0067 at the start and the reference has it to 6e-8 / .0067 =
        # 1e-5 relative; that is the error of its 1 / (1 - lambda).
        peak = np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=3e-5, atol=3e-5 * peak)

    def test_alpha_after_every_step(self, tap):
        alphas = golden_steps(tap)[0]
        expected = IBA[f"{tap}_relu0_sig1_alpha_steps_img0"]
        np.testing.assert_allclose(alphas[1:], expected, atol=3e-4)
        # The loop of attribute does the same ten steps.
        np.testing.assert_allclose(
            golden_run(tap, "relu0_sig1").alpha[0], alphas[-1], atol=1e-4
        )

    def test_capacity_and_information_of_every_step(self, tap):
        alphas = golden_steps(tap)[0]
        moments = golden_moments(tap)
        expected = IBA[f"{tap}_relu0_sig1_cap_steps_total_nats"][0]
        information = IBA[f"{tap}_relu0_sig1_information_loss"][0]
        model_loss = IBA[f"{tap}_relu0_sig1_model_loss"][0]
        losses = golden_run(tap, "relu0_sig1").losses[:, 0]
        for i in range(10):
            nats = reference.capacity(
                alphas[i], MODEL[f"act_{tap}"][0], *moments, sigma=1.0
            )
            np.testing.assert_allclose(nats.sum(), expected[i], rtol=2e-5)
            # An inactive element counts as zero in the mean.
            np.testing.assert_allclose(nats.mean(), information[i], rtol=2e-5)
            # Ten times the information's rounding, see TestGoldenRuns.
            np.testing.assert_allclose(
                losses[i] - 10 * nats.mean(), model_loss[i], atol=3e-4
            )

    def test_lambda(self, tap):
        blur = bottleneck.make_blur((16, 16), 1.0)
        lam = 1 - bottleneck.noise_share(
            cells_first(IBA[f"{tap}_relu0_sig1_alpha_final"]), blur
        )
        np.testing.assert_allclose(
            cells_last(lam), IBA[f"{tap}_relu0_sig1_lambda_final"], atol=5e-7
        )
        before_last = bottleneck.noise_share(jnp.asarray(golden_steps(tap)[0][9]), blur)
        np.testing.assert_allclose(
            1 - before_last,
            IBA[f"{tap}_relu0_sig1_lambda_last_forward"][0],
            atol=2e-5,  # alpha's own 1e-4, times lambda' <= 1/4
        )


@pytest.mark.parametrize(("tap", "sigma"), [("A", None), ("B", None), ("A", 1.0)])
class TestSaturation:
    """Where the reference's float32 has lambda = 1 and an infinite or missing map."""

    def test_finite_where_the_reference_is_not(self, tap, sigma):
        features = jnp.asarray(MODEL[f"act_{tap}"][:1])
        moments = golden_moments(tap)
        config = BottleneckConfig(num_steps=3, blur_sigma=sigma)

        @jax.jit
        def run(alpha):
            return bottleneck.attribute(
                None,
                golden_head(tap),
                features,
                jnp.asarray(IBA["target"][:1]),
                moments,
                config=dataclasses.replace(config, initial_alpha=alpha),
                noise=golden_noise()[:3, :, :1],
            )

        blur_name = "sig1" if sigma else "signone"
        broken = IBA[f"sat_{tap}_a20_{blur_name}_steps3_counts"]
        # Its blur happens to add up to a little less than 1, which saves it there.
        assert (broken.sum() > 0) == (sigma is None)
        for alpha in (16.0, 20.0):
            result = run(alpha)
            assert_finite(result)
            assert result.saliency.min() >= 0
            # The first loss is the cross-entropy, nearly zero noise, plus 10 x the
            # capacity of a known alpha, which float64 has exactly.
            exact = reference.capacity(
                np.full(features.shape[1:], alpha), features[0], *moments, sigma=sigma
            )
            nats = bottleneck.capacity(
                bottleneck.noise_share(
                    jnp.full(features.shape[1:], alpha),
                    bottleneck.make_blur((16, 16), sigma),
                ),
                jnp.square(
                    (features[0] - moments.mean) / jnp.maximum(moments.std, 0.01)
                ),
                moments.active,
            )
            np.testing.assert_allclose(nats, exact, rtol=2e-6, atol=2e-6)
            clean = golden_net.head(
                MODEL, jnp.where(moments.active, features, 0.0), tap
            )
            label = IBA["target"][0]
            cross_entropy = -reference.log_softmax(clean)[0, label]
            np.testing.assert_allclose(
                result.losses[0, 0], cross_entropy + 10 * exact.mean(), rtol=1e-5
            )


class TestBounds:
    """What float32 cannot square, but whose sum it still holds."""

    @pytest.mark.parametrize("pooled", [True, False])
    @pytest.mark.parametrize("size", [1e18, 1e25, 1e37])
    def test_huge_features_give_finite_maps(self, size, pooled):
        head = PooledLinear(jax.random.normal(jax.random.key(1), (6, 3)), jnp.zeros(3))
        draws = jax.random.normal(jax.random.key(0), (5, 4, 4, 6))
        features = size * jnp.clip(draws, 0.0, 1.0)
        stats = feature_stats.init((4, 4, 6))
        for part in (features[:2], features[2:]):
            stats = feature_stats.update(stats, part)
        result = self.run(head, features, feature_stats.moments(stats), pooled)
        assert_finite(result)
        assert jnp.any(result.saliency > 0)

    @staticmethod
    @functools.partial(jax.jit, static_argnames="pooled")
    def run(head, features, moments, pooled):
        return bottleneck.attribute(
            jax.random.key(0),
            head if pooled else lambda features: head(jnp.tanh(features)),
            features,
            jnp.zeros(5, jnp.int32),
            moments,
            config=BottleneckConfig(num_steps=3, num_samples=2),
        )

    def test_the_least_deviation_is_finite_too(self):
        head, features, labels, moments = small_case()
        config = BottleneckConfig(num_steps=3, min_std=bottleneck.MIN_STD)
        moments = moments._replace(std=jnp.zeros_like(moments.std))
        result = run_small(
            jax.random.key(0), head, 1e18 * features, labels, moments, config=config
        )
        assert_finite(result)


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
            logits = logits.reshape(num_copies, -1, num_classes)
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
            noise = jax.random.normal(key, (config.num_samples, 1, *shape))
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
        noise = jnp.asarray(draw.normal(size=(3, 1, 5)), jnp.float32)
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


@pytest.mark.parametrize("pooled", [True, False])
class TestIndependence:
    def test_batch_equals_loop_of_singles_under_one_key(self, pooled):
        head, features, labels, moments = small_case()
        key = jax.random.key(3)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        assert batch.losses.shape == (SHORT.num_steps, 3)
        assert batch.saliency.shape == features.shape[:3]
        assert batch.capacity.shape == batch.alpha.shape == features.shape
        for i in range(3):
            one = slice(i, i + 1)
            alone = run_small(
                key, head, features[one], labels[one], moments, pooled=pooled
            )
            _assert_row(batch, i, alone, 0)

    def test_batch_equals_loop_of_singles_under_a_key_each(self, pooled):
        head, features, labels, moments = small_case()
        keys = jax.random.split(jax.random.key(3), 3)
        batch = run_small(keys, head, features, labels, moments, pooled=pooled)
        for i in range(3):
            one = slice(i, i + 1)
            alone = run_small(
                keys[i], head, features[one], labels[one], moments, pooled=pooled
            )
            _assert_row(batch, i, alone, 0)

    def test_permuting_the_batch_permutes_the_result(self, pooled):
        head, features, labels, moments = small_case()
        order = np.array([2, 0, 1])
        key = jax.random.key(0)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        permuted = run_small(
            key, head, features[order], labels[order], moments, pooled=pooled
        )
        for i, j in enumerate(order):
            _assert_row(permuted, i, batch, j)

    def test_a_broken_image_leaves_its_neighbours_alone(self, pooled):
        head, features, labels, moments = small_case()
        key = jax.random.key(0)
        batch = run_small(key, head, features, labels, moments, pooled=pooled)
        broken = run_small(
            key, head, features.at[1].set(jnp.nan), labels, moments, pooled=pooled
        )
        for i in (0, 2):
            _assert_row(broken, i, batch, i)

    def test_keys_matter(self, pooled):
        head, *args = small_case()
        one, other = (
            run_small(jax.random.key(i), head, *args, pooled=pooled) for i in (0, 1)
        )
        assert np.abs(one.alpha - other.alpha).max() > 1e-3

    def test_long_runs_in_bfloat16_are_finite_and_descend(self, pooled):
        head, features, labels, moments = small_case()
        low = features.astype(jnp.bfloat16)
        config = BottleneckConfig(num_steps=60, num_samples=1)
        result = run_small(
            jax.random.key(0),
            head,
            low,
            labels,
            moments,
            config=config,
            pooled=pooled,
        )
        assert_finite(result)
        assert result.saliency.dtype == jnp.float32
        assert np.all(result.losses[-10:].mean(0) < 0.5 * result.losses[0])

    @pytest.mark.parametrize("alpha", [200.0, -200.0])
    def test_saturated_start_is_finite(self, pooled, alpha):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args, alpha=alpha, pooled=pooled)
        assert_finite(result)
        if alpha < 0:  # pure noise lets nothing through
            np.testing.assert_allclose(result.saliency, 0.0, atol=1e-5)

    def test_a_single_cell(self, pooled):
        head, *args = small_case(size=(1, 1))
        result = run_small(jax.random.key(0), head, *args, pooled=pooled)
        assert_finite(result)
        assert result.saliency.shape == (3, 1, 1)

    def test_a_single_step_reads_the_map_of_the_start(self, pooled):
        head, features, labels, moments = small_case()
        config = BottleneckConfig(num_steps=1, num_samples=1)
        result = run_small(
            jax.random.key(0),
            head,
            features,
            labels,
            moments,
            config=config,
            pooled=pooled,
        )
        for i in range(3):
            exact = reference.capacity(
                np.full(features.shape[1:], 5.0), features[i], *moments, sigma=1.0
            )
            np.testing.assert_allclose(result.capacity[i], exact, rtol=1e-5, atol=1e-5)
        # Adam's first step is the learning rate, wherever the gradient is not zero.
        moved = np.abs(np.asarray(result.alpha) - 5.0)[..., :-1]
        np.testing.assert_allclose(moved, 1.0, atol=1e-3)


class TestAttribute:
    @pytest.mark.slow  # some 60 operations compiled one by one
    def test_eager_equals_jit(self):
        head, *args = small_case()
        key = jax.random.key(0)
        eager = bottleneck.attribute(key, head, *args, config=SHORT)
        assert_close(eager, run_small(key, head, *args))

    def test_old_style_keys_are_taken(self):
        head, *args = small_case()
        key = jax.random.key(7)
        raw = jax.random.key_data(key)
        assert_close(run_small(key, head, *args), run_small(raw, head, *args), atol=0)

    def test_no_gradient_flows_out(self):
        head, features, labels, moments = small_case()

        @jax.jit
        def total(head, features, moments):
            result = bottleneck.attribute(
                jax.random.key(0),
                head,
                features,
                labels,
                moments,
                config=SHORT,
            )
            return sum(jnp.sum(leaf) for leaf in result)

        gradients = jax.grad(total, (0, 1, 2), allow_int=True)(head, features, moments)
        for leaf in jax.tree.leaves((gradients[0], gradients[1], gradients[2][:2])):
            np.testing.assert_array_equal(leaf, 0.0)

    def test_inactive_elements_carry_nothing(self):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args)
        np.testing.assert_array_equal(result.capacity[..., -1], 0.0)
        assert np.all(np.asarray(result.capacity[..., 0]) > 0)

    def test_saliency_is_the_channel_sum_in_bits(self):
        head, *args = small_case()
        result = run_small(jax.random.key(0), head, *args)
        expected = np.asarray(result.capacity, np.float64).sum(-1) / np.log(2)
        np.testing.assert_allclose(result.saliency, expected, rtol=1e-6)

    def test_maps_of_two_classes_differ_after_twenty_steps(self):
        head = PooledLinear(jnp.asarray(MODEL["fc_w"]), jnp.asarray(MODEL["fc_b"]))
        config = BottleneckConfig(num_steps=20, num_samples=1)
        map_c, map_p = (
            run_small(
                jax.random.key(0),
                head,
                jnp.asarray(MODEL["act_B"]),
                jnp.asarray(MODEL["classes"][:2, k]),
                golden_moments("B"),
                config=config,
            ).saliency
            for k in (0, 1)
        )
        for i in range(2):
            assert correlation(map_c[i], map_p[i]) < 0.9

    def test_defaults_of_the_reference(self):
        assert BottleneckConfig() == BottleneckConfig(
            beta=10.0,
            num_steps=10,
            num_samples=10,
            learning_rate=1.0,
            blur_sigma=1.0,
            initial_alpha=5.0,
            min_std=0.01,
            active_threshold=0.01,
            relu=False,
            noise_scale=1.0,
        )

    @pytest.mark.parametrize("wrong", ["noise", "moments", "labels", "features"])
    def test_wrong_shapes_are_refused(self, wrong):
        head, features, labels, moments = small_case()
        noise = None
        if wrong == "noise":
            noise = jnp.zeros((3, 3, *features.shape))  # one step short
        elif wrong == "moments":
            moments = moments._replace(mean=moments.mean[..., :-1])
        elif wrong == "labels":
            labels = labels[:2]
        else:
            features = features[0]
        with pytest.raises((AssertionError, ValueError)):
            bottleneck.attribute(
                jax.random.key(0),
                head,
                features,
                labels,
                moments,
                config=SHORT,
                noise=noise,
            )


class TestBottleneckConfig:
    @pytest.mark.parametrize(
        "option",
        [
            {"num_steps": 0},
            {"num_samples": 0},
            {"learning_rate": 0.0},
            {"min_std": 0.0},
            {"min_std": 1e-24},
            {"min_std": 1e18},
            {"min_std": float("nan")},
            {"beta": -1.0},
            {"blur_sigma": 0.0},
            {"blur_sigma": -1.0},
            {"noise_scale": 0.0},
        ],
    )
    def test_bad_values_are_named(self, option):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
            BottleneckConfig(**option)


class TestCapacity:
    def test_by_hand(self):
        # No signal (rest 1): the noise itself, 0 nats whatever r. Half noise at r = 2:
        # -1/2 (1 + log 1/4 - 1 - 1/4) = log 2 + 1/8.
        rest = jnp.array([1.0, 1.0, 0.5])
        r_squared = jnp.array([0.0, 9.0, 4.0])
        np.testing.assert_allclose(
            bottleneck.capacity(rest, r_squared), [0, 0, np.log(2) + 0.125], atol=1e-7
        )
        inactive = bottleneck.capacity(rest, r_squared, jnp.array([True, True, False]))
        np.testing.assert_allclose(inactive, 0.0, atol=1e-7)

    def test_never_negative(self):
        rest = jnp.linspace(1e-3, 1.0, 1000)[:, None]
        nats = bottleneck.capacity(rest, jnp.array([[0.0, 1e-6, 1.0]]))
        assert nats.min() > -2e-7

    def test_finite_value_and_gradient_at_any_alpha(self):
        blur = bottleneck.make_blur((3, 3), 1.0)

        def total(alpha):
            rest = bottleneck.noise_share(jnp.full((3, 3, 1), alpha), blur)
            return jnp.sum(bottleneck.capacity(rest, jnp.float32(4.0)))

        alphas = jnp.array([-1e4, -80.0, 0.0, 17.0, 80.0, 86.5, 90.0, 1e4])
        assert_finite(jax.jit(jax.vmap(jax.value_and_grad(total)))(alphas))


class TestMakeBlur:
    def test_golden(self):
        blur = bottleneck.make_blur((16, 16), 1.0)
        smooth = blur(jnp.asarray(IBA["smooth_in"]))
        peak = IBA["smooth_out"].max()
        np.testing.assert_allclose(smooth, IBA["smooth_out"], atol=3e-7 * peak)

    @pytest.mark.parametrize(
        ("size", "sigma"),
        [((1, 1), 1.0), ((1, 6), 0.1), ((2, 2), 2.0), ((3, 2), 1.0), ((7, 9), 0.7)],
    )
    def test_equals_a_window_slid_over_a_reflected_border(self, size, sigma):
        maps = np.random.default_rng(0).random((*size, 2), np.float32)
        smooth = bottleneck.make_blur(size, sigma)(maps)
        np.testing.assert_allclose(smooth, reference.blur(maps, sigma), atol=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 9)])
    def test_a_tpu_blurs_all_cells_at_once_with_the_same_result(self, size):
        maps = np.random.default_rng(0).random((*size, 3, 2), np.float32)
        ours = bottleneck.make_blur(size, 1.0)
        theirs = bottleneck.make_blur(size, 1.0, platform="tpu")
        np.testing.assert_allclose(theirs(maps), ours(maps), atol=1e-6)
        one, other = (jax.linear_transpose(blur, maps)(maps) for blur in (ours, theirs))
        np.testing.assert_allclose(other[0], one[0], atol=1e-6)
        # A product of that many cells would cost more than the head: two small ones.
        text = str(
            jax.make_jaxpr(bottleneck.make_blur((56, 56), 1.0, platform="tpu"))(
                jnp.ones((56, 56, 1, 1))
            )
        )
        assert text.count("dot_general") == 2

    def test_none_is_the_identity(self):
        maps = jnp.ones((2, 3, 4))
        assert bottleneck.make_blur((2, 3), None)(maps) is maps


class TestMakeAdam:
    def test_equals_float64(self):
        gradients = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
        tx = bottleneck.make_adam(0.5, 12)
        state = tx.init(jnp.zeros(4))
        update = jax.jit(tx.update)
        m = v = np.zeros(4)
        for t, g in enumerate(gradients.astype(np.float64), start=1):
            updates, state = update(jnp.asarray(g, jnp.float32), state)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            expected = -0.5 * m_hat / (np.sqrt(v_hat) + 1e-8)
            # optax.adam is off by 1.5e-5 of the value in the first steps.
            np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-6)

    def test_zero_gradient_moves_nothing(self):
        tx = bottleneck.make_adam(1.0, 2)
        updates, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
        np.testing.assert_array_equal(updates, 0.0)


def _assert_row(batch, i, other, j):
    """Image i of one attribution equals image j of another."""
    for name in ("capacity", "saliency", "alpha"):
        np.testing.assert_allclose(
            getattr(batch, name)[i], getattr(other, name)[j], rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(
        batch.losses[:, i], other.losses[:, j], rtol=1e-4, atol=1e-5
    )


def _clamped(moments):
    return moments._replace(std=np.maximum(moments.std, 0.01))


def _value_only(fn, has_aux):
    """jax.value_and_grad without the gradient, for a loss that is not a scalar's."""
    del has_aux
    return lambda *args: (fn(*args), jnp.zeros_like(args[0]))
