"""The bottleneck against the reference arrays: ten steps, and where they saturate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibsgl_jax import bottleneck, saliency
from ibsgl_jax.bottleneck import BottleneckConfig
from tests import golden_net, reference
from tests.bottleneck_case import (
    IBA,
    MODEL,
    SOFTMAX,
    assert_finite,
    cells_first,
    golden_moments,
    loop_arguments,
)

CONFIGS = {
    "relu0_sig1": BottleneckConfig(),
    "relu1_sig1": BottleneckConfig(relu=True),
    "relu0_signone": BottleneckConfig(blur_sigma=None),
    "relu0_sig1_beta1": BottleneckConfig(beta=1.0),
}
GOLDEN_RUNS = [(tap, name) for tap in "AB" for name in CONFIGS]


def golden_noise():
    eps = golden_net.load("eps")
    noise = eps["eps_q"].astype(np.float32) * eps["scale"]
    return np.moveaxis(noise, 0, 2)  # [step, sample, image, H, W, K]


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


def cells_last(maps):
    return jnp.moveaxis(maps, 2, 0)


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
        _, gradient = value_and_grad(alpha, jnp.moveaxis(noise, 1, 0))
        updates, opt_state = update(gradient, opt_state)
        alpha = optax.apply_updates(alpha, updates)
        alphas.append(alpha)
        gradients.append(gradient)
    return np.stack(alphas)[:, :, :, 0], np.stack(gradients)[:, :, :, 0]


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
