"""The guided step: what it descends, by which teacher, whom, when, at what price."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibsgl_jax import feature_stats, guidance, losses, models, saliency
from ibsgl_jax.models import make_head_fn
from tests.training_step import (
    GUIDED,
    IMAGE_STATS,
    LEARNING_RATE,
    make_batch,
    make_model,
    make_state,
    make_step,
)
from train.method.step import normalize_images


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


class TestFewMasks:
    """An example without a mask: all zeros."""

    def step(self, batch, kind="guided", **options):
        model = make_model()
        step = jax.jit(make_step(kind, model, **options))
        return step(make_state(model), batch)[0].params

    def test_without_masks_the_mask_teaches_nothing(self):
        batch = make_batch(8)
        batch["mask"] = np.zeros_like(batch["mask"])
        guided = self.step(batch, teacher="mask")
        chex.assert_trees_all_close(
            guided, self.step(batch, kind="plain"), rtol=1e-4, atol=1e-6
        )

    def test_a_mask_goes_before_the_map_where_there_is_one(self):
        batch = make_batch(8)
        # Squared: a map that is taught by itself is at its best, and moves by rounding.
        cam = dict(teacher="hirescam", power=2.0)
        first = self.step(batch, mask_first=True, **cam)
        oracle = self.step(batch, teacher="mask")
        chex.assert_trees_all_close(first, oracle, rtol=1e-3, atol=1e-5)
        some = {**batch, "mask": batch["mask"].copy()}
        some["mask"][2:] = 0
        mixed = self.step(some, mask_first=True, **cam)
        few = self.step(some, teacher="mask")
        own = self.step(batch, **cam)
        for other in (oracle, few, own):
            assert float(optax.tree.norm(optax.tree.sub(mixed, other))) > 1e-4
        some["mask"][:] = 0
        none = self.step(some, mask_first=True, **cam)
        chex.assert_trees_all_close(none, own, rtol=1e-4, atol=1e-6)


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


# XLA's passes are what a test is about; LLVM's would only take longer.
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
