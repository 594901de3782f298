"""The benchmarks run: each is imported, and the steps that they time do train."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import growth, step
from configs import default
from ibsgl_jax import models
from train.method.build import make_optimizer
from train.method.state import create_state

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "def main(" in path.read_text()
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_started(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main)


@pytest.mark.parametrize("name", step.make_phases("layer1_0"))
def test_the_steps_that_are_timed_train(name):
    model = models.create("small_resnet", num_classes=3, num_filters=4)
    phase = step.make_phases("layer1_0")[name]
    tx = make_optimizer(default.get_config().optimizer, lambda step: 1e-3)
    layer = phase.get("teacher_layer", "")
    state = create_state(jax.random.key(0), model, tx, 16, layer=layer)
    batch = {
        "image": jnp.zeros((2, 16, 16, 3), jnp.uint8),
        "label": jnp.zeros(2, jnp.int32),
    }
    after, sums = jax.eval_shape(step.make_step(model, tx, phase), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert ("kl" in sums) == (phase.method == "guided")


def test_growth_measures_one_device_and_two(capsys):
    assert growth.main(["--quick", "--rounds", "1"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert min(one["plain"], one["guided"], two["plain"], two["guided"]) > 0
