"""Several labels per image in a step: its loss, its gradient, its guidance."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from ibsgl_jax import guidance, metrics
from tests.training_step import (
    IMAGE_STATS,
    make_batch,
    make_model,
    make_state,
    make_step,
)
from train.measure import classes, precision, temperature
from train.measure.batch import measure
from train.method.state import create_state
from train.method.step import _make_mix, eval_step, normalize_images, train_step

POSITIVES = np.uint8([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])


class Linear(nn.Module):
    """Logits of the image's mean colour."""

    num_classes: int

    def setup(self):
        self.last = nn.Dense(self.num_classes)

    def features(self, images, train=False):
        del train
        return images

    def head(self, features, train=False):
        del train
        return self.last(jnp.mean(features, axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


def several(batch):
    """The batch with labels of its own: pairs, and none in its first image."""
    positives = np.eye(10, dtype=np.uint8)[batch["label"]]
    positives |= np.roll(positives, 3, axis=1)
    positives[0] = 0
    return {**batch, "positives": positives}


class TestLoss:
    @pytest.mark.parametrize("mixup", [0.0, 0.4])
    def test_gradient_is_that_by_hand(self, mixup):
        """dL/dW of mean cross-entropies: x (p - y) / (N C)."""
        model, tx = Linear(3), optax.sgd(0.5)
        batch = {**make_batch(4, 8), "positives": POSITIVES}
        batch["label"] = np.int32([2, 0, 1, 1])
        state = create_state(jax.random.key(0), model, tx, 8)
        key = jax.random.key(5)
        step = functools.partial(
            train_step, model=model, tx=tx, base_key=key, image_stats=IMAGE_STATS
        )
        after, sums = jax.jit(functools.partial(step, mixup=mixup))(state, batch)

        key = jax.random.fold_in(key, 0)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(4))
        mix = _make_mix(keys, mixup)
        x = mix(normalize_images(batch["image"], **IMAGE_STATS)).mean((1, 2))
        x, y = np.float64(x), np.float64(mix(jnp.float32(POSITIVES)))
        kernel, bias = (np.float64(state.params["last"][k]) for k in ("kernel", "bias"))
        p = 1 / (1 + np.exp(-(x @ kernel + bias)))
        gradient = (p - y) / p.size
        found = jax.tree.map(
            lambda old, new: (old - new) / 0.5,
            state.params["last"],
            after.params["last"],
        )
        np.testing.assert_allclose(
            found["kernel"], x.T @ gradient, rtol=1e-3, atol=1e-6
        )
        np.testing.assert_allclose(found["bias"], gradient.sum(0), rtol=1e-3, atol=1e-6)
        loss = -np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))
        np.testing.assert_allclose(float(sums["loss"][0]) / 4, loss, rtol=1e-5)

    def test_measures_of_all_labels(self):
        logits = jnp.array([[2.0, -1, 3], [-1, -2, -3], [1, -1, 1], [1, 1, -1]])
        np.testing.assert_array_equal(metrics.accuracy(logits, POSITIVES), [1, 1, 0, 0])
        np.testing.assert_allclose(
            metrics.label_accuracy(logits, POSITIVES), [1, 1, 2 / 3, 2 / 3]
        )
        found = metrics.nll(logits, POSITIVES, link="sigmoid")
        each = optax.sigmoid_binary_cross_entropy(logits, jnp.float32(POSITIVES))
        np.testing.assert_allclose(found, each.mean(1), rtol=1e-6)
        np.testing.assert_allclose(
            temperature.nll(logits, POSITIVES, 2.0),
            metrics.nll(logits / 2, POSITIVES, link="sigmoid"),
            rtol=1e-6,
        )
        with pytest.raises(ValueError, match="under a softmax.*link='sigmoid'"):
            metrics.nll(logits, POSITIVES)


