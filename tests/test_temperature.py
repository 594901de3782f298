"""One temperature for the logits: what it finds, and what it leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import metrics
from train.measure import statistics, temperature


def drawn_labels(logits, seed=0):
    """Labels that follow the logits' own probabilities."""
    draw = np.random.default_rng(seed)
    return np.argmax(logits + draw.gumbel(size=logits.shape), axis=1)


class TestFit:
    @pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
    def test_undoes_what_the_logits_were_multiplied_by(self, factor):
        logits = np.random.default_rng(1).normal(0, 2, (20_000, 5))
        labels = drawn_labels(logits)
        found = temperature.fit(factor * logits, labels)
        np.testing.assert_allclose(found, factor, rtol=0.05)

    def test_is_the_best_of_a_grid(self):
        draw = np.random.default_rng(2)
        logits, labels = draw.normal(0, 4, (300, 6)), draw.integers(0, 6, 300)
        labels = np.where(draw.random(300) < 0.6, logits.argmax(1), labels)
        found = temperature.fit(logits, labels)
        best = temperature.nll(logits, labels, found).mean()
        for other in np.geomspace(0.1, 10, 60):
            assert best <= temperature.nll(logits, labels, other).mean() + 1e-6

    def test_stays_within_its_bounds_where_all_are_right(self):
        logits = 0.5 * np.eye(4)[np.arange(40) % 4]
        found = temperature.fit(logits, np.arange(40) % 4)
        np.testing.assert_allclose(found, temperature.LOWEST, rtol=0.05)

    def test_logits_that_are_not_finite_are_left_out(self):
        logits = np.random.default_rng(1).normal(0, 2, (200, 5))
        labels = drawn_labels(logits)
        bad = np.concatenate([np.full((1, 5), np.nan), logits])
        found = temperature.fit(bad, np.concatenate([[0], labels]))
        np.testing.assert_allclose(found, temperature.fit(logits, labels))
        assert np.isnan(temperature.fit(bad[:1], labels[:1]))
        values = temperature.scaled_values(bad[:1], labels[:1], float("nan"))
        assert all(np.isnan(value).all() for value in values.values())


class TestScaledValues:
    def test_at_one_they_are_those_of_the_logits(self):
        draw = np.random.default_rng(3)
        logits = draw.normal(0, 3, (200, 7)).astype(np.float32)
        labels = draw.integers(0, 7, 200)
        found = temperature.scaled_values(logits, labels, 1.0)
        expected = metrics.nll(jnp.asarray(logits), jnp.asarray(labels))
        np.testing.assert_allclose(found["nll_scaled"], expected, rtol=1e-4, atol=1e-5)
        highest = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
        np.testing.assert_allclose(found["confidence_scaled"], highest, rtol=1e-5)

    def test_a_network_that_is_too_sure_is_mended(self):
        logits = np.random.default_rng(4).normal(0, 1, (5_000, 4))
        labels = drawn_labels(logits)
        correct = logits.argmax(1) == labels
        error, likelihood = [], []
        for divisor in (1.0, temperature.fit(4 * logits, labels)):
            found = temperature.scaled_values(4 * logits, labels, divisor)
            error.append(
                statistics.calibration_error(found["confidence_scaled"], correct)
            )
            likelihood.append(found["nll_scaled"].mean())
        assert error[1] < 0.2 * error[0] and likelihood[1] < likelihood[0]
        assert found["temperature"].shape == (5_000,)
