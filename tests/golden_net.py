"""The small network behind the reference arrays of tests/data, in plain jax.

conv1 3x3 -> relu -> 2x2 max-pool -> conv2 -> relu = tap A -> conv3 -> relu = tap B
-> mean over space -> dense. Everything at the highest matmul precision.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
HIGHEST = jax.lax.Precision.HIGHEST


def load(name):
    """All arrays of tests/data/<name>.npz; the network is load("net1_model")."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def _conv_relu(params, x, layer):
    y = jax.lax.conv_general_dilated(
        x,
        params[f"{layer}_w"],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    return jax.nn.relu(y + params[f"{layer}_b"].reshape(1, 1, 1, -1))


def features(params, x, tap):
    """x [N, 32, 32, 3] (normalised) -> features [N, 16, 16, 32] at tap "A" or "B"."""
    y = _conv_relu(params, x, "conv1")
    y = jax.lax.reduce_window(
        y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    y = _conv_relu(params, y, "conv2")
    return y if tap == "A" else _conv_relu(params, y, "conv3")


def head(params, a, tap):
    """Features [N, 16, 16, 32] at tap "A" or "B" -> logits [N, 10]."""
    if tap == "A":
        a = _conv_relu(params, a, "conv3")
    pooled = jnp.mean(a, axis=(1, 2))
    return jnp.dot(pooled, params["fc_w"], precision=HIGHEST) + params["fc_b"][None]


def logits(params, x):
    """x [N, 32, 32, 3] (normalised) -> logits [N, 10]."""
    return head(params, features(params, x, "B"), "B")
