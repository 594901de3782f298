"""The step for machines that are not here: lowered for them, compiled for a slice."""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from configs import default
from configs.sweeps import variants
from ibsgl_jax import bottleneck, models
from ibsgl_jax.feature_stats import Moments
from tests import tiny_run
from train import compile as compile_command
from train.devices import AXIS
from train.errors import CompileError
from train.method.build import make_model, make_optimizer, make_schedule, make_step
from train.method.state import create_state
from train.tpu import ahead


def small_config():
    config = tiny_run.make_config("runs/data")
    with config.unlocked():
        config.image_size = 24
        config.guided.update(variants.LAST)
    return config


def make_batch(config):
    generator = np.random.default_rng(0)
    side, size = config.image_size, config.batch_size
    return {
        "image": generator.integers(0, 256, (size, side, side, 3), np.uint8),
        "label": generator.integers(0, 10, size).astype(np.int32),
        "place": np.arange(size, dtype=np.int32),
    }


def make_state(config, model):
    tx = make_optimizer(config.optimizer, make_schedule(1e-3, 1000, 0))
    return tx, create_state(jax.random.key(0), model, tx, config.image_size)


def features_shape(config):
    return make_state(config, make_model(config, 10))[1].feature_stats.mean.shape


class TestCompileStep:
    def test_is_the_step_that_training_takes(self):
        """shard_map here, pmap there: in particular no gradient summed twice."""
        config, phase = small_config(), default.plain_phase(learning_rate=1e-3)
        config.optimizer.name = "sgd"
        compiled = ahead.compile_step(config, phase, jax.devices()[:4], 10)
        model = make_model(config, 10, axis_name=AXIS)
        tx, state = make_state(config, model)
        state, batch = jax.device_get(state), make_batch(config)
        one, sums = compiled(
            *jax.device_put((state, batch), compiled.input_shardings[0])
        )
        step = make_step(config, phase, 1000, generation=0, model=model, tx=tx)
        step = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=jax.devices()[:4],
        )
        shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
        other, expected = step(state, shards)
        chex.assert_trees_all_close(
            jax.device_get(sums), jax.device_get(expected), rtol=1e-5
        )
        chex.assert_trees_all_close(
            jax.device_get(one.params), jax.device_get(other.params), rtol=1e-5
        )

    @pytest.mark.slow
    def test_measures_guided_beside_plain(self):
        config = small_config()
        rows = {
            name: ahead.measure(
                ahead.compile_step(config, phase, jax.devices()[:4], 10)
            )
            for name, phase in (("plain", config.plain), ("guided", config.guided))
        }
        for row in rows.values():
            assert row["memory"] > row["memory_temporary"] > 0 and row["flops"] > 0
            # At least the gradient of every parameter crosses, in float32.
            assert row["collective_bytes"] > 4 * 1000
            assert row["by_kind"]["all-reduce"][0] == row["collectives"]
        assert rows["guided"]["collective_bytes"] > rows["plain"]["collective_bytes"]
        # The configuration guides every fourth step; the others move less.
        plain, guided = rows["plain"], rows["guided"]
        assert guided["bytes_accessed"] > guided["bytes_unguided"]
        assert guided["bytes_unguided"] > plain["bytes_unguided"]
        assert plain["bytes_unguided"] == plain["bytes_accessed"]
        text = compile_command.report(config, "v5e:2x2", "guided", rows, 4)
        assert "| plain | guided | ratio |" in text and "of 16 GiB a chip" in text

    @pytest.mark.slow
    def test_frozen_teacher_costs_a_pass_through_its_own_network(self):
        config = small_config()
        config.guided.teacher = "plain"
        text = ahead.compile_step(
            config, config.guided, jax.devices()[:1], 10
        ).as_text()
        config.guided.teacher = "bottleneck"
        own = ahead.compile_step(config, config.guided, jax.devices()[:1], 10).as_text()
        assert text.count(" convolution(") > own.count(" convolution(") > 0

    def test_refuses_a_batch_that_does_not_divide(self):
        with pytest.raises(CompileError, match="not divisible by 3 chips"):
            ahead.compile_step(
                small_config(), default.plain_phase(), jax.devices()[:3], 10
            )


class TestRepeatedFlops:
    def count(self, num_steps, num_images=8):
        config = small_config()
        config.guided.bottleneck.num_steps = num_steps
        devices = jax.devices()[:2]
        return ahead.repeated_flops(config, config.guided, devices, num_images, 10)

    def test_grow_with_the_steps_that_the_compiler_does_not_count(self):
        few, many = self.count(6), self.count(14)
        # Some arithmetic for every element.
        assert few > 4 * 10 * 8 * np.prod(features_shape(small_config()))
        assert many == pytest.approx(3 * few, rel=0.05)
        assert self.count(2) == 0

    def test_grow_with_the_pieces_that_the_compiler_does_not_count(self):
        """Of two pieces one is counted with one of its five trips."""
        one, two = self.count(6), self.count(6, num_images=16)
        assert 2 * one + one / 4 < two < 2 * one + one / 2

    def test_plain_repeats_nothing(self):
        config = small_config()
        assert not ahead.repeated_flops(config, config.plain, jax.devices()[:2], 4, 10)


