"""The training steps: the same on any number of devices, no convolution too many."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from ibsgl_jax import (
    attribution,
    bottleneck,
    feature_stats,
    guidance,
    losses,
    models,
    saliency,
    tapping,
)
from ibsgl_jax.models import make_head_fn
from train.method.guided import make_guided_penalty
from train.method.state import create_state, state_options
from train.method.step import _make_mix, eval_step, normalize_images, train_step
from train.method.teacher import make_teacher

AXIS = "devices"
IMAGE_STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
GUIDED = dict(
    config=guidance.GuidanceConfig(step_size=0.3),
    mu=lambda step: 3.0,
    decay=0.9,
    only_right=False,  # untrained networks are wrong nearly everywhere
)
LEARNING_RATE = 0.1

# XLA's passes are what a test is about; LLVM's would only take longer.


def make_model(**options):
    # Zero-initialised blocks would leave most of the network without a gradient.
    options = {"stage_sizes": (1, 1), "stage_strides": (1, 2), **options}
    return models.create("small_resnet", num_classes=10, zero_init=False, **options)


def make_batch(num=16, size=32):
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (num, size, size, 3), np.uint8),
        "label": generator.integers(0, 10, num).astype(np.int32),
        "place": np.arange(num, dtype=np.int32),
        "mask": (generator.random((num, size, size)) < 0.3).astype(np.uint8),
    }


def make_step(kind, model, *, axis_name=None, **options):
    """The step of ``kind``; options of teacher, penalty and step together."""

    def own(fn):
        names = inspect.signature(fn).parameters
        return {k: v for k, v in options.items() if k in names}

    if kind == "guided":
        options = GUIDED | options
        teacher_fn = make_teacher(
            model,
            **own(make_teacher) | {"config": options["config"].bottleneck},
            axis_name=axis_name,
        )
        options["penalty_fn"] = make_guided_penalty(
            model, **own(make_guided_penalty), teacher_fn=teacher_fn
        )
    return functools.partial(
        train_step,
        **own(train_step),
        model=model,
        tx=optax.sgd(LEARNING_RATE, momentum=0.9),
        base_key=jax.random.key(7),
        image_stats=IMAGE_STATS,
        axis_name=axis_name,
    )


@functools.cache
def make_state(model, size=32, layer=""):
    """On the host: a step that donates its state leaves this one whole."""
    tx = optax.sgd(LEARNING_RATE, momentum=0.9)
    state = create_state(jax.random.key(0), model, tx, size, layer=layer)
    return jax.device_get(state)


def pmap_step(step, num_devices):
    """As ``devices.over_devices`` wraps it."""
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=jax.devices()[:num_devices],
    )


def shard(batch, num_devices):
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


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


class TestGuidedStep:
    @pytest.mark.parametrize(
        "teacher", [pytest.param("bottleneck", marks=pytest.mark.slow), "mask"]
    )
    def test_is_plain_descent_towards_constant_features(self, teacher):
        """No gradient through A' or L^ib: freezing A' by hand gives the same step."""
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        options = {"teacher": teacher}
        step = make_step("guided", model, **options)
        after, sums = jax.jit(step)(state, batch)

        images = normalize_images(batch["image"], **IMAGE_STATS)
        apply = functools.partial(
            model.apply, train=True, method="features", mutable=["batch_stats"]
        )
        features, _ = jax.jit(apply)(state.variables, images)
        stats = feature_stats.update_moving(state.feature_stats, features, decay=0.9)
        key = jax.random.fold_in(jax.random.key(7), 0)
        keys = jax.vmap(
            lambda place: jax.random.split(jax.random.fold_in(key, place))[0]
        )(batch["place"])
        given = None
        if teacher == "mask":
            given = jax.image.resize(
                batch["mask"].astype(jnp.float32), features.shape[:3], "linear"
            )
        guide = jax.jit(functools.partial(guidance.guide, config=GUIDED["config"]))
        target = guide(
            keys,
            make_head_fn(model, state.variables),
            features,
            batch["label"],
            feature_stats.moments(stats),
            teacher=given,
        ).target_features
        target = np.array(target)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            features, _ = apply(variables, images)
            logits = model.apply(variables, features, method="head")
            task = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            return jnp.mean(task + 3.0 * losses.feature_kl(features, target))

        loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(state.params)
        moved = jax.tree.map(
            lambda old, new: (old - new) / LEARNING_RATE, state.params, after.params
        )
        assert float(sums["kl"][0]) > 0
        np.testing.assert_allclose(float(sums["loss"][0]) / 8, loss, rtol=1e-3)
        # Twenty Adam steps amplify the rounding of jitted against eager features.
        chex.assert_trees_all_close(moved, gradient, rtol=5e-3, atol=2e-4)

    def test_guidance_changes_the_step(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        plain, _ = jax.jit(make_step("plain", model))(state, batch)
        guided, sums = jax.jit(make_step("guided", model, teacher="mask"))(state, batch)
        change = optax.tree.norm(optax.tree.sub(guided.params, plain.params))
        assert float(change) > 1e-3
        # 0.3 but for what the ReLU of A' cuts off.
        assert 0.15 < float(sums["relative_move"][0]) / 8 <= 0.3001
        assert float(sums["saliency_loss_at_target"][0]) < float(
            sums["saliency_loss"][0]
        )

    def test_draws_belong_to_the_place_in_the_global_batch(self):
        """The batch in another order, with its places, makes the same step."""
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        step = jax.jit(make_step("guided", model))
        order = np.random.default_rng(1).permutation(8)
        shuffled = {name: value[order] for name, value in batch.items()}
        moved, one = step(state, batch)
        same, two = step(state, shuffled)
        other, _ = step(state, {**shuffled, "place": batch["place"]})
        chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(moved.params, same.params, rtol=1e-3, atol=1e-5)
        change = optax.tree.norm(optax.tree.sub(moved.params, other.params))
        assert float(change) > 1e-4


class TestTeachers:
    @pytest.mark.slow
    def test_average_is_the_frozen_teacher_of_the_averaged_parameters(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        ema = jax.tree.map(lambda x: x * 1.1, state.params)
        state = state.replace(ema_params=ema)
        average = make_step("guided", model, teacher="average", ema_decay=0.9)
        frozen = make_step("guided", model, teacher="frozen", ema_decay=0.9)
        one, sums = jax.jit(average)(state, batch)
        two, _ = jax.jit(frozen)(
            state, batch, {"params": ema, "batch_stats": state.batch_stats}
        )
        chex.assert_trees_all_close(one.params, two.params, rtol=1e-4, atol=1e-6)
        assert float(sums["kl"][0]) > 0

    def test_frozen_teacher_is_followed(self):
        """Other weights of the teacher give another step, and their statistics."""
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        step = jax.jit(make_step("guided", model, teacher="frozen"))
        other = jax.tree.map(lambda x: x * 1.5, state.variables)
        one, _ = step(state, batch, state.variables)
        two, _ = step(state, batch, other)
        change = optax.tree.norm(optax.tree.sub(one.params, two.params))
        assert float(change) > 1e-4
        images = normalize_images(batch["image"], **IMAGE_STATS)
        features = model.apply(state.variables, images, method="features")
        stats = feature_stats.update_moving(state.feature_stats, features, decay=0.9)
        chex.assert_trees_all_close(one.feature_stats, stats, rtol=1e-3, atol=1e-4)


class TestRoute:
    def test_direct_descends_the_saliency_loss_in_all_parameters(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        step = make_step("guided", model, teacher="mask", route="direct")
        after, sums = jax.jit(step)(state, batch)
        images = normalize_images(batch["image"], **IMAGE_STATS)
        shape = jax.eval_shape(
            lambda x: model.apply(state.variables, x, method="features"), images
        ).shape[:3]
        teacher = jax.image.resize(batch["mask"].astype(jnp.float32), shape, "linear")

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            features, _ = model.apply(
                variables, images, train=True, method="features", mutable="batch_stats"
            )
            head_fn = make_head_fn(model, variables)
            logits = head_fn(features)
            classes = jnp.stack(
                [batch["label"], saliency.runner_up(logits, batch["label"])], axis=1
            )
            maps = saliency.class_saliencies(head_fn, features, classes)
            right = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
            loss = guidance.saliency_loss(
                maps[:, 0], maps[:, 1], teacher, right, GUIDED["config"]
            )
            task = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            return jnp.mean(task + 3.0 * loss)

        gradient = jax.jit(jax.grad(loss_fn))(state.params)
        moved = jax.tree.map(
            lambda old, new: (old - new) / LEARNING_RATE, state.params, after.params
        )
        chex.assert_trees_all_close(moved, gradient, rtol=5e-3, atol=2e-4)


class TestTeacherLayer:
    @pytest.mark.slow
    def test_follows_the_map_of_the_inner_layer_averaged_down(self):
        model, batch = make_model(), make_batch(8)
        layer = "layer1_0"
        state = make_state(model, layer=layer)
        after, sums = jax.jit(make_step("guided", model, layer=layer))(state, batch)
        _, tail_fn = tapping.linen(
            model, state.variables, layer, image_shape=(32, 32, 3), train=False
        )

        @jax.jit
        def expected(images):
            # One pass, in training mode, gives both.
            features, updated = model.apply(
                state.variables,
                images,
                train=True,
                method="features",
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: module.path == (layer,),
            )
            (inner,) = updated["intermediates"][layer]["__call__"]
            stats = feature_stats.update_moving(
                state.feature_stats, inner, decay=GUIDED["decay"]
            )
            keys = jax.vmap(
                functools.partial(
                    jax.random.fold_in, jax.random.fold_in(jax.random.key(7), 0)
                )
            )(batch["place"])
            keys = jax.vmap(jax.random.split, out_axes=1)(keys)[0]
            maps = bottleneck.attribute(
                keys,
                tail_fn,
                inner,
                batch["label"],
                feature_stats.moments(stats),
                config=GUIDED["config"].bottleneck,
            ).saliency
            guided = guidance.guide(
                None,
                make_head_fn(model, state.variables),
                features,
                batch["label"],
                None,
                config=GUIDED["config"],
                teacher=jax.image.resize(maps, features.shape[:3], "linear"),
            )
            return stats, maps, jnp.sum(guided.loss)

        stats, maps, loss = expected(normalize_images(batch["image"], **IMAGE_STATS))
        assert maps.shape == (8, 10, 10) == (8, *state.feature_stats.mean.shape[:2])
        chex.assert_trees_all_close(after.feature_stats, stats, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(sums["saliency_loss"][0], loss, rtol=1e-3)
        # Not the teacher of the last layer.
        _, last = jax.jit(make_step("guided", model))(make_state(model), batch)
        assert abs(float(last["saliency_loss"][0] / loss) - 1) > 0.01

    @pytest.mark.slow
    def test_costs_no_second_pass_up_to_the_layer(self):
        """A guided step by a CAM has the plain step's convolutions and those behind."""
        model, batch = make_model(), make_batch(8)
        state, layer = make_state(model, layer="layer1_0"), "layer1_0"
        _, tail_fn = tapping.linen(
            model, state.variables, layer, image_shape=(32, 32, 3), train=False
        )

        def cam(features):
            return attribution.hirescam(tail_fn, features, batch["label"])

        def count(fn, *args):
            text = jax.jit(fn).lower(*args).compile().as_text()
            return text.count(" convolution(") + text.count(" dot(")

        def steps(kind, **options):
            return count(make_step(kind, model, **options), state, batch)

        plain = steps("plain")
        inner, last = (
            steps("guided", teacher="hirescam", layer=at) for at in (layer, "")
        )
        features = jnp.ones((8, *state.feature_stats.mean.shape))
        assert 0 < inner - last <= count(cam, features)
        assert last - plain < count(cam, features)

    @pytest.mark.slow
    def test_devices_share_its_statistics_and_wait_for_no_other(self):
        """Two steps, the second not guided: as on one device, and its statistics stay.

        With few bottleneck steps: rounding would decide what the map is after many.
        """
        model = make_model(axis_name=AXIS)
        config = dataclasses.replace(
            GUIDED["config"],
            bottleneck=bottleneck.BottleneckConfig(num_steps=2, num_samples=1),
        )
        step = make_step(
            "guided",
            model,
            axis_name=AXIS,
            layer="layer1_0",
            when=lambda step: step % 2 == 0,
            config=config,
        )
        outcome = {}
        for num_devices in (1, 4):
            run = pmap_step(step, num_devices)
            batch = shard(make_batch(), num_devices)
            state, sums = run(make_state(model, layer="layer1_0"), batch)
            first = jax.device_get(state)
            assert float(sums["kl"][1]) == 16
            state, sums = run(state, batch)
            assert float(sums["kl"][1]) == 0
            state = jax.device_get(state)
            # Seen in every step, guided or not; the decay is .9.
            np.testing.assert_allclose(first.feature_stats.count, 16)
            np.testing.assert_allclose(state.feature_stats.count, 0.9 * 16 + 16)
            outcome[num_devices] = state
        chex.assert_trees_all_close(
            outcome[1].feature_stats, outcome[4].feature_stats, rtol=1e-3, atol=1e-4
        )
        chex.assert_trees_all_close(
            outcome[1].params, outcome[4].params, rtol=1e-3, atol=2e-5
        )

    @pytest.mark.slow
    def test_no_gradient_through_the_teacher(self):
        """A frozen copy of the network teaches the same and changes no gradient.

        At a layer that batch statistics have no part in.
        """
        model, batch = make_model(), make_batch(8)
        state = make_state(model, layer="conv1")
        own = make_step("guided", model, layer="conv1")
        frozen = make_step("guided", model, layer="conv1", teacher="frozen")
        after, _ = jax.jit(own)(state, batch)
        other, _ = jax.jit(frozen)(state, batch, state.variables)
        chex.assert_trees_all_close(after.params, other.params, rtol=1e-4, atol=1e-6)

    def test_the_true_mask_needs_no_layer(self):
        """An oracle made of another phase keeps that one's layer and ignores it."""
        config = default.get_config()
        phase = default.guided_phase(teacher="mask", teacher_layer="layer1_0")
        assert state_options(config, phase)["layer"] == ""
        model, batch = make_model(), make_batch(8)
        step = make_step("guided", model, teacher="mask", layer="layer1_0")
        without = make_step("guided", model, teacher="mask")
        state = make_state(model)
        chex.assert_trees_all_equal(
            jax.jit(step)(state, batch)[0], jax.jit(without)(state, batch)[0]
        )
        phase.teacher = "bottleneck"
        assert state_options(config, phase)["layer"] == "layer1_0"

    def test_unknown_layer_names_the_nearest(self):
        with pytest.raises(ValueError, match="no layer 'layer1'; nearest.*layer1_0"):
            make_state(make_model(), layer="layer1")


