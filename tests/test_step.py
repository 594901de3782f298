"""The training steps: the same on any number of devices, no convolution too many."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibsgl_jax import feature_stats, guidance, losses, models
from ibsgl_jax.models import make_head_fn
from train import state as states
from train import step as steps

AXIS = "devices"
IMAGE_STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
GUIDED = dict(
    config=guidance.GuidanceConfig(step_size=0.3), mu=lambda step: 3.0, decay=0.9
)
LEARNING_RATE = 0.1
# XLA's passes are what a test is about; LLVM's would only take longer.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


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


def make_step(kind, model, **options):
    return functools.partial(
        steps.plain_step if kind == "plain" else steps.guided_step,
        model=model,
        tx=optax.sgd(LEARNING_RATE, momentum=0.9),
        base_key=jax.random.key(7),
        image_stats=IMAGE_STATS,
        **(GUIDED if kind == "guided" else {}),
        **options,
    )


@functools.cache
def create_state(model, size=32):
    """On the host: a step that donates its state leaves this one whole."""
    tx = optax.sgd(LEARNING_RATE, momentum=0.9)
    state = states.create_state(jax.random.key(0), model, tx, size)
    return jax.device_get(state)


def pmap_step(step, num_devices):
    """As train/loop.py wraps it."""
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
        state = place(create_state(model), np.zeros(num_devices))
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
    @pytest.mark.parametrize("teacher", ["bottleneck", "mask"])
    def test_is_plain_descent_towards_constant_features(self, teacher):
        """No gradient through A' or L^ib: freezing A' by hand gives the same step."""
        model, batch = make_model(), make_batch(8)
        state = create_state(model)
        options = {"teacher": teacher}
        step = make_step("guided", model, **options)
        after, sums = jit(step)(state, batch)

        images = steps.normalize_images(batch["image"], **IMAGE_STATS)
        apply = functools.partial(
            model.apply, train=True, method="features", mutable=["batch_stats"]
        )
        features, _ = apply(state.variables, images)
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
        guide = jit(functools.partial(guidance.guide, config=GUIDED["config"]))
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

        loss, gradient = jit(jax.value_and_grad(loss_fn))(state.params)
        moved = jax.tree.map(
            lambda old, new: (old - new) / LEARNING_RATE, state.params, after.params
        )
        assert float(sums["kl"][0]) > 0
        np.testing.assert_allclose(float(sums["loss"][0]) / 8, loss, rtol=1e-3)
        # Twenty Adam steps amplify the rounding of jitted against eager features.
        chex.assert_trees_all_close(moved, gradient, rtol=5e-3, atol=2e-4)

    def test_guidance_changes_the_step(self):
        model, batch = make_model(), make_batch(8)
        state = create_state(model)
        plain, _ = jit(make_step("plain", model))(state, batch)
        guided, sums = jit(make_step("guided", model, teacher="mask"))(state, batch)
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
        state = create_state(model)
        step = jit(make_step("guided", model))
        order = np.random.default_rng(1).permutation(8)
        shuffled = {name: value[order] for name, value in batch.items()}
        moved, one = step(state, batch)
        same, two = step(state, shuffled)
        other, _ = step(state, {**shuffled, "place": batch["place"]})
        chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(moved.params, same.params, rtol=1e-3, atol=1e-5)
        change = optax.tree.norm(optax.tree.sub(moved.params, other.params))
        assert float(change) > 1e-4


class TestConvolutions:
    @pytest.mark.parametrize(
        "name, options",
        [
            ("small_resnet", {}),
            ("resnet18", {"num_filters": 4, "stem": "cifar", "num_classes": 10}),
        ],
    )
    def test_guided_step_has_exactly_those_of_the_plain_step(self, name, options):
        model = models.create(name, **{"num_classes": 10, **options})
        state = jax.eval_shape(lambda: create_state(model))
        batch = make_batch(4)
        counts = {}
        for kind in ("plain", "guided"):
            lowered = jit(make_step(kind, model)).lower(state, batch)
            lowered_count = lowered.as_text().count("stablehlo.convolution")
            hlo = lowered.compile().as_text()
            compiled_count = hlo.count(" convolution(") + hlo.count("onednn$conv")
            assert compiled_count > 0
            counts[kind] = lowered_count, compiled_count
        assert counts["plain"] == counts["guided"]
        num_layers = {"small_resnet": 1 + 6 + 2, "resnet18": 1 + 16 + 3}[name]
        # Forward, the kernels' gradients, and the inputs' but for the images.
        assert counts["plain"][0] == 3 * num_layers - 1


class TestEvalStep:
    def test_padding_does_not_count(self):
        model = make_model()
        state = create_state(model)
        batch = make_batch(8)
        box = np.tile(np.float32([0.2, 0.2, 0.8, 0.8]), (8, 1))
        batch |= {"bbox": box, "example_mask": np.ones(8, np.float32)}
        step = jit(
            functools.partial(steps.eval_step, model=model, image_stats=IMAGE_STATS)
        )
        short = {name: value[:5] for name, value in batch.items()}
        padded = {name: value.copy() for name, value in batch.items()}
        padded["example_mask"][5:] = 0
        padded["image"][5:] = 0
        chex.assert_trees_all_close(
            step(state.variables, short), step(state.variables, padded), rtol=1e-5
        )
