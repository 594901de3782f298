"""BatchNorm behind the features and dropout before: the mode of what learns."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from ml_collections import ConfigDict

from ibsgl_jax import guidance, models
from ibsgl_jax.models import own
from tests import training_step
from train.method import build
from train.method.guided import _direct as direct
from train.method.state import create_state
from train.method.step import eval_step, train_step

PHASES = {
    "energy": dict(weight=1.0),
    "icasc": dict(weight=1.0, omega=10.0, threshold=0.5),
    "rrr": dict(weight=0.1),
}
TERMS = {
    "energy": "saliency_outside",
    "icasc": "attention_separation",
    "rrr": "gradient_outside",
    "guided": "saliency_loss",
}


class Own(nn.Module):
    """A class as a user writes it: ``keys`` for the head alone, BatchNorm in it."""

    num_classes: int = 10

    def setup(self):
        self.conv = nn.Conv(8, (3, 3), strides=4)
        self.norm = nn.BatchNorm(momentum=0.5)
        self.last = nn.Dense(self.num_classes)

    def features(self, images, train=False):
        return nn.relu(self.conv(images))

    def head(self, features, train=False, keys=None):
        x = self.norm(features, use_running_average=not train)
        return self.last(jnp.mean(nn.relu(x), axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


class Dropping(Own):
    """Dropout in the features."""

    def setup(self):
        super().setup()
        self.drop = nn.Dropout(0.5)

    def features(self, images, train=False):
        x = super().features(images, train)
        return self.drop(jnp.exp(x), deterministic=not train)


class DroppingNNX(nnx.Module):
    """The same of NNX."""

    def __init__(self, num_classes, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, num_classes, rngs=rngs)

    def features(self, images):
        return self.drop(jnp.exp(self.conv(images)))

    def head(self, features):
        return self.last(jnp.mean(features, axis=(1, 2)))

    def __call__(self, images):
        return self.head(self.features(images))


def make_tapped():
    options = dict(stage_sizes=(1, 1), stage_strides=(1, 2), zero_init=False)
    return models.create(
        "small_resnet", num_classes=10, tap="layer1_0", image_size=32, **options
    )


MODELS = {"own": Own, "tapped": make_tapped}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@functools.cache
def make_state(model):
    return create_state(jax.random.key(0), model, optax.sgd(0.1, momentum=0.9), 32)


def make_step(model, **options):
    return functools.partial(
        train_step,
        model=model,
        tx=optax.sgd(0.1, momentum=0.9),
        base_key=jax.random.key(7),
        image_stats=training_step.IMAGE_STATS,
        **options,
    )


def scaled(state, factor):
    return state.replace(
        batch_stats=jax.tree.map(lambda x: np.float32(factor) * x, state.batch_stats)
    )


@pytest.mark.parametrize("kind", list(PHASES))
def test_running_statistics_have_no_part_in_a_penalty(model, kind):
    """With them, the network that is measured could meet it, and the one that learns
    go its own way."""
    penalty_fn = build.METHODS[kind](model, ConfigDict(PHASES[kind]), None)
    step = jax.jit(make_step(model, penalty_fn=penalty_fn))
    state, batch = make_state(model), training_step.make_batch()
    values = [
        float(step(scaled(state, factor), batch)[1][TERMS[kind]][0])
        for factor in (1.0, 100.0)
    ]
    assert values[0] == values[1] > 0


def test_nor_in_the_saliency_loss_that_is_descended_itself(model):
    """Route "direct"; what the network as it is measured gives is made up here."""

    def penalty_fn(forward):
        labels = forward.labels
        height, width = forward.features.shape[1:3]
        teacher = jnp.broadcast_to(jnp.arange(1.0 * width), (16, height, width))
        guided = types.SimpleNamespace(
            runner_up=(labels + 1) % 10, teacher=teacher, gate=jnp.ones(16)
        )
        penalty = direct(forward, guided, guidance.GuidanceConfig())
        return penalty, forward.feature_stats, {}

    step = jax.jit(make_step(model, penalty_fn=penalty_fn))
    state, batch = make_state(model), training_step.make_batch()
    one, other = (step(scaled(state, factor), batch) for factor in (1.0, 100.0))
    np.testing.assert_array_equal(one[1]["loss"], other[1]["loss"])
    assert float(one[1]["loss"][0]) != float(one[1]["task_loss"][0])
    chex.assert_trees_all_equal(one[0].params, other[0].params)


def test_the_heads_statistics_are_learnt(model):
    state, batch = make_state(model), training_step.make_batch()
    after, _ = jax.jit(make_step(model))(state, batch)
    before, now = jax.tree.leaves(state.batch_stats), jax.tree.leaves(after.batch_stats)
    assert all(np.any(a != b) for a, b in zip(before, now, strict=True))
    if isinstance(model, Own):
        images = (batch["image"] / 255.0 - 0.5) / 0.25
        features = model.apply(state.variables, images, method="features")
        np.testing.assert_allclose(
            after.batch_stats["norm"]["mean"],
            0.5 * np.mean(features, axis=(0, 1, 2)),
            rtol=1e-4,
            atol=1e-6,
        )


def test_a_head_that_learns_alone_learns_what_is_measured(model):
    config = types.SimpleNamespace(image_size=32)
    learning = build.learning_layers(config, ConfigDict({"layers": "head"}), model)
    state, batch = scaled(make_state(model), 3.0), training_step.make_batch()
    after, sums = jax.jit(make_step(model, learning=learning))(state, batch)
    for old, new in zip(
        jax.tree.leaves(state.batch_stats),
        jax.tree.leaves(after.batch_stats),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    measured = eval_step(
        state.variables,
        batch | {"example_mask": np.ones(16, np.float32)},
        model=model,
        image_stats=training_step.IMAGE_STATS,
    )
    np.testing.assert_allclose(sums["task_loss"], measured["nll"], rtol=1e-5)
    moved = [
        name
        for name in after.params
        if not all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(state.params[name]),
                jax.tree.leaves(after.params[name]),
                strict=True,
            )
        )
    ]
    assert set(moved) == set(learning)


@pytest.mark.parametrize(
    "model",
    [Dropping(), own.adapt(DroppingNNX, num_classes=10)],
    ids=["linen", "nnx"],
)
def test_dropout_in_the_features_is_drawn_anew(model):
    own.check(model, 32)

    def penalty_fn(forward):
        dropped = jnp.ravel(forward.features == 0)
        place = jnp.arange(len(dropped)) % 1009  # a number that tells them apart
        sums = {"dropped": (jnp.sum(jnp.where(dropped, place, 0)), jnp.float32(1.0))}
        return 0.0 * forward.task_fn(forward.logits), forward.feature_stats, sums

    step = jax.jit(make_step(model, penalty_fn=penalty_fn))
    state, batch = make_state(model), training_step.make_batch()
    first, again, later = (
        int(step(state.replace(step=jnp.int32(at)), batch)[1]["dropped"][0])
        for at in (0, 0, 5)
    )
    assert 0 < first == again != later


def test_a_model_with_dropout_may_be_tapped_before_it():
    model = models.create("vgg16", num_classes=10, tap="conv4_1", image_size=32)
    own.check(model, 32)  # in training mode too
