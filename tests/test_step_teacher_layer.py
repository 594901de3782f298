"""The guided step whose teacher looks at an inner layer."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ibsgl_jax import attribution, bottleneck, feature_stats, guidance, tapping
from ibsgl_jax.models import make_head_fn
from tests.training_step import (
    AXIS,
    GUIDED,
    IMAGE_STATS,
    make_batch,
    make_model,
    make_state,
    make_step,
    pmap_step,
    shard,
)
from train.method.state import state_options
from train.method.step import normalize_images


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
