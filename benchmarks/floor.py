"""The least that a bottleneck on a nonlinear head costs; may import jax and optax.

The head and its gradient, once for each step and noise sample, and nothing else: no
mixing, no blur, no optimiser.
"""

import jax
import jax.numpy as jnp
import optax

from ibsgl_jax.convolutions import fast_on_cpu


def make_floor(num_steps: int, num_samples: int):
    """A compiled function of (head_fn, features [N, ...], labels [N])."""

    @jax.jit
    def repeat_head(head_fn, features, labels):
        labels = jnp.tile(labels, num_samples)

        def total_loss(features):
            logits = head_fn(features)
            return jnp.sum(
                optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            )

        gradient_fn = fast_on_cpu(jax.grad(total_loss))
        times = (num_samples, *[1] * (features.ndim - 1))
        copies = jnp.tile(features.astype(jnp.float32), times)
        # Something has to change from step to step, or it is all done once.
        return jax.lax.fori_loop(
            0, num_steps, lambda i, x: x - 1e-3 * gradient_fn(x), copies
        )

    return repeat_head
