"""The step does not depend on how many devices, or parts, share the global batch.

Every method, teacher, route and kind of feature update, on 1, 2 and 4 devices and in 1
and 2 parts, against one device and one part; the tolerances are the table below.

A rounding may tip a ReLU or the choice of the runner-up, and an update of its own size
follows. So eight networks take the step, and the quarter of them that agree best must
agree: a step that depends on the number of devices differs in all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from configs import default
from ibsgl_jax.models import PooledLinear
from train.method import build
from train.method.state import create_state, state_options
from train.method.step import train_step
from train.show.markdown import markdown

AXIS = "devices"
RIVALS = {
    "saliency_guided": {"mask_fraction": 0.5, "weight": 1.0},
    "icasc": {"weight": 1.0, "omega": 10.0, "threshold": 0.25},
}
GUIDED = {
    "bottleneck": {},
    "inner_bottleneck": {"teacher_layer": "conv1"},
    "hirescam": {"teacher": "hirescam", "teacher_layer": "2x", "teacher_power": 2.0},
    "layer_cam": {"teacher": "layer_cam"},
    "frozen": {"teacher": "before"},
    "frozen_cam": {"teacher": "before", "teacher_method": "layer_cam"},
    "average": {"teacher": "average"},
    "mask": {"teacher": "mask"},
    "direct": {"teacher": "mask", "route": "direct"},
    "literal": {"teacher": "mask", "guidance": {"step": "plain", "step_size": 100.0}},
    "literal_bottleneck": {"guidance": {"step": "plain", "step_size": 100.0}},
}
CASES = ("plain", *RIVALS, *GUIDED)

NUM_NETWORKS = 8

# Largest relative difference of the step's change of the parameters. Devices: sums in
# another order. Parts: the same, but where the teacher's noise has the statistics of
# the examples so far, which are another half of the batch in each part.
TOLERANCES = {"devices": 2e-4, "parts": 2e-4, "parts, by statistics": 0.3}
BY_STATISTICS = {
    "bottleneck", "inner_bottleneck", "frozen", "average", "literal_bottleneck"
}  # fmt: skip


class TinyNet(nn.Module):
    """Two convolutions, dropout and a pooled linear head: quick to compile."""

    axis_name: str | None = None
    normalized: bool = True

    def setup(self):
        self.conv1 = nn.Conv(4, (3, 3), strides=2)
        self.conv2 = nn.Conv(6, (3, 3), strides=2)
        self.norm = nn.BatchNorm(axis_name=self.axis_name)
        self.dense = nn.Dense(5)

    def features(self, images, train=False):
        x = nn.relu(self.conv1(images))
        if self.normalized:
            x = self.norm(x, use_running_average=not train)
        return nn.relu(self.conv2(x))

    def head(self, features, train=False, keys=None):
        pooled = features.mean(axis=(1, 2))
        if train:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (6,)))(keys)
            pooled = jnp.where(kept, pooled, 0.0)
        return self.dense(pooled)

    def __call__(self, images, train=False, keys=None):
        return self.head(self.features(images, train), train, keys)

    def pooled_linear(self, variables):
        dense = variables["params"]["dense"]
        return PooledLinear(dense["kernel"], dense["bias"])


def make_batch():
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": generator.integers(0, 5, 8).astype(np.int32),
        "place": np.arange(8, dtype=np.int32),
        "mask": (generator.random((8, 16, 16)) < 0.3).astype(np.uint8),
    }


def make_config(case, parts):
    config = default.get_config()
    config.phases = ("before", "phase")
    config.accumulate_steps = parts
    config.image_size = 16
    config.ema_decay = 0.5
    with config.unlocked():
        config.before = default.plain_phase()
        if case in GUIDED:
            phase = default.guided_phase(
                mu=50.0, every=1, release=0.0, only_right=False, teacher_layer=""
            )
            phase.update(default.BOTTLENECK)
            phase.bottleneck.num_steps = 3
            phase.update(ConfigDict(GUIDED[case]))
            config.phase = phase
        else:
            config.phase = default.plain_phase()
            config.phase.method = case
            config.phase.update(RIVALS.get(case, {}))
    return config


@functools.cache
def changes(case, num_devices, parts, normalized):
    """What one step adds to the parameters of each network, [NUM_NETWORKS, P]."""
    config = make_config(case, parts)
    model = TinyNet(axis_name=AXIS, normalized=normalized)
    tx = optax.sgd(0.1)
    step = functools.partial(
        train_step,
        penalty_fn=build.make_penalty(config, config.phase, 10, model, AXIS),
        layer=build.taught_layer(config.phase, model, config.image_size),
        model=model,
        tx=tx,
        base_key=jax.random.key(7),
        image_stats={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        accumulate_steps=parts,
        ema_decay=0.5,
        axis_name=AXIS,
    )
    is_frozen = config.phase.get("teacher") in config.phases
    batch = jax.tree.map(
        lambda x: x.reshape(num_devices, -1, *x.shape[1:]), make_batch()
    )
    run = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0) + (None,) * is_frozen,
        out_axes=None,
        devices=jax.devices()[:num_devices],
    )
    options = state_options(config, config.phase)
    init = jax.jit(lambda key: create_state(key, model, tx, **options))
    found = []
    for number in range(NUM_NETWORKS):
        state = jax.device_get(init(jax.random.key(number)))
        after, _ = run(state, batch, *([state.variables] if is_frozen else []))
        moved = jax.tree.map(
            lambda a, b: np.ravel(a - b), jax.device_get(after.params), state.params
        )
        found.append(np.concatenate(jax.tree.leaves(moved)))
    return np.stack(found)


def difference(case, num_devices, parts, normalized):
    """Relative difference from one device and one part, of the best quarter."""
    reference = changes(case, 1, 1, normalized)
    other = changes(case, num_devices, parts, normalized)
    norms = np.linalg.norm(reference, axis=1)
    return np.quantile(np.linalg.norm(other - reference, axis=1) / norms, 0.25)


def some(cases):
    """All the cases; by default run are these few."""
    return [c if c in cases else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


class TestShares:
    @pytest.mark.parametrize("case", some(("saliency_guided", "literal_bottleneck")))
    def test_four_devices(self, case):
        assert difference(case, 4, 1, True) < TOLERANCES["devices"]

    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_two_devices(self, case):
        assert difference(case, 2, 1, True) < TOLERANCES["devices"]

    @pytest.mark.parametrize("case", some(("literal",)))
    def test_two_parts_on_two_devices(self, case):
        kind = "parts, by statistics" if case in BY_STATISTICS else "parts"
        assert difference(case, 2, 2, False) < TOLERANCES[kind]

    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_two_parts(self, case):
        kind = "parts, by statistics" if case in BY_STATISTICS else "parts"
        assert difference(case, 1, 2, False) < TOLERANCES[kind]

    @pytest.mark.slow
    @pytest.mark.parametrize("case", [case for case in CASES if case != "plain"])
    def test_the_penalty_is_felt(self, case):
        """Else the comparisons above would be of plain steps."""
        plain, other = changes("plain", 1, 1, True), changes(case, 1, 1, True)
        assert np.linalg.norm(other - plain) > 1e-3 * np.linalg.norm(plain)


def main():
    """The difference from one device and one part, of the parameters' change."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # quicker to compile
    settings = {"2 devices": (2, 1, True), "4 devices": (4, 1, True)}
    settings |= {"2 parts": (1, 2, False), "2 devices in 2 parts": (2, 2, False)}
    rows = [
        (case, *(f"{difference(case, *each):.0e}" for each in settings.values()))
        for case in CASES
    ]
    print(markdown(("step", *settings), rows))


if __name__ == "__main__":
    main()
