"""Counts of (class, answer), rows of classes, and what is chance."""

import numpy as np
import pytest

from train.measure.classes import balanced, class_rows, confusion, majority, worst


def test_confusion_by_hand():
    matrix = confusion([0, 0, 1, 2, 2, 2], np.array([0.0, 1, 1, 0, 0, 2]), 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0] * 4]


def test_majority_is_the_share_of_the_most_frequent():
    assert majority([3, 1, 3, 3], "abcd") == {"name": "d", "share": 0.75}


def test_worst_is_the_lowest_mean_of_a_class_that_occurs():
    assert worst([0, 0, 3, 3, 3], np.array([1.0, 1, 1, 0, 0])) == 1 / 3
    assert worst([2, 2], np.array([1.0, 1.0])) == 1.0


def test_balanced_accuracy_counts_every_class_alike():
    correct = np.array([1.0, 1, 1, 0, 0])
    assert balanced([0, 0, 3, 3, 3], correct) == pytest.approx((1 + 1 / 3) / 2)
    assert balanced([1, 1, 1, 1, 1], correct) == pytest.approx(0.6)


def test_rows_are_means_of_a_class():
    values = {
        "a/label": np.array([0, 2, 2, 2]),
        "a/predicted": np.array([0.0, 1, 1, 2]),
        "a/accuracy": np.array([1.0, 0, 0, 1]),
        "a/box_share": np.array([np.nan, 0.2, np.nan, 0.4]),
        "b/predicted": np.array([1.0, 2, 2, 2]),
        "b/accuracy": np.array([0.0, 1, 1, 1]),
    }
    first, last = class_rows(values, ["a", "b"], 3)
    assert first["class"] == 0 and first["n"] == 1
    assert first["box_share"] == {"a": None}
    assert first["taken_for"] == {"a": None, "b": 1}
    assert last["n"] == 3 and last["accuracy"] == {"a": 1 / 3, "b": 1.0}
    np.testing.assert_allclose(last["box_share"]["a"], 0.3)
    assert last["taken_for"] == {"a": 1, "b": None}
