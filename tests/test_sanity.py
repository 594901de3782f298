"""What is said of a classifier before its maps are looked at."""

import numpy as np
import pytest

from train.show import sanity

NAMES = ("sound", "cracked")


def examine(labels, predicted, num_classes=2, blank=None):
    blank = np.zeros(len(labels)) if blank is None else blank
    return sanity.examine(labels, predicted, blank, num_classes)


def test_counted_by_hand():
    found = examine([0, 0, 0, 1], [0, 0, 1, 1], blank=[1, 0, 0, 0])
    assert found["confusion"] == [[2, 1], [0, 1]]
    assert found["accuracy"] == 0.75 and found["majority"] == 0.75
    assert found["recall"] == [pytest.approx(2 / 3), 1.0]
    assert found["balanced_accuracy"] == pytest.approx(5 / 6)
    assert found["blank"] == 0.25 and found["chance"] == 0.5
    # 1.96 sqrt(.75 * .25 / 4)
    assert found["margin"] == pytest.approx(0.42435, abs=1e-5)


def test_one_who_always_says_the_frequent_class_is_at_chance():
    found = examine([0] * 90 + [1] * 10, [0] * 100)
    assert found["accuracy"] == 0.9 and found["verdict"] == "chance"
    told = sanity.sentence("plain", found, NAMES)
    assert "no better than one who has not looked" in told
    assert "90.0%" in told and "50.0%" in told


def test_a_class_that_is_missed_makes_it_weak():
    found = examine([0] * 50 + [1] * 50, [0] * 50 + [0] * 40 + [1] * 10)
    assert found["verdict"] == "weak"
    assert "of class cracked 20% are found" in sanity.sentence("plain", found, NAMES)


def test_few_pictures_show_little():
    assert examine([0, 0, 1, 1], [0, 1, 1, 1])["verdict"] == "weak"
    labels = np.arange(400) % 2
    predicted = np.where(np.arange(400) % 4 == 0, 1 - labels, labels)
    assert examine(labels, predicted)["verdict"] == "ok"  # the same share, surely


def test_a_good_one_is_not_commented_on():
    labels = [0, 1] * 50
    found = examine(labels, labels)
    assert found["verdict"] == "ok"
    assert sanity.sentence("plain", found, NAMES) == ""
    blank = examine(labels, labels, blank=[1, 0] * 50)
    assert "50% of the maps of plain are blank" in sanity.sentence(
        "plain", blank, NAMES
    )


def test_a_class_that_does_not_occur():
    found = examine([0, 0, 2, 2], [0, 0, 2, 2], num_classes=3)
    assert np.isnan(found["recall"][1]) and found["balanced_accuracy"] == 1.0
    table = sanity.confusion_table("plain", found, ("a", "b", "c"))
    assert "| a | 2 | 0 | 0 | 100.0% |" in table and "\n| b |" not in table


def test_many_classes_are_cut_to_the_worst():
    labels = np.arange(40) % 20
    predicted = np.where(labels == 7, 3, labels)
    names = [f"class {c}" for c in range(20)]
    table = sanity.confusion_table("plain", examine(labels, predicted, 20), names)
    assert len(table.splitlines()) == 2 + sanity.SHOWN
    assert "| class 7 | 0.0% | class 3 (2) |" in table.splitlines()[2]
