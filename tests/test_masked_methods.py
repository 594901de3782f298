"""Rivals that read masks, and MaskTune: what they cost, by hand and on a tiny net."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from configs.baselines import energy as energy_config
from configs.baselines import masktune as masktune_config
from configs.baselines import rand_r4 as rand_r4_config
from configs.baselines import rrr as rrr_config
from tests import training_step
from train.data.dataset import FewMasks
from train.errors import ConfigError
from train.method import build, masks, masktune
from train.method.check import check_config
from train.method.state import create_state
from train.method.step import train_step

OPTIONS = {
    "rrr": {"weight": 1.0},
    "energy": {"weight": 1.0},
    "rand_r4": {"weight": 1.0, "epsilon": 0.5, "num_samples": 2},
}
TERMS = {
    "rrr": "gradient_outside",
    "energy": "saliency_outside",
    "rand_r4": "largest_outside",
}


class TinyNet(nn.Module):
    """One convolution of one pixel and a head that knows the place: all by hand."""

    def setup(self):
        self.conv = nn.Conv(8, (1, 1))
        self.dense = nn.Dense(10)

    def features(self, images, train=False):
        return nn.relu(self.conv(images))

    def head(self, features, train=False):
        return self.dense(features.reshape(len(features), -1))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


MODEL = TinyNet()


def make_batch(num=8, size=8):
    generator = np.random.default_rng(0)
    mask = np.zeros((num, size, size), np.uint8)
    mask[:, 2:6, 3:5] = 1
    return {
        "image": generator.integers(0, 256, (num, size, size, 3), np.uint8),
        "label": generator.integers(0, 10, num).astype(np.int32),
        "mask": mask,
    }


def make_step(kind, context=None, **changes):
    phase = ConfigDict(OPTIONS.get(kind, {}) | changes)
    return functools.partial(
        train_step,
        penalty_fn=build.METHODS[kind](MODEL, phase, context),
        model=MODEL,
        tx=optax.adam(3e-3),
        base_key=jax.random.key(7),
        image_stats={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
    )


@pytest.fixture(scope="module")
def state():
    return create_state(jax.random.key(0), MODEL, optax.adam(3e-3), 8)


class TestMasks:
    def test_an_example_without_a_mask_has_nothing_outside(self):
        mask = make_batch(2)["mask"]
        mask[1] = 0
        assert masks.known(mask).tolist() == [True, False]
        outside = np.asarray(masks.outside(mask))
        np.testing.assert_array_equal(outside[0], 1 - mask[0])
        assert not outside[1].any()

    def test_a_smaller_mask_is_where_the_larger_one_is(self):
        mask = np.zeros((2, 16, 16), np.uint8)
        mask[0, 4:8, 8:16], mask[1] = 1, 1
        small = np.asarray(masks.resized(mask, (4, 4)))
        assert small[0, 1, 2:].min() > 0.6 and small[0, 2:].max() < 0.2
        np.testing.assert_allclose(small[1], 1.0, atol=1e-6)


class TestFewMasks:
    @pytest.mark.parametrize("share, kept", [(0.1, 10), (0.01, 1), (0.0, 0), (0.5, 50)])
    def test_keeps_the_share_evenly(self, share, kept):
        batch = make_batch(100)
        source = [{k: v[i] for k, v in batch.items()} for i in range(100)]
        few = FewMasks(source, share)
        known = [bool(few[i]["mask"].any()) for i in range(len(few))]
        assert sum(known) == kept
        if share == 0.1:
            assert np.flatnonzero(known).tolist() == list(range(9, 100, 10))
        assert source[0]["mask"].any()  # the source stays whole
        np.testing.assert_array_equal(few[3]["image"], source[3]["image"])

    def test_fewer_are_among_more(self):
        batch = make_batch(200)
        source = [{k: v[i] for k, v in batch.items()} for i in range(200)]
        one, ten = (
            {i for i in range(200) if FewMasks(source, share)[i]["mask"].any()}
            for share in (0.01, 0.1)
        )
        assert one < ten


@pytest.mark.parametrize("kind", list(OPTIONS))
class TestPenalties:
    def test_falls_when_it_is_trained(self, state, kind):
        step, batch = jax.jit(make_step(kind, weight=30.0)), make_batch()
        after, values = state, []
        for _ in range(30):
            after, sums = step(after, batch)
            assert np.isfinite(float(sums["loss"][0]))
            values.append(float(sums[TERMS[kind]][0]))
        assert values[-1] < 0.6 * values[0]

    def test_without_masks_it_is_the_plain_step(self, state, kind):
        batch = make_batch()
        batch["mask"] = np.zeros_like(batch["mask"])
        plain, _ = jax.jit(make_step("plain"))(state, batch)
        other, sums = jax.jit(make_step(kind))(state, batch)
        assert float(sums[TERMS[kind]][0]) < 1e-4
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
            plain.params,
            other.params,
        )


def gradient_outside(variables, batch):
    """The gradient outside of the mask over that inside."""
    images = (batch["image"] / 255.0 - 0.5) / 0.25

    def log_prob(images):
        log_probs = jax.nn.log_softmax(MODEL.apply(variables, images))
        return jnp.take_along_axis(log_probs, batch["label"][:, None], axis=1).sum()

    gradient = np.abs(jax.grad(log_prob)(images)).sum(-1)
    inside = batch["mask"] > 0
    return gradient[~inside].mean() / gradient[inside].mean()


@pytest.mark.parametrize("kind, weight", [("rrr", 1.0), ("rand_r4", 10.0)])
def test_the_input_gradient_stays_inside_of_the_mask(state, kind, weight):
    batch, ratios = make_batch(), []
    for step in (make_step("plain"), make_step(kind, weight=weight)):
        step, after = jax.jit(step), state
        for _ in range(60):
            after, _ = step(after, batch)
        ratios.append(gradient_outside(after.variables, batch))
    assert ratios[1] < 0.85 * ratios[0]


@pytest.mark.parametrize("kind, weight", [("rrr", 0.1), ("rand_r4", 10.0)])
class TestBatchNorm:
    """The gradient is that of the network that learns, with its batch's statistics."""

    def steps(self, kind, weight, **options):
        model = training_step.make_model(**options)
        phase = ConfigDict(OPTIONS[kind] | {"weight": weight})
        if kind == "rand_r4":
            phase.num_samples = 1
        return model, training_step.make_step(
            "plain",
            model,
            axis_name=options.get("axis_name"),
            penalty_fn=build.METHODS[kind](model, phase, None),
        )

    def test_running_statistics_have_no_part_in_it(self, kind, weight):
        """With them, they could flatten what no training step sees."""
        model, step = self.steps(kind, weight)
        state, batch = training_step.make_state(model), training_step.make_batch()
        values = []
        for factor in (np.float32(1.0), np.float32(100.0)):
            stats = jax.tree.map(lambda x, f=factor: f * x, state.batch_stats)
            _, sums = jax.jit(step)(state.replace(batch_stats=stats), batch)
            values.append(float(sums[TERMS[kind]][0]))
        assert values[0] == values[1] > 0

    def test_does_not_depend_on_the_devices(self, kind, weight):
        model, step = self.steps(kind, weight, axis_name=training_step.AXIS)
        batch, outcome = training_step.make_batch(), []
        for num in (1, 8):
            run = training_step.pmap_step(step, num)
            state = training_step.make_state(model)
            for _ in range(2):
                state, sums = run(state, training_step.shard(batch, num))
            outcome.append(jax.device_get((state.params, sums)))
        chex.assert_trees_all_close(*outcome, rtol=1e-3, atol=5e-5)


