"""The set of cues: told in training only, beside the digit or in its colour."""

import io

import numpy as np
import pytest
from PIL import Image

from train.data import sources
from train.data.photo_digits import photo_digits_dataset_builder as photo_digits
from train.data.shortcut_digits import shortcut_digits_dataset_builder as shortcut

SPLITS = ("train", "validation", "test")


def decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def examples(name, split, num=300):
    config = shortcut.make_config(name)
    return [shortcut.generate_example(config, split, i) for i in range(num)]


def test_each_choice_has_its_own_name():
    names = [c.name for c in shortcut.Builder.BUILDER_CONFIGS]
    assert names == ["decoy", "decoy_balanced", "coloured", "coloured_balanced"]
    assert shortcut.make_config("decoy", num_train=9).name == "decoy_num_train9"
    with pytest.raises(ValueError, match="decoy"):
        shortcut.make_config("independent")


@pytest.mark.parametrize("name", ["decoy", "coloured"])
def test_depends_on_seed_split_and_index_only(name):
    config = shortcut.make_config(name, seed=3)
    fewer = shortcut.make_config(name, seed=3, num_train=10)
    example = shortcut.generate_example(config, "train", 7)
    assert shortcut.generate_example(fewer, "train", 7) == example
    for other in (
        shortcut.generate_example(config, "train", 8),
        shortcut.generate_example(config, "test", 7),
        shortcut.generate_example(shortcut.make_config(name), "train", 7),
    ):
        assert other["image"] != example["image"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["decoy", "coloured"])
def test_the_cue_tells_the_class_in_training_only(name, split):
    cue, label = np.array([(e["cue"], e["label"]) for e in examples(name, split)]).T
    assert set(label) == set(range(10))
    if split == "train":
        np.testing.assert_array_equal(cue, label)
    elif name == "coloured":
        np.testing.assert_array_equal(cue, 9 - label)
    else:
        assert abs(np.mean(cue == label) - 0.1) < 0.06  # three standard deviations
        assert set(cue) == set(range(10))


@pytest.mark.parametrize("name", ["decoy_balanced", "coloured_balanced"])
def test_a_balanced_cue_tells_nothing(name):
    cue, label = np.array([(e["cue"], e["label"]) for e in examples(name, "train")]).T
    assert abs(np.mean(cue == label) - 0.1) < 0.06


def test_balanced_images_are_the_same_but_for_the_cue():
    config, balanced = map(shortcut.make_config, ("coloured", "coloured_balanced"))
    for i in range(20):
        one = shortcut.generate_example(config, "train", i)
        two = shortcut.generate_example(balanced, "train", i)
        assert (one["label"], one["digit"], one["mask"]) == (
            two["label"],
            two["digit"],
            two["mask"],
        )


@pytest.mark.parametrize("size", [32, 64])
def test_the_decoy_stands_in_a_corner_outside_of_the_mask(size):
    config = shortcut.make_config("decoy_balanced", image_size=size)
    side, corners = size // 8, set()
    for i in range(60):
        example = shortcut.generate_example(config, "test", i)
        image, mask = decode(example["image"]), decode(example["mask"]) > 0
        grey = 255 - 25 * example["cue"]
        found = [
            (rows, columns)
            for rows in (slice(0, side), slice(-side, None))
            for columns in (slice(0, side), slice(-side, None))
            if (image[rows, columns] > 0).all()
        ]
        assert len(found) == 1
        corners.add(str(found[0]))
        assert (image[found[0]] == grey).all() and not mask[found[0]].any()
        image = image.copy()
        image[found[0]] = 0
        assert image[mask].max() == 255  # the digit
        assert image[~mask].max() <= 128  # its soft edges
        # A box, all of it.
        rows, columns = np.nonzero(mask)
        assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert len(corners) == 4


def test_the_colour_is_the_hue_of_the_cue():
    hues = {}
    for example in examples("coloured", "test", 60):
        image = decode(example["image"])
        hues.setdefault(example["cue"], set()).add(tuple(image.max((0, 1)).tolist()))
    assert len(hues) == 10 and all(len(colours) == 1 for colours in hues.values())
    assert len(set.union(*hues.values())) == 10


def test_splits_share_no_digit():
    labels = photo_digits.open_digits()[1]
    rows = {s: {e["digit"] for e in examples("decoy", s)} for s in SPLITS}
    assert not rows["train"] & rows["test"] and not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    for example in examples("decoy", "test", 30):
        assert labels[example["digit"]] == example["label"]


def test_pipeline_prepares_it(tmp_path):
    sizes = {"num_train": 4, "num_validation": 2, "num_test": 2}
    builder = sources.prepare("shortcut_digits/decoy", tmp_path, **sizes)
    source = sources.open_source(builder, "train")
    assert len(source) == 4 and sources.num_classes(builder) == 10
    assert set(source[0]) == {"image", "label", "bbox", "mask"}
