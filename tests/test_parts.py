"""The guided part of a step by parts of the batch: the same numbers, and where."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import guidance
from tests.training_step import make_batch, make_model, make_state, make_step
from train.method import parts


def make_everyone(num):
    draw = np.random.default_rng(0)
    features = jnp.asarray(draw.normal(size=(num, 2, 3, 4)), jnp.float32)
    return parts.Part(
        keys=jax.random.split(jax.random.key(0), num),
        labels=jnp.arange(num),
        features=features,
        seen=features**2,
        answers={"mask": jnp.ones((num, 5, 5), jnp.uint8)},
    )


@pytest.fixture(autouse=True)
def eight_at_a_time(monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 8)


def fn(part):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(part.keys)
    number = jnp.sum(part.features + part.seen, axis=(1, 2, 3))
    marked = jnp.sum(part.answers["mask"], axis=(1, 2), dtype=jnp.int32)
    return {"noise": noise, "number": number, "marked": marked + part.labels}


class TestInParts:
    @pytest.mark.parametrize("num", [3, 8, 12, 16, 40])
    @pytest.mark.parametrize("platform", ["cpu", "tpu", None])
    def test_are_the_whole(self, num, platform):
        run = jax.jit(functools.partial(parts.in_parts, fn, platform=platform))
        everyone = make_everyone(num)
        chex.assert_trees_all_close(run(everyone), fn(everyone), rtol=1e-5)

    @pytest.mark.parametrize(
        ("num", "platform", "seen"),
        [
            (40, "cpu", [8]),
            (40, None, [8, 40]),
            (40, "tpu", [40]),
            (12, "cpu", [12]),
            (8, "cpu", [8]),
        ],
    )
    def test_how_many_at_a_time(self, num, platform, seen):
        sizes = []

        def counted(part):
            sizes.append(len(part.labels))
            return part.labels

        run = functools.partial(parts.in_parts, counted, platform=platform)
        jax.eval_shape(run, make_everyone(num))
        assert sorted(set(sizes)) == seen

    def test_another_platforms_program_has_no_loop(self):
        run = jax.jit(functools.partial(parts.in_parts, lambda part: 2 * part.features))
        traced = run.trace(make_everyone(16))
        assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "while" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("", {"teacher": "mask"}),
        ("layer1_0", {"teacher": "hirescam", "power": 2.0, "mask_first": True}),
        pytest.param("layer1_0", {"teacher": "bottleneck"}, marks=pytest.mark.slow),
        pytest.param("", {"teacher": "bottleneck"}, marks=pytest.mark.slow),
        pytest.param(
            "",
            {
                "teacher": "mask",
                # "plain" descends the mean over the whole batch, not over a part.
                "config": guidance.GuidanceConfig(step="plain", step_size=1e3),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_guided_step_is_the_same(layer, options):
    model = make_model()
    state, batch = make_state(model, layer=layer), make_batch(16)

    def step(platform):
        made = make_step(
            "guided",
            model,
            layer=layer,
            when=lambda step: step % 2 == 0,
            platform=platform,
            **options,
        )
        return jax.jit(made)(state, batch)

    (after, sums), (whole, expected) = step("cpu"), step("tpu")
    chex.assert_trees_all_close(sums, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(after.params, whole.params, rtol=1e-3, atol=1e-5)
    assert float(sums["kl"][0]) > 0