class Context:
    phases = ("plain", "masktune")


class TestMaskTune:
    def test_hides_what_is_far_above_the_mean(self):
        maps = np.ones((2, 10, 10), np.float32)
        maps[0, 3, 4] = 50.0
        maps[1] = 0.0
        hidden = np.asarray(masktune.most_salient(maps))
        assert np.argwhere(hidden).tolist() == [[0, 3, 4]]

    def test_its_loss_is_that_of_the_masked_images(self, state):
        step = jax.jit(make_step("masktune", Context, teacher="plain"))
        _, sums = step(state, make_batch(), state.variables)
        np.testing.assert_allclose(
            sums["loss"][0], sums["masked_task_loss"][0], rtol=1e-5
        )
        assert abs(float(sums["loss"][0] - sums["task_loss"][0])) > 1e-3
        assert 0 < float(sums["hidden"][0]) / 8 < 0.2

    @pytest.mark.parametrize(
        "options",
        [dict(label_smoothing=0.2), dict(mixup=0.4), dict(class_weights=True)],
    )
    def test_the_task_is_the_steps_own(self, state, options):
        """Else the whole images would be unlearnt: their loss would count below 0."""
        if "class_weights" in options:
            options = dict(class_weights=np.linspace(0.1, 3.0, 10))
        step = functools.partial(
            make_step("masktune", Context, teacher="plain"), **options
        )
        batch = make_batch()
        _, sums = jax.jit(step)(state, batch, state.variables)
        np.testing.assert_allclose(
            sums["loss"][0], sums["masked_task_loss"][0], rtol=1e-5
        )
        if "class_weights" in options:
            _, plain = jax.jit(make_step("masktune", Context, teacher="plain"))(
                state, batch, state.variables
            )
            assert abs(float(sums["loss"][0] - plain["loss"][0])) > 0.1

    def test_names_a_teacher_that_is_no_phase(self):
        with pytest.raises(ValueError, match="teacher='mask': name the phase"):
            make_step("masktune", Context, teacher="mask")


class TestConfigs:
    @pytest.mark.parametrize(
        "module", [rrr_config, energy_config, rand_r4_config, masktune_config]
    )
    def test_can_be_trained(self, module):
        config = module.get_config()
        check_config(config)
        name = config.phases[-1]
        assert config[name].init == "plain"
        assert config[name].num_epochs == config.control.num_epochs

    @pytest.mark.parametrize(
        "fields, expected",
        [
            (dict(method="plain"), []),
            (dict(method="guided", teacher="hirescam", mask_first=False), []),
            (dict(method="guided", teacher="mask"), ["teacher"]),
            (dict(method="guided", mask_first=True), ["mask_first"]),
            (dict(method="rrr"), ["method"]),
        ],
    )
    def test_who_reads_masks(self, fields, expected):
        """Such phases are refused without masks, and a TPU's compiler is given some."""
        assert build.mask_readers(ConfigDict(fields)) == expected

    @pytest.mark.parametrize(
        "field, value", [("mask_share", 1.5), ("weight", -1.0), ("mask_share", -0.1)]
    )
    def test_impossible_values_are_named(self, field, value):
        config = rrr_config.get_config()
        config.rrr[field] = value
        with pytest.raises(ConfigError, match=f"rrr.{field}={value}"):
            check_config(config)
