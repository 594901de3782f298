"""The training step: the same on any number of devices; its options; what learns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training_step import (
    AXIS,
    IMAGE_STATS,
    make_batch,
    make_model,
    make_state,
    make_step,
    pmap_step,
    shard,
)
from train.method.step import _make_mix, eval_step


@pytest.fixture(scope="module", params=["plain", "guided"])
def runs(request):
    """Three steps on one device and on eight, with the traces counted."""
    model = make_model(axis_name=AXIS)
    outcome = {}
    for num_devices in (1, 8):
        chex.clear_trace_counter()
        bound = make_step(request.param, model, axis_name=AXIS)

        @chex.assert_max_traces(n=1)
        def step(state, batch, bound=bound):
            return bound(state, batch)

        # The loop's contract: later steps take the state as pmap returned it.
        run = pmap_step(step, num_devices)
        batch = shard(make_batch(), num_devices)
        place = jax.pmap(
            lambda state, _: state,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=jax.devices()[:num_devices],
        )
        state = place(make_state(model), np.zeros(num_devices))
        history = []
        for _ in range(3):
            given = state
            state, sums = run(state, batch)
            history.append(jax.device_get(sums))
        outcome[num_devices] = state, history, given
    return outcome


class TestDevices:
    def test_loss_and_parameters_do_not_depend_on_them(self, runs):
        one, eight = runs[1], runs[8]
        # Sums in another order differ by some 1e-7, which three steps of learning rate
        # 0.1 and the divisions by norms amplify.
        for first, other in zip(one[1], eight[1], strict=True):
            chex.assert_trees_all_close(first, other, rtol=2e-4, atol=2e-5)
        chex.assert_trees_all_close(
            jax.device_get(one[0].params),
            jax.device_get(eight[0].params),
            rtol=1e-3,
            atol=2e-5,
        )
        chex.assert_trees_all_close(
            jax.device_get((one[0].batch_stats, one[0].feature_stats)),
            jax.device_get((eight[0].batch_stats, eight[0].feature_stats)),
            rtol=1e-3,
            atol=1e-4,
        )

    def test_every_device_holds_the_same_state(self, runs):
        # out_axes=None would hide a forgotten average: compare what each one holds.
        state = runs[8][0]
        for leaf in jax.tree.leaves(state):
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(copies) == 8
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0])

    def test_counts_are_of_the_global_batch(self, runs):
        for _, history, _ in runs.values():
            assert float(history[0]["loss"][1]) == 16
            assert float(history[0]["gradient_norm"][1]) == 1

    def test_state_is_donated(self, runs):
        given = runs[8][2]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))


class TestOptions:
    def test_accumulation_is_the_mean_over_parts(self):
        """Without BatchNorm in between: the parts' mean gradient is the batch's."""
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
        after, sums = jax.jit(make_step("plain", model, accumulate_steps=2))(
            state, batch
        )
        plain = jax.jit(make_step("plain", model))
        first, one = plain(state, halves[0])
        # The second part sees the same parameters, and the first one's statistics.
        second, two = plain(state.replace(batch_stats=first.batch_stats), halves[1])
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first.params, second.params)
        chex.assert_trees_all_close(after.params, mean, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(after.batch_stats, second.batch_stats, rtol=1e-4)
        np.testing.assert_allclose(
            float(sums["loss"][0]), float(one["loss"][0] + two["loss"][0]), rtol=1e-5
        )
        assert float(sums["loss"][1]) == 8

    def test_guided_accumulation_updates_statistics_part_by_part(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        step = make_step("guided", model, accumulate_steps=2, teacher="mask")
        after, sums = jax.jit(step)(state, batch)
        # decay 0.9 a part: 4 examples, then 0.9 * 4 + 4.
        np.testing.assert_allclose(float(after.feature_stats.count), 7.6, rtol=1e-6)
        assert float(sums["kl"][1]) == 8

    def test_average_of_the_parameters(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model).replace(step=np.int32(89))
        state = state.replace(ema_params=jax.tree.map(np.copy, state.params))
        step = make_step("plain", model, ema_decay=0.75)
        after, _ = jax.jit(step)(state, batch)
        expected = jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * new, state.params, after.params
        )
        chex.assert_trees_all_close(after.ema_params, expected, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_equal(after.variables["params"], after.ema_params)

    def test_nonfinite_step_is_skipped_and_counted(self):
        model, batch = make_model(), make_batch(8)
        step = jax.jit(make_step("plain", model, skip_nonfinite=True))
        state = make_state(model)
        good, sums = step(state, batch)
        assert float(sums["skipped"][0]) == 0 and float(sums["loss"][1]) == 8
        assert float(optax.tree.norm(optax.tree.sub(good.params, state.params))) > 0
        kernel = np.full_like(state.params["fc"]["kernel"], np.inf)
        params = {**state.params, "fc": {**state.params["fc"], "kernel": kernel}}
        broken = state.replace(params=params)
        after, sums = step(broken, batch)
        assert float(sums["skipped"][0]) == 1 and float(sums["loss"][1]) == 0
        assert int(after.step) == 1
        chex.assert_trees_all_equal(
            jax.device_get(after), broken.replace(step=np.int32(1))
        )

    def test_mixup_mixes_images_and_targets_alike(self):
        keys = jax.random.split(jax.random.key(0), 6)
        mix = _make_mix(keys, 0.4)
        eye = mix(jnp.eye(6))
        share = jnp.diag(eye)
        assert np.all(share >= 0.5) and np.ptp(share) > 0.01
        np.testing.assert_allclose(jnp.sum(eye, axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(
            jnp.diag(jnp.roll(eye, 1, axis=1)), 1.0 - share, rtol=1e-4
        )
        images = jax.random.normal(keys[0], (6, 2, 2, 3))
        np.testing.assert_allclose(
            mix(images), jnp.einsum("ij,jhwc->ihwc", eye, images), rtol=1e-3, atol=1e-5
        )

    def test_mixup_changes_the_step_and_is_off_by_default(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        _, off = jax.jit(make_step("plain", model))(state, batch)
        _, zero = jax.jit(make_step("plain", model, mixup=0.0))(state, batch)
        _, mixed = jax.jit(make_step("plain", model, mixup=0.4))(state, batch)
        assert float(off["loss"][0]) == float(zero["loss"][0])
        assert abs(float(off["loss"][0]) - float(mixed["loss"][0])) > 1e-3


class TestEvalStep:
    def test_padding_does_not_count(self):
        model = make_model()
        state = make_state(model)
        batch = make_batch(8)
        box = np.tile(np.float32([0.2, 0.2, 0.8, 0.8]), (8, 1))
        batch |= {"bbox": box, "example_mask": np.ones(8, np.float32)}
        step = jax.jit(
            functools.partial(eval_step, model=model, image_stats=IMAGE_STATS)
        )
        short = {name: value[:5] for name, value in batch.items()}
        padded = {name: value.copy() for name, value in batch.items()}
        padded["example_mask"][5:] = 0
        padded["image"][5:] = 0
        chex.assert_trees_all_close(
            step(state.variables, short), step(state.variables, padded), rtol=1e-5
        )


class TestWhatLearns:
    def test_class_weights_weigh_the_task(self):
        """A class of weight 2 counts as its examples twice: the same mean gradient."""
        model = make_model()
        state = make_state(model)
        # Seven examples and one of class 3; the fc layer alone, whose features do not
        # depend on who else is in the batch.
        batch = make_batch(8)
        batch["label"] = np.int32([3, 0, 0, 0, 0, 0, 0, 0])
        weights = [0.5, 1.0, 1.0, 4.5] + [1.0] * 6
        options = {"learning": ("fc",)}
        after, sums = jax.jit(
            make_step("plain", model, class_weights=weights, **options)
        )(state, batch)
        heavy = {k: np.repeat(v, [9] + [1] * 7, axis=0) for k, v in batch.items()}
        heavy["place"] = np.arange(16, dtype=np.int32)
        same, many = jax.jit(make_step("plain", model, **options))(state, heavy)
        chex.assert_trees_all_close(after.params, same.params, rtol=1e-4, atol=1e-6)
        assert float(sums["loss"][0]) / 8 == pytest.approx(
            float(many["loss"][0]) / 16, rel=1e-4
        )

    def test_the_head_alone(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        after, _ = jax.jit(make_step("plain", model, learning=("fc",)))(state, batch)
        before = dict(state.params)
        assert not np.array_equal(
            before.pop("fc")["kernel"], after.params["fc"]["kernel"]
        )
        chex.assert_trees_all_equal(before, {k: after.params[k] for k in before})
        chex.assert_trees_all_equal(state.batch_stats, after.batch_stats)
