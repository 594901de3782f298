"""The classifier that the command explains."""

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import models
from ibsgl_jax.app import classifier


class TestOneLogit:
    """A head with one logit is a sigmoid: two classes that follow the head's sign."""

    def heads(self):
        kernel = jax.random.normal(jax.random.key(0), (5, 1))
        pooled = models.PooledLinear(kernel, jnp.array([0.3]))
        return pooled, jax.tree_util.Partial(lambda p, x: p(x), pooled), pooled.__call__

    def test_probabilities_are_the_sigmoid(self):
        features = jax.random.normal(jax.random.key(1), (4, 3, 3, 5))
        for head_fn in self.heads():
            logits = classifier.two_classes(head_fn)(features)
            assert logits.shape == (4, 2)
            expected = jax.nn.sigmoid(head_fn(features)[:, 0])
            np.testing.assert_allclose(
                jax.nn.softmax(logits)[:, 1], expected, rtol=1e-5
            )
        flat = classifier.two_classes(lambda x: head_fn(x)[:, 0])(features)
        np.testing.assert_allclose(flat, logits, rtol=1e-6)

    def test_a_pooled_linear_head_stays_one(self):
        pooled, *_ = self.heads()
        two = classifier.two_classes(pooled)
        assert isinstance(two, models.PooledLinear) and two.kernel.shape == (5, 2)

    def test_the_classes_change_places_with_the_heads_sign(self):
        pooled, *_ = self.heads()
        two = classifier.two_classes(pooled)
        negated = classifier.two_classes(
            models.PooledLinear(-pooled.kernel, -pooled.bias)
        )
        np.testing.assert_array_equal(two.kernel[:, ::-1], negated.kernel)

    def test_names(self):
        assert classifier._two_names(["class 0"]) == ["not class 0", "class 0"]
        assert classifier._two_names(["a", "b"]) == ["a", "b"]
