"""The golden network's images and gradients, for the tests of attribution."""

import jax.numpy as jnp
import numpy as np

from tests import golden_net

PARAMS = golden_net.load("net1_model")
ATTRS = golden_net.load("net1_attrs")
IMAGES = jnp.asarray(PARAMS["inputs"][:2])
CLASSES = PARAMS["classes"][:2]


def assert_close_to_peak(actual, expected, tolerance):
    peak = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * peak)