class TestOnlyRight:
    def test_guides_those_whose_prediction_is_right(self):
        """With the labels it predicts for half of them: the penalty is halved."""
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        images = normalize_images(batch["image"], **IMAGE_STATS)
        features, _ = model.apply(
            state.variables,
            images,
            train=True,
            method="features",
            mutable="batch_stats",
        )
        predicted = np.argmax(make_head_fn(model, state.variables)(features), axis=-1)
        right = np.arange(8) < 4
        batch = {**batch, "label": np.where(right, predicted, (predicted + 1) % 10)}
        options = dict(teacher="mask")
        wanted = {"only_right": True}
        sums = {
            name: jax.jit(make_step("guided", model, **options, **changes))(
                state, batch
            )[1]
            for name, changes in (("all", {}), ("right", wanted))
        }
        penalty = {
            name: float(each["loss"][0] - each["task_loss"][0])
            for name, each in sums.items()
        }
        assert 0 < penalty["right"] < 0.9 * penalty["all"]
        # The divergence that is logged is that of all examples.
        np.testing.assert_allclose(
            sums["all"]["kl"][0], sums["right"]["kl"][0], rtol=1e-5
        )
        np.testing.assert_allclose(
            penalty["all"], 3.0 * float(sums["all"]["kl"][0]), rtol=1e-2
        )