class TestBounds:
    def test_by_hand(self):
        row = {"flops": 197e9, "bytes_accessed": 819e7, "collective_bytes": 1e8}
        assert ahead.bounds(row, "v5e") == pytest.approx(
            {"arithmetic": 1.0, "memory": 10.0, "links": 1.0}
        )


class TestChoosePhase:
    def test_is_the_last_guided_one(self):
        config = small_config()
        assert ahead.choose_phase(config) == "guided"
        assert ahead.choose_phase(config, "control") == "control"
        with pytest.raises(CompileError, match="no phase 'other'"):
            ahead.choose_phase(config, "other")


class TestDescribe:
    def test_says_that_libtpu_is_missing(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(CompileError, match="pip install"):
            ahead.describe("v5e:2x2")


class TestLowering:
    """jax.export lowers for platforms that are not here; it runs nothing."""

    @pytest.mark.parametrize("name", ["small_resnet", "vgg16"])
    def test_guided_step(self, name):
        config = small_config()
        with config.unlocked():
            config.model = name
            config.dtype = "bfloat16"
            if name == "vgg16":
                config.model_options = {}
                config.model_options.stage_widths = (4, 4, 4, 4, 4)
                config.model_options.dense_features = 8
                config.image_size = 32
        model = make_model(config, 10)
        tx, state = make_state(config, model)
        step = make_step(
            config, config.guided, 10, generation=0, model=model, tx=tx, axis_name=None
        )

        def flat_step(leaves, batch):  # export takes plain containers only
            after, sums = step(jax.tree.unflatten(structure, leaves), batch)
            return jax.tree.leaves(after), sums

        leaves, structure = jax.tree.flatten(state)
        exported = export.export(jax.jit(flat_step), platforms=("tpu", "cuda"))(
            leaves, make_batch(config)
        )
        assert set(exported.platforms) == {"tpu", "cuda"}
        assert exported.mlir_module().count("stablehlo.convolution") > 0
        assert [x.shape for x in exported.out_avals[: len(leaves)]] == [
            x.shape for x in leaves
        ]

    @pytest.mark.parametrize("kind", ["pooled", "generic"])
    def test_attribution(self, kind):
        kernel, bias = jnp.ones((6, 5)), jnp.zeros(5)

        def attribute(key, features, labels):
            head = models.PooledLinear(kernel, bias)
            head_fn = head if kind == "pooled" else lambda a: head(jnp.square(a))
            moments = Moments(
                jnp.zeros((4, 4, 6)), jnp.ones((4, 4, 6)), jnp.ones((4, 4, 6), bool)
            )
            return bottleneck.attribute(
                key, head_fn, features, labels, moments
            ).saliency

        exported = export.export(jax.jit(attribute), platforms=("tpu", "cuda"))(
            jax.random.key(0), jnp.ones((2, 4, 4, 6)), jnp.zeros(2, jnp.int32)
        )
        assert set(exported.platforms) == {"tpu", "cuda"}
        assert exported.out_avals[0].shape == (2, 4, 4)


class TestCommand:
    def test_prints_the_table(self, monkeypatch):
        """With the devices that are here in the place of a slice of TPUs."""
        monkeypatch.setattr(ahead, "describe", lambda topology: jax.devices()[:2])
        rows, text = compile_command.run(small_config(), "here", num_classes=10)
        assert list(rows) == ["plain", "guided"]
        assert "16 images on here (2 chips, 8 a chip)" in text
        assert "| collectives  |" in text and "| memory GiB |" in text


class TestMemory:
    @pytest.mark.parametrize(
        "text, found",
        [
            ("RESOURCE_EXHAUSTED: Used 19.1G of 15.7G hbm", ("19.1G", "15.7G")),
            (
                "required for HLO temporaries (64.99G) exceeds available HBM (15.75G).",
                ("64.99G", "15.75G"),
            ),
        ],
    )
    def test_what_is_needed_and_what_there_is(self, text, found):
        assert ahead._USED.search(text).groups() == found


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
class TestTpu:
    def test_compiles_for_a_slice(self):
        config = small_config()
        with config.unlocked():
            config.dtype = "bfloat16"
        rows, text = compile_command.run(config, "v5e:2x2", num_classes=10)
        assert list(rows) == ["plain", "guided"]
        assert rows["guided"]["by_kind"]["all-reduce"][0] > 0
        assert 1.0 < rows["guided"]["flops"] / rows["plain"]["flops"] < 2.0
        assert "fits:" in text

    def test_refuses_what_does_not_fit(self):
        config = small_config()
        with config.unlocked():
            config.model_options = {}
            config.model_options.num_filters = 64
            config.image_size = 64
        # So much that computing activations twice, to save memory, is no way out.
        config.batch_size = 4 * 2**16
        with pytest.raises(CompileError, match=r"images on a chip need [\d.]+G of 1"):
            compile_command.run(config, "v5e:2x2", num_classes=10)

    def test_unknown_slice(self):
        with pytest.raises(CompileError, match="topology 'v5e:banana'"):
            ahead.describe("v5e:banana")
