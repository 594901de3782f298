"""The embedded set of materials: the texture tells the class, and nothing else does."""

import io

import numpy as np
import pytest
from PIL import Image

from train.data import photos, sources
from train.data.photo_textures import photo_textures_dataset_builder as photo_textures

SPLITS = ("train", "validation", "test")


def decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.fixture(scope="module")
def examples():
    """1000 training examples as (images, masks, labels, photos, boxes)."""
    config = photo_textures.make_config()
    records = [photo_textures.generate_example(config, "train", i) for i in range(1000)]
    return (
        np.stack([decode(e["image"]) for e in records]).astype(np.float32),
        np.stack([decode(e["mask"]) for e in records]) > 0,
        np.array([e["label"] for e in records]),
        np.array([e["photo"] for e in records]),
        np.array([tuple(e["bbox"]) for e in records]),
    )


def nearest_class_accuracy(features, labels):
    """Of the half that did not make the class means, standardised by all."""
    features = (features - features.mean(0)) / features.std(0)
    means = np.stack([features[:500][labels[:500] == c].mean(0) for c in range(8)])
    distances = ((features[500:, None] - means) ** 2).sum(-1)
    return np.mean(distances.argmin(1) == labels[500:])


class TestMakeConfig:
    def test_default_is_the_named_config(self):
        (config,) = photo_textures.Builder.BUILDER_CONFIGS
        assert photo_textures.make_config("independent", image_size=48) is config
        assert (config.num_train, config.num_test) == (10_000, 2_000)

    def test_each_choice_has_its_own_name(self):
        config = photo_textures.make_config(num_train=50, image_size=128)
        assert config.name == "independent_image_size128_num_train50"
        assert (config.num_train, config.image_size) == (50, 128)

    @pytest.mark.parametrize(
        "arguments, options, match",
        [
            (["shortcut"], {}, "photo_textures has no config 'shortcut'.*independent"),
            ([], {"num_val": 3}, "num_val"),
            ([], {"num_train": 0}, "num_train"),
            ([], {"image_size": 16}, "image_size"),
            ([], {"num_test": 2.5}, "integer"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, options, match):
        with pytest.raises(ValueError, match=match):
            photo_textures.make_config(*arguments, **options)


class TestGenerateExample:
    def test_depends_on_seed_split_and_index_only(self):
        config = photo_textures.make_config(seed=3)
        fewer = photo_textures.make_config(seed=3, num_train=10)
        example = photo_textures.generate_example(config, "train", 7)
        assert photo_textures.generate_example(fewer, "train", 7) == example
        for other in (
            photo_textures.generate_example(config, "train", 8),
            photo_textures.generate_example(config, "test", 7),
            photo_textures.generate_example(photo_textures.make_config(), "train", 7),
        ):
            assert other["image"] != example["image"]

    @pytest.mark.parametrize("split", SPLITS)
    def test_fits_larger_images(self, split):
        config = photo_textures.make_config(image_size=128)
        for i in range(5):
            example = photo_textures.generate_example(config, split, i)
            assert decode(example["image"]).shape == (128, 128, 3)
            mask = decode(example["mask"]) > 0
            assert 0.075 < mask.mean() < 0.155

    def test_box_is_the_tight_box_of_the_mask(self, examples):
        _, masks, _, _, boxes = examples
        for mask, box in zip(masks, boxes, strict=True):
            rows, columns = np.nonzero(mask)
            tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            np.testing.assert_allclose(48 * box, tight, atol=1e-6)

    def test_object_takes_8_to_15_percent(self, examples):
        shares = examples[1].mean((1, 2))
        # The edge's pixels count whole or not: a perimeter of 30 to 60 of 2304.
        assert shares.min() > 0.07 and shares.max() < 0.16
        assert 0.11 < shares.mean() < 0.12

    def test_every_class_and_photo_about_as_often(self, examples):
        _, _, labels, photos_, _ = examples
        # 1000 draws of 7 or 8: four standard deviations are 0.042 to 0.044.
        for values, number in ((labels, 8), (photos_, 7)):
            shares = np.bincount(values, minlength=number) / len(values)
            assert abs(shares - 1 / number).max() < 0.045

    def test_only_the_texture_tells_the_class(self, examples):
        """Colour, brightness, contrast, size and photo are near chance, 0.125."""
        images, masks, labels, photos_, _ = examples
        colours = np.stack([i[m].mean(0) for i, m in zip(images, masks, strict=True)])
        contrasts = [i[m].std(0) for i, m in zip(images, masks, strict=True)]
        backgrounds = [i[~m].mean(0) for i, m in zip(images, masks, strict=True)]
        # 500 draws at chance: 0.125 +- three standard deviations of 0.015.
        for values in (colours, backgrounds, np.eye(7)[photos_], masks.mean((1, 2))):
            values = np.reshape(values, (len(labels), -1))
            assert nearest_class_accuracy(np.asarray(values), labels) < 0.17
        # Bright stars and black print are clipped, which costs some contrast.
        assert nearest_class_accuracy(np.stack(contrasts), labels) < 0.25
        # The differences of neighbours, which know the texture, are another matter.
        rough = []
        for image, mask in zip(images.mean(-1), masks, strict=True):
            inside = mask[1:, 1:] & mask[:-1, 1:] & mask[1:, :-1]
            steps = np.abs(np.diff(image, axis=0)[:, 1:])[inside] / image[mask].std()
            rough.append([steps.mean(), np.median(steps)])
        assert nearest_class_accuracy(np.array(rough), labels) > 0.3


class TestSplits:
    def test_materials_are_no_backgrounds(self):
        backgrounds = {name for _, name in photo_textures.PHOTOS}
        assert not backgrounds & {name for name, _ in photo_textures.TEXTURES.values()}

    @pytest.mark.parametrize("split", SPLITS)
    def test_strips_hold_the_largest_patch(self, split, monkeypatch):
        """Else the smallest would show less of a material than training does."""
        crop_square, room = photos.crop_square, []

        def crop(rng, image, side, size):
            if image.mode == "L":  # a material
                room.append(min(image.size) - side)
            return crop_square(rng, image, side, size)

        monkeypatch.setattr(photos, "crop_square", crop)
        for i in range(200):
            photo_textures.generate_example(photo_textures.make_config(), split, i)
        assert len(room) == 600 and min(room) > 0

    def test_pipeline_prepares_it(self, tmp_path):
        sizes = {"num_train": 4, "num_validation": 2, "num_test": 2}
        builder = sources.prepare("photo_textures/independent", tmp_path, **sizes)
        assert sources.num_classes(builder) == 8
        source = sources.open_source(builder, "train")
        assert len(source) == 4
        config = photo_textures.make_config(**sizes)
        expected = photo_textures.generate_example(config, "train", 0)
        found = {e["image"].tobytes() for e in (source[i] for i in range(4))}
        assert decode(expected["image"]).tobytes() in found
        assert source[0]["mask"].max() == 1