class TestWhen:
    def test_other_steps_are_plain(self):
        model, batch = make_model(), make_batch(8)
        state = make_state(model)
        every = jax.jit(
            make_step("guided", model, teacher="mask", when=lambda step: step % 2 == 0)
        )
        always = jax.jit(make_step("guided", model, teacher="mask"))
        plain = jax.jit(make_step("plain", model))
        guided, sums = every(state, batch)
        chex.assert_trees_all_close(
            guided.params, always(state, batch)[0].params, rtol=1e-4, atol=1e-6
        )
        assert float(sums["kl"][1]) == 8
        state = state.replace(step=jnp.int32(1))
        between, sums = every(state, batch)
        chex.assert_trees_all_close(
            between.params, plain(state, batch)[0].params, rtol=1e-4, atol=1e-6
        )
        # Not counted, so that the means are those of the guided steps.
        assert float(sums["kl"][1]) == float(sums["kl"][0]) == 0
        assert float(sums["loss"][1]) == 8


class TestPrecision:
    @pytest.mark.slow
    def test_only_the_backbone_is_in_bfloat16(self):
        """Maps, bottleneck, divergence and statistics of a bfloat16 model: float32."""
        model, batch = make_model(dtype=jnp.bfloat16), make_batch(8)
        state = make_state(model)
        features = jax.eval_shape(
            lambda images: model.apply(state.variables, images, method="features"),
            jnp.zeros(batch["image"].shape),
        )
        assert features.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(state.variables)} == {
            np.dtype("float32")
        }
        step = make_step("guided", model)
        after, sums = jax.jit(step)(state, batch)
        chex.assert_trees_all_equal_dtypes(state, after)
        assert {x.dtype for x in jax.tree.leaves(sums)} == {np.dtype("float32")}
        assert all(np.isfinite(x) for x in jax.tree.leaves(jax.device_get(sums)))
        # Beyond the backbone's convolutions and normalisation: no exponential,
        # logarithm or inner loop in less than float32.
        text = str(jax.make_jaxpr(step)(state, batch))
        for line in text.splitlines():
            if any(
                f"= {name} " in line for name in ("exp", "log", "log1p", "logistic")
            ):
                assert "bf16" not in line, line
        float32, full = jax.jit(make_step("guided", make_model()))(state, batch)
        del float32
        for name in ("task_loss", "saliency_loss", "kl"):
            np.testing.assert_allclose(
                float(sums[name][0]), float(full[name][0]), rtol=0.1
            )


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


