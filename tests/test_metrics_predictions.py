"""Measures of predictions, and the mean of any measure over the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import metrics


class TestSumAndCount:
    def test_value_that_does_not_count_is_not_read(self):
        values = np.array([1.0, np.nan, 3.0])
        total, count = metrics.sum_and_count(values, np.array([1, 0, 1]))
        assert (float(total), float(count)) == (4.0, 2.0)

    def test_padding_of_a_ragged_batch(self):
        values = np.array([1.0, 2.0, 4.0])
        whole = metrics.sum_and_count(values)
        first = metrics.sum_and_count(values[:2])
        padded = np.array([4.0, 9.0])
        last = metrics.sum_and_count(padded, np.array([True, False]))
        assert [float(a + b) for a, b in zip(first, last, strict=True)] == [
            float(x) for x in whole
        ]

    def test_nothing_counts(self):
        total, count = metrics.sum_and_count(np.full(2, np.nan), np.zeros(2))
        assert (float(total), float(count)) == (0.0, 0.0)


class TestPredictions:
    LOGITS = np.log(np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]))
    LABELS = np.array([0, 0, 1])

    def test_by_hand(self):
        got = metrics.probability(self.LOGITS, self.LABELS)
        np.testing.assert_allclose(got, [0.7, 0.4, 0.5], rtol=1e-6)
        nll = metrics.nll(self.LOGITS, self.LABELS)
        np.testing.assert_allclose(nll, -np.log([0.7, 0.4, 0.5]), rtol=1e-6)
        accuracy = metrics.accuracy(self.LOGITS, self.LABELS)
        np.testing.assert_array_equal(accuracy, [1, 0, 0])

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint32])
    def test_labels_of_any_integers_and_of_bools(self, dtype):
        logits, labels = jnp.eye(3)[jnp.array([0, 2])] - 0.5, jnp.array([0, 1], dtype)
        assert metrics.accuracy(logits, labels).tolist() == [1, 0]
        assert metrics.calibration_bins(logits, labels).correct.sum() == 1
        there = jax.nn.one_hot(labels, 3, dtype=bool)
        assert metrics.accuracy(logits, there).tolist() == [1, 0]
        got = metrics.label_accuracy(logits, there)
        assert got.tolist() == pytest.approx([1, 1 / 3])

    def test_nan_row_is_wrong(self):
        logits = np.array([[np.nan, 0.0]])
        np.testing.assert_array_equal(metrics.accuracy(logits, np.array([0])), 0)

    def test_large_logits(self):
        logits = np.array([[1e4, 0.0], [-1e4, 0.0]])
        got = metrics.nll(logits, np.array([0, 0]))
        np.testing.assert_allclose(got, [0.0, 1e4])


class TestCalibration:
    # Confidences .9 .9 .6 in two bins of the upper half with num_bins = 4:
    # bin 3 (.75-1): |1 - 1.8| right 1 of 2; bin 2: right 1, confidence .6.
    LOGITS = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
    LABELS = np.array([0, 1, 1])
    ERROR = (0.8 + 0.4) / 3

    def test_by_hand(self):
        bins = metrics.calibration_bins(self.LOGITS, self.LABELS, num_bins=4)
        np.testing.assert_array_equal(bins.count, [0, 0, 1, 2])
        error = metrics.calibration_error(bins)
        np.testing.assert_allclose(error, self.ERROR, rtol=1e-6)

    def test_batches_add_up(self):
        first = metrics.calibration_bins(self.LOGITS[:2], self.LABELS[:2], num_bins=4)
        last = metrics.calibration_bins(
            self.LOGITS[np.array([2, 0])],
            self.LABELS[np.array([2, 0])],
            mask=np.array([True, False]),
            num_bins=4,
        )
        error = metrics.calibration_error(jax.tree.map(jnp.add, first, last))
        np.testing.assert_allclose(error, self.ERROR, rtol=1e-6)

    def test_certain_and_nan(self):
        logits = np.array([[1e4, 0.0], [np.nan, 0.0]])
        bins = metrics.calibration_bins(logits, np.array([0, 0]))
        np.testing.assert_array_equal(bins.count, np.eye(15)[14])
        assert metrics.calibration_error(bins) == 0

    def test_no_example(self):
        bins = metrics.calibration_bins(
            self.LOGITS, self.LABELS, mask=np.zeros(3, bool)
        )
        assert metrics.calibration_error(bins) == 0


class TestMeanAndInterval:
    def test_normal_values(self):
        # Mean of 400 standard normals: standard error 1/20, 95 % within 1.96 of it.
        values = np.random.default_rng(3).normal(size=400)
        mean, low, high = metrics.mean_and_interval(values)
        error = values.std() / 20
        assert mean == values.mean()
        # A quantile of 1000 resamples is itself uncertain by about 6 % of the width.
        np.testing.assert_allclose([mean - low, high - mean], 1.96 * error, rtol=0.15)

    def test_seed_fixes_the_interval(self):
        values = np.arange(10.0)
        again = metrics.mean_and_interval(values, seed=1)
        assert again == metrics.mean_and_interval(values, seed=1)
        assert again != metrics.mean_and_interval(values, seed=2)

    def test_level_widens(self):
        narrow = metrics.mean_and_interval(np.arange(10.0), level=0.5)
        wide = metrics.mean_and_interval(np.arange(10.0), level=0.99)
        assert wide.low < narrow.low < narrow.high < wide.high

    def test_counts(self):
        got = metrics.mean_and_interval([1.0, np.nan, 3.0], [1, 0, 1])
        assert got.mean == 2.0
        assert metrics.mean_and_interval([5.0]) == (5.0, 5.0, 5.0)
        assert np.isnan(metrics.mean_and_interval([])).all()
        assert np.isnan(metrics.mean_and_interval([1.0, np.nan])).all()

    def test_level_range(self):
        with pytest.raises(ValueError, match="level"):
            metrics.mean_and_interval([1.0], level=95)
