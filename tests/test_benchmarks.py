"""The benchmarks run: each is imported, and the steps that they time do train."""

import importlib
import json
import pathlib
import re

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


VIT = {"depth": 2, "width": 8, "patch_size": 6, "image_size": 18}


@pytest.mark.parametrize(
    "network, options, layer, side",
    [("small_resnet", {"num_filters": 4}, "layer1_0", 16), ("small_vit", VIT, "", 18)],
)
@pytest.mark.parametrize("name", step.make_phases("layer1_0"))
def test_the_steps_that_are_timed_train(name, network, options, layer, side):
    if name not in step.make_phases(layer):
        pytest.skip("no layer further in")
    model = models.create(network, num_classes=3, **options)
    phase = step.make_phases(layer)[name]
    tx = make_optimizer(default.get_config().optimizer, lambda step: 1e-3)
    layer = phase.get("teacher_layer", "")
    state = jax.eval_shape(
        lambda: create_state(jax.random.key(0), model, tx, side, layer=layer)
    )
    batch = {
        "image": jnp.zeros((2, side, side, 3), jnp.uint8),
        "label": jnp.zeros(2, jnp.int32),
    }
    after, sums = jax.eval_shape(step.make_step(model, tx, phase), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert ("kl" in sums) == (phase.method == "guided")


RATIO = {"ratio": 1.0, "ratio_quartiles": [0.9, 1.1]}
PLAIN = {"network": "a", "batch_size": 8, "variant": "plain", "seconds": 0.1, **RATIO}
ROWS = {
    "attribution": [PLAIN | {"images_per_second": 2.0, "rounds": 4}],
    "growth": {"filters": [{"plain": 0.1, "guided": 0.2, "elements": 7}]},
    "input": [{"case": "c", "input": {"x": 1}, "step": {"y": 2}, "input_per_step": 2}],
    "resilience": [{"fault": "f", "times": 3, "lost": 0, "seen_by": "x|y"}],
    "step": [PLAIN, PLAIN | {"compile_ratio": 2.0, "memory_ratio": 1.1}],
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_a_table_has_the_headers_cells(name):
    table = importlib.import_module(f"benchmarks.{name}").table(ROWS[name])
    header, rule, *rows = (re.split(r"(?<!\\)\|", s) for s in table.split("\n"))
    assert set(rule[1:-1]) == {"---"} and len(rows) == len(ROWS[name])
    assert {len(row) for row in rows} == {len(header)} == {len(rule)}


@pytest.mark.slow
def test_growth_measures_one_device_and_two(capsys):
    assert growth.main(["--quick", "--rounds", "1"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert min(one["plain"], one["guided"], two["plain"], two["guided"]) > 0