class TestConvolutions:
    @pytest.mark.parametrize(
        "name, options",
        [
            ("small_resnet", {}),
            pytest.param(
                "resnet18",
                {"num_filters": 4, "stem": "cifar", "num_classes": 10},
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_guided_step_has_exactly_those_of_the_plain_step(self, name, options):
        model = models.create(name, **{"num_classes": 10, **options})
        state = jax.eval_shape(lambda: make_state(model))
        batch = make_batch(4)
        counts = {}
        for kind in ("plain", "guided"):
            lowered = jax.jit(make_step(kind, model)).lower(state, batch)
            lowered_count = lowered.as_text().count("stablehlo.convolution")
            hlo = lowered.compile().as_text()
            compiled_count = hlo.count(" convolution(") + hlo.count("onednn$conv")
            assert compiled_count > 0
            counts[kind] = lowered_count, compiled_count
        assert counts["plain"] == counts["guided"]
        # Those of 1 x 1 are matrix products on a CPU, and the gradients of the kernels
        # that five layers apply at 32 x 32 places.
        num_layers, large = {"small_resnet": (1 + 6, 0), "resnet18": (1 + 16, 5)}[name]
        # Forward, the kernels' gradients, and the inputs' but for the images.
        assert counts["plain"][0] == 3 * num_layers - 1 - large


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
