"""What is explained: classes, several of them, labels under a sigmoid, any scalar."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibsgl_jax import (
    attribution,
    bottleneck,
    feature_stats,
    guidance,
    metrics,
    saliency,
    targets,
    tokens,
)
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import PooledLinear


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


KERNELS = draw(0, 3, 5), draw(1, 5, 4)
IMAGES = draw(2, 3, 8, 8, 3)
KEY = jax.random.key(3)
CONFIG = BottleneckConfig(num_steps=3, num_samples=2)


def features_fn(images):
    return jax.nn.relu(images[:, ::2, ::2] @ KERNELS[0])


def head_fn(features):
    return jnp.tanh(features.mean((1, 2))) @ KERNELS[1]


FEATURES = features_fn(IMAGES)
MOMENTS = feature_stats.moments(
    feature_stats.update(feature_stats.init(FEATURES.shape[1:]), FEATURES)
)
OPTIONS = {
    "integrated_gradients": {"num_steps": 2},
    "smooth_grad": {"num_samples": 2},
    "ib": {"config": CONFIG},
}
CLASSES = jnp.array([[0, 2], [1, 1], [3, 0]])


def tapped_fn(images, perturbations):
    biases = jnp.zeros((len(images), 4, 4, 5))
    features = features_fn(images) + (0 if perturbations is None else perturbations[0])
    return head_fn(features), [biases]


def run(method, head=head_fn, classes=None, **options):
    given = {"key": KEY, "moments": MOMENTS, "tapped_fn": tapped_fn}
    given |= OPTIONS.get(method, {}) | options
    return attribution.attribute(
        method, features_fn, head, IMAGES, classes, chunk_size=2, **given
    )


class TestSeveralClasses:
    @pytest.mark.parametrize(
        "method", ["ib", "hirescam", "integrated_gradients", "full_grad", "random"]
    )
    def test_each_is_its_own_call(self, method):
        both = run(method, classes=CLASSES)
        assert both.shape == (3, 2, 8, 8)
        for i in range(2):
            one = run(method, classes=CLASSES[:, i])
            np.testing.assert_allclose(both[:, i], one, rtol=1e-4, atol=1e-5)

    def test_out_of_range(self):
        with pytest.raises(ValueError, match="class 4 is out of range"):
            run("hirescam", classes=CLASSES.at[2, 1].set(4))
        with pytest.raises(ValueError, match="one class per image, or"):
            run("hirescam", classes=CLASSES[:, :, None])


def logit_of_two(logits):
    return logits[:, 2]


def contrast(logits, pair):
    first, second = (
        jnp.take_along_axis(logits, pair[:, i, None], axis=1)[:, 0] for i in (0, 1)
    )
    return first - second


class TestTarget:
    METHODS = ("hirescam", "layer_cam", "gradient", "integrated_gradients", "full_grad")

    @pytest.mark.parametrize("method", METHODS)
    def test_a_logit_is_its_class(self, method):
        found = run(method, target=logit_of_two)
        expected = run(method, classes=jnp.full(3, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_a_contrast_of_classes_of_each_image(self):
        """The gradient of a difference is the difference of the gradients."""
        found = run("gradient", classes=CLASSES, target=contrast, channels="sum")
        maps = run("gradient", classes=CLASSES, channels="sum")
        np.testing.assert_allclose(found, maps[:, 0] - maps[:, 1], atol=1e-5)
        found = run("hirescam", classes=CLASSES, target=contrast, rectify=False)
        maps = run("hirescam", classes=CLASSES, rectify=False)
        np.testing.assert_allclose(found, maps[:, 0] - maps[:, 1], atol=1e-5)

    def test_integrated_gradients_add_up_to_any_number(self):
        """A similarity to an embedding of each image; no logits at all."""
        embeddings = draw(4, 3, 5)

        def similarity(output, embedding):
            found = output["embedding"]
            norms = jnp.linalg.norm(found, axis=1) * jnp.linalg.norm(embedding, axis=1)
            return jnp.sum(found * embedding, axis=1) / norms

        def head(features):
            return {"embedding": 1.0 + features.mean((1, 2))}

        maps = run(
            "integrated_gradients",
            head,
            embeddings,
            target=similarity,
            channels="sum",
            num_steps=40,
        )
        change = similarity(head(FEATURES), embeddings) - similarity(
            head(0 * FEATURES), embeddings
        )
        np.testing.assert_allclose(maps.sum((1, 2)), change, atol=2e-3)

    def test_a_sum_over_a_mask_of_a_segmentation(self):
        mask = jnp.zeros((3, 4, 4)).at[:, 1:3, 2].set(1.0)
        maps = run(
            "gradient",
            lambda features: features[..., 0],
            mask,
            target=lambda scores, mask: jnp.sum(scores * mask, axis=(1, 2)),
        )
        outside = jnp.kron(mask, jnp.ones((1, 2, 2))) == 0
        assert float(jnp.max(jnp.where(outside, maps, 0.0))) == 0 < float(maps.max())

    def test_tokens_keep_their_grid(self):
        def as_tokens(images):
            return features_fn(images).reshape(len(images), 16, 5)

        on_grid = tokens.on_grid(
            lambda x: {"logits": head_fn(x.reshape(-1, 2, 8, 5))}, grid=(2, 8)
        )
        maps = attribution.attribute(
            "hirescam", as_tokens, on_grid, IMAGES, target=logit_of_two, output="logits"
        )
        flat = saliency.class_saliency(
            lambda x: head_fn(x), FEATURES.reshape(3, 2, 8, 5), jnp.full(3, 2)
        )
        np.testing.assert_allclose(
            maps, saliency.upsample(flat, (8, 8)), rtol=1e-4, atol=1e-6
        )

    @pytest.mark.parametrize(
        ("method", "options", "words"),
        [
            ("hirescam", {"target": lambda x: x}, r"target gives shape \(2, 4\)"),
            ("gradient", {"target": lambda x: x.sum()}, r"target gives shape \(\)"),
            ("gradient", {"target": lambda x: 3.0}, "target gives no array"),
            ("ib", {"target": logit_of_two}, "takes no target: give loss="),
            (
                "hirescam",
                {"output": "logits"},
                "'logits': the head returns an array",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, method, options, words):
        with pytest.raises(ValueError, match=words) as info:
            run(method, **options)
        assert "\n" not in str(info.value)


class TestOutput:
    @pytest.mark.parametrize(
        ("head", "output"),
        [
            (lambda f: (f, head_fn(f)), 1),
            (lambda f: {"logits": head_fn(f), "features": f}, "logits"),
            (lambda f: {"a": [head_fn(f)]}, lambda found: found["a"][0]),
        ],
    )
    def test_every_kind(self, head, output):
        for method in ("ib", "grad_cam", "gradient"):
            if method == "ib":
                found = run(method, targets.pick(head, output))
            else:
                found = run(method, head, output=output)
            np.testing.assert_allclose(found, run(method), rtol=1e-5, atol=1e-6)
        logits = attribution.predict(features_fn, head, IMAGES, output=output)
        np.testing.assert_allclose(logits, head_fn(FEATURES), rtol=1e-5)

    def test_what_is_not_there(self):
        with pytest.raises(
            ValueError, match=r"output=2: the head returns a tuple of 2"
        ):
            attribution.predict(
                features_fn, lambda f: (f, head_fn(f)), IMAGES, output=2
            )


def binary_cross_entropy(logits, labels):
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return optax.sigmoid_binary_cross_entropy(chosen, jnp.ones_like(chosen))


class TestSigmoid:
    LABELS = jnp.array([0, 1, 3])
    POSITIVES = jnp.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]])

    @pytest.mark.parametrize("pooled", [False, True])
    def test_bottleneck_by_its_name_and_by_hand(self, pooled):
        head = PooledLinear(draw(5, 5, 4), draw(6, 4)) if pooled else head_fn
        found = [
            jax.jit(functools.partial(bottleneck.attribute, config=CONFIG, loss=loss))(
                KEY, head, FEATURES, self.LABELS, MOMENTS
            )
            if pooled
            else jax.jit(
                lambda x, loss=loss: bottleneck.attribute(
                    KEY, head, x, self.LABELS, MOMENTS, config=CONFIG, loss=loss
                )
            )(FEATURES)
            for loss in ("sigmoid", binary_cross_entropy, "softmax")
        ]
        np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-4)
        np.testing.assert_allclose(found[0].saliency, found[1].saliency, atol=1e-4)
        assert float(jnp.abs(found[0].losses - found[2].losses).min()) > 1e-3

    def test_one_logit_has_a_bottleneck(self):
        head = lambda features: head_fn(features)[:, :1]  # noqa: E731
        maps = run("ib", head, loss="sigmoid")
        assert maps.shape == (3, 8, 8) and float(maps.max()) > 0
        # As the second of two classes whose softmax is the sigmoid.
        two = run("ib", targets.two_classes(head), jnp.ones(3, jnp.int32))
        np.testing.assert_allclose(maps, two, rtol=1e-3, atol=1e-4)

    def test_probability_and_nll(self):
        logits = jnp.array([[0.0, 3.0, -2.0], [1.0, 50.0, -50.0]])
        found = metrics.probability(logits, jnp.array([1, 2]), link="sigmoid")
        np.testing.assert_allclose(found, jax.nn.sigmoid(jnp.array([3.0, -50.0])))
        nll = metrics.nll(logits, jnp.array([1, 2]), link="sigmoid")
        np.testing.assert_allclose(nll, [np.log1p(np.exp(-3.0)), 50.0], rtol=1e-5)
        with pytest.raises(ValueError, match="link='probit': choose one of"):
            metrics.probability(logits, jnp.array([1, 2]), link="probit")

    def test_runner_up_is_none_of_the_labels(self):
        logits = jnp.array(
            [[9.0, 1.0, 8.0, 2.0], [5.0, 4.0, 3.0, -1.0], [1, 2, 3, 9.0]]
        )
        found = saliency.runner_up(logits, self.POSITIVES)
        np.testing.assert_array_equal(found, [3, 3, 2])
        np.testing.assert_array_equal(
            saliency.runner_up(logits[:1], jnp.ones((1, 4))), [0]
        )

    @pytest.mark.slow
    def test_guidance_of_one_label(self):
        config = guidance.GuidanceConfig(bottleneck=CONFIG, link="sigmoid")

        @jax.jit
        def guide(features):
            return guidance.guide(
                KEY,
                head_fn,
                features,
                self.LABELS,
                MOMENTS,
                config=config,
                positives=self.POSITIVES,
            )

        found, logits = guide(FEATURES), head_fn(FEATURES)
        chosen = jnp.take_along_axis(logits, self.LABELS[:, None], axis=1)[:, 0]
        np.testing.assert_array_equal(found.gate, (chosen > 0).astype(jnp.float32))
        rivals = jnp.take_along_axis(self.POSITIVES, found.runner_up[:, None], axis=1)
        assert not rivals.any()
        expected = bottleneck.attribute(
            KEY, head_fn, FEATURES, self.LABELS, MOMENTS, config=CONFIG, loss="sigmoid"
        )
        np.testing.assert_allclose(found.teacher, expected.saliency, atol=1e-4)
        assert float((found.target_loss - found.loss).max()) <= 1e-6

    def test_labels_of_a_sigmoid_under_a_softmax(self):
        with pytest.raises(ValueError, match="under a softmax.*link='sigmoid'") as info:
            guidance.guide(
                KEY, head_fn, FEATURES, self.LABELS, MOMENTS, positives=self.POSITIVES
            )
        assert "\n" not in str(info.value)


class TestLoss:
    def test_what_the_features_are_to_keep(self):
        """Any output, any loss: here a regression, with each image's own value."""
        values = jnp.array([0.5, -1.0, 2.0])

        def square(output, value):
            return jnp.square(output["value"][:, 0] - value)

        head = lambda features: {"value": head_fn(features)}  # noqa: E731
        found = run("ib", head, values, loss=square)
        assert found.shape == (3, 8, 8) and bool(jnp.isfinite(found).all())

        @jax.jit
        def direct(features):
            return bottleneck.attribute(
                KEY, head, features, values, MOMENTS, config=CONFIG, loss=square
            )

        losses = direct(FEATURES).losses
        # At the start next to nothing is noise: what the features cost, in nats, and
        # the loss of the clean output.
        clean = jnp.square(head_fn(FEATURES)[:, 0] - values)
        shares = jnp.full((4, 4, 3, 5), jax.nn.sigmoid(-CONFIG.initial_alpha))
        r_squared = jnp.square(
            (FEATURES - MOMENTS.mean[None])
            / jnp.maximum(MOMENTS.std, CONFIG.min_std)[None]
        )
        nats = bottleneck.capacity(
            jnp.moveaxis(shares, 2, 0), r_squared, MOMENTS.active[None]
        )
        expected = clean + CONFIG.beta * jnp.mean(nats, axis=(1, 2, 3))
        assert losses.shape == (3, 3)
        np.testing.assert_allclose(losses[0], expected, rtol=0.01)

    @pytest.mark.parametrize(
        ("loss", "words"),
        [
            ("hinge", "link='hinge': choose one of"),
            (lambda logits, labels: logits, r"loss gives \(3, 4\): give one number"),
        ],
    )
    def test_bad_input_is_one_line(self, loss, words):
        with pytest.raises(ValueError, match=words):
            bottleneck.attribute(
                KEY, head_fn, FEATURES, CLASSES[:, 0], MOMENTS, loss=loss
            )
