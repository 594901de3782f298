"""The README's Python snippets run as they stand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ibsgl_jax import feature_stats

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


class TestSnippets:
    @pytest.mark.parametrize("index", range(len(SNIPPETS)))
    def test_runs(self, index):
        exec(compile(SNIPPETS[index], f"README.md, snippet {index}", "exec"), {})

    def test_own_loop_gives_finite_gradients(self):
        scope = {}
        exec(next(s for s in SNIPPETS if "def task_and_guidance" in s), scope)
        keys = jax.random.split(jax.random.key(0), 4)
        params = {
            "conv": jax.random.normal(keys[0], (3, 6)),
            "head": jax.random.normal(keys[1], (6, 4)),
        }

        def loss_fn(params):
            return scope["task_and_guidance"](
                params,
                feature_stats.init((5, 5, 6)),
                keys[2],
                jax.random.normal(keys[3], (8, 5, 5, 3)),
                jnp.arange(8) % 4,
                lambda p, x: jax.nn.relu(x @ p["conv"]),
                lambda p, a: jnp.mean(a, axis=(1, 2)) @ p["head"],
            )

        gradient, stats = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient))
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
        assert stats.count == 8
