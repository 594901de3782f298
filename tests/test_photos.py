"""What the embedded data sets share: strips that no two splits share, tight boxes."""

import io

import numpy as np
import pytest
from PIL import Image

from train.data import photos
from train.data.photo_digits import photo_digits_dataset_builder as photo_digits
from train.data.photo_textures import photo_textures_dataset_builder as photo_textures

SPLITS = ("train", "validation", "test")
PICTURES = sorted(
    {*photo_digits.PHOTOS, *photo_textures.PHOTOS}
    | {("skimage.data", name) for name, _ in photo_textures.TEXTURES.values()}
)


class TestStrips:
    @pytest.mark.parametrize("picture", PICTURES)
    def test_make_up_the_picture(self, picture):
        strips = [photos.open_strip(*picture, split) for split in SPLITS]
        whole = np.concatenate([np.asarray(strip) for strip, _ in strips], axis=1)
        assert all(whole.shape[1] == width for _, width in strips)
        assert whole.std() > 10  # a picture, not a blank

    @pytest.mark.parametrize("dataset", [photo_digits, photo_textures])
    @pytest.mark.parametrize("split", SPLITS)
    def test_a_split_opens_its_own_only(self, dataset, split, monkeypatch):
        opened = []
        draw = photos.open_strip

        def open_strip(package, name, of):
            opened.append(of)
            return draw(package, name, of)

        monkeypatch.setattr(photos, "open_strip", open_strip)
        for i in range(10):
            dataset.generate_example(dataset.make_config(), split, i)
        assert len(opened) >= 10 and set(opened) == {split}

    def test_tile_the_width(self):
        for size in ((451, 300), (1000, 872)):
            boxes = [photos.strip_box(size, s) for s in SPLITS]
            assert boxes[0][0] == 0 and boxes[-1][2] == size[0]
            assert boxes[0][2] == boxes[1][0] and boxes[1][2] == boxes[2][0]


class TestEncodeExample:
    def test_mask_is_more_than_half_opaque_and_the_box_is_tight(self):
        alpha = np.zeros((40, 40), np.float32)
        alpha[4:12, 10:30] = 1
        alpha[3:13, 9:31] += 0.4  # the soft edge is no part of the object
        image = np.full((40, 40, 3), 7, np.uint8)
        example = photos.encode_example(image, alpha, label=3)
        mask = np.asarray(Image.open(io.BytesIO(example["mask"])))
        np.testing.assert_array_equal(mask, 255 * (alpha > 0.5))
        assert example["bbox"] == (4 / 40, 10 / 40, 12 / 40, 30 / 40)
        assert example["label"] == 3
        decoded = np.asarray(Image.open(io.BytesIO(example["image"])))
        np.testing.assert_array_equal(decoded, image)