class TestGuidance:
    def guided(self, **options):
        config = guidance.GuidanceConfig(step_size=0.3, link="sigmoid")
        return make_step(
            "guided", make_model(), config=config, teacher="hirescam", **options
        )

    def test_an_image_without_a_label_is_not_guided(self):
        model, batch = make_model(), several(make_batch(8))
        state = make_state(model)
        after, sums = jax.jit(self.guided())(state, batch)
        assert float(sums["kl"][1]) == 7
        plain, _ = jax.jit(make_step("plain", model))(state, batch)
        moved = optax.tree.sub(after.params, plain.params)
        assert float(optax.tree.norm(moved)) > 1e-4
        batch["positives"][:] = 0
        none, sums = jax.jit(self.guided())(state, batch)
        assert float(sums["kl"][1]) == 0
        plain, _ = jax.jit(make_step("plain", model))(state, batch)
        chex.assert_trees_all_close(none.params, plain.params, rtol=1e-5, atol=1e-7)

    def test_only_labels_that_are_found_are_guided(self):
        """The logit of the label shown is above 0; the bias decides."""
        model, batch = make_model(), several(make_batch(8))
        state = make_state(model)
        for bias, is_guided in ((-100.0, False), (100.0, True)):
            params = {**state.params, "fc": {**state.params["fc"]}}
            params["fc"]["bias"] = np.full(10, bias, np.float32)
            given = state.replace(params=params)
            _, sums = jax.jit(self.guided(only_right=True))(given, batch)
            more = float(sums["loss"][0] - sums["task_loss"][0])
            assert (more > 1e-4) is is_guided

    def test_no_suppression_without_a_runner_up(self):
        def head_fn(features):
            return jnp.mean(features, axis=(1, 2))

        features = jax.random.uniform(jax.random.key(0), (4, 2, 2, 3))
        for gate in ("always", "correct"):
            found = jax.jit(
                functools.partial(
                    guidance.guide,
                    config=guidance.GuidanceConfig(link="sigmoid", gate=gate),
                ),
                static_argnums=(0, 1),
            )(
                None,
                head_fn,
                features,
                jnp.int32([2, 0, 1, 1]),
                None,
                teacher=jnp.ones((4, 2, 2)),
                positives=jnp.asarray(POSITIVES),
            )
            np.testing.assert_array_equal(found.gate, [1, 1, 0, 1])


class TestMeasures:
    def test_what_needs_a_label_or_a_rival_is_not_defined_without(self):
        model, batch = make_model(), several(make_batch(4))
        batch["positives"][1] = 1
        step = functools.partial(
            measure, model=model, image_stats=IMAGE_STATS, matched_area=0.2
        )
        values = jax.jit(step)(make_state(model).variables, batch)
        for key in (
            "probability",
            "drop",
            "matched_increase",
            "iou",
            "mass_c",
            "blank",
        ):
            assert np.isnan(values[key]).tolist() == [True, False, False, False], key
        for key in ("overlap", "mass_p", "runner_up_probability"):
            assert np.isnan(values[key]).tolist() == [True, True, False, False], key
        for key in ("accuracy", "label_accuracy", "nll", "logits", "positives"):
            assert np.isfinite(values[key]).all(), key
        shown = np.take_along_axis(values["logits"], batch["label"][:, None], 1)[:, 0]
        np.testing.assert_allclose(
            values["probability"][1:], jax.nn.sigmoid(shown)[1:], rtol=1e-5
        )
        assert "confidence" not in values

    def test_boxes_of_images_without_a_label_do_not_count(self):
        model, batch = make_model(), several(make_batch(8))
        box = np.tile(np.float32([0.2, 0.2, 0.8, 0.8]), (8, 1))
        batch |= {"bbox": box, "example_mask": np.float32([1] * 6 + [0] * 2)}
        step = functools.partial(eval_step, model=model, image_stats=IMAGE_STATS)
        sums = jax.jit(step)(make_state(model).variables, batch)
        assert float(sums["box_share"][1]) <= 5
        assert float(sums["label_accuracy"][1]) == 6

    def test_average_precision_and_its_chance(self):
        logits = np.float32([[3, 0, 1], [2, 0, 2], [1, 0, 3], [0, 0, 4]])
        positives = np.uint8([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
        found = precision.average_precisions(logits, positives)
        np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, np.nan, 1.0])
        assert precision.mean_average_precision(logits, positives) == pytest.approx(
            (5 / 6 + 1) / 2
        )
        assert precision.chance(positives) == pytest.approx((0.5 + 0.25) / 2)
        rows = classes.class_rows(
            {"a/logits": logits, "a/positives": positives}, ["a"], 3
        )
        assert [row["class"] for row in rows] == [0, 2]
        assert rows[0] == {
            "class": 0,
            "n": 2,
            "frequency": 0.5,
            "average_precision": {"a": pytest.approx(5 / 6)},
            "found": {"a": 1.0},
        }
