"""The embedded data set: honest splits, tight boxes, the shortcut where it belongs."""

import io

import numpy as np
import pytest
from PIL import Image

from train.data.photo_digits import photo_digits_dataset_builder as photo_digits

SPLITS = ("train", "validation", "test")


def decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def photo_labels(background, split, num=1000):
    config = photo_digits.make_config(background)
    examples = [photo_digits.generate_example(config, split, i) for i in range(num)]
    return np.array([(e["photo"], e["label"]) for e in examples]).T


class TestMakeConfig:
    def test_defaults_are_the_named_configs(self):
        for config in photo_digits.Builder.BUILDER_CONFIGS:
            assert photo_digits.make_config(config.name, image_size=48) is config
            assert (config.num_train, config.num_test) == (10_000, 2_000)

    def test_each_choice_has_its_own_name(self):
        names = [
            photo_digits.make_config(background, **options).name
            for background in ("independent", "shortcut")
            for options in ({}, {"num_train": 50}, {"num_test": 50}, {"seed": 1})
        ]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        "arguments, options, match",
        [
            (["random"], {}, "independent"),
            ([], {"num_val": 3}, "num_val"),
            ([], {"num_train": 0}, "num_train"),
            ([], {"image_size": 16}, "image_size"),
            ([], {"num_test": 2.5}, "integer"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, options, match):
        with pytest.raises(ValueError, match=match):
            photo_digits.make_config(*arguments, **options)


class TestGenerateExample:
    def test_depends_on_seed_split_and_index_only(self):
        config = photo_digits.make_config(seed=3)
        fewer = photo_digits.make_config(seed=3, num_train=10)
        example = photo_digits.generate_example(config, "train", 7)
        assert photo_digits.generate_example(fewer, "train", 7) == example
        for other in (
            photo_digits.generate_example(config, "train", 8),
            photo_digits.generate_example(config, "test", 7),
            photo_digits.generate_example(photo_digits.make_config(), "train", 7),
        ):
            assert other["image"] != example["image"]

    @pytest.mark.parametrize("size", [48, 64])
    def test_box_is_the_tight_box_of_the_mask(self, size):
        config = photo_digits.make_config(image_size=size)
        for i in range(50):
            example = photo_digits.generate_example(config, "train", i)
            mask = decode(example["mask"])
            assert decode(example["image"]).shape == (size, size, 3)
            assert set(np.unique(mask)) == {0, 255}
            rows, columns = np.nonzero(mask)
            box = example["bbox"]
            assert (rows.min(), rows.max() + 1) == (
                round(box.ymin * size),
                round(box.ymax * size),
            )
            assert (columns.min(), columns.max() + 1) == (
                round(box.xmin * size),
                round(box.xmax * size),
            )
            # About 14 to 30 pixels of 48; the mask's threshold may take or give one.
            assert 12 * size / 48 <= np.ptp(rows) + 1 <= 32 * size / 48

    def test_digit_is_visible(self):
        """The mask's mean brightness is away from that of a frame around the box."""
        config = photo_digits.make_config()
        differences = []
        for i in range(100):
            example = photo_digits.generate_example(config, "test", i)
            image = decode(example["image"]).mean(-1)
            mask = decode(example["mask"]) > 0
            differences.append(abs(image[mask].mean() - image[~mask].mean()))
        # Drawn 90 to 200 levels away; a background that varies takes some of it.
        assert np.median(differences) > 60

    def test_shortcut_only_in_train(self):
        # 1000 draws: three standard deviations are 0.028.
        photo, label = photo_labels("shortcut", "train")
        assert abs(np.mean(photo == label) - 0.9) < 0.03
        wrong = np.bincount(photo[photo != label], minlength=10)
        assert wrong.min() > 0
        for background, split in (
            ("shortcut", "validation"),
            ("shortcut", "test"),
            ("independent", "train"),
        ):
            photo, label = photo_labels(background, split)
            assert abs(np.mean(photo == label) - 0.1) < 0.03
            assert np.bincount(photo, minlength=10).min() > 60
            assert np.bincount(label, minlength=10).min() > 60

    def test_stays_what_it_was(self):
        """Prepared data and published results stay valid: the first examples' pixels.

        The tolerance, in levels of 255, is for other builds of the JPEG decoder.
        """
        config = photo_digits.make_config("shortcut")
        for split, label, photo, digit, *means in (
            ("train", 8, 8, 1185, 123.83, 114.22, 84.06),
            ("validation", 5, 8, 1787, 222.57, 232.23, 243.06),
            ("test", 9, 0, 1096, 149.85, 142.43, 130.48),
        ):
            example = photo_digits.generate_example(config, split, 0)
            found = [example[name] for name in ("label", "photo", "digit")]
            assert found == [label, photo, digit]
            image = decode(example["image"])
            np.testing.assert_allclose(image.mean((0, 1)), means, atol=0.2)


class TestSplits:
    def test_share_no_digit(self):
        rows = {s: np.concatenate(photo_digits.digit_indices(0, s)) for s in SPLITS}
        together = np.concatenate(list(rows.values()))
        assert sorted(together) == list(range(1797))  # all of load_digits, once each
        labels = photo_digits.open_digits()[1]
        for split in SPLITS:
            for i in range(100):
                example = photo_digits.generate_example(
                    photo_digits.make_config(), split, i
                )
                assert example["digit"] in rows[split]
                assert labels[example["digit"]] == example["label"]
