"""Pictures read small and once, whatever their format; boxes and masks follow."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.pictures import draw, fill, map_all, names_of, save
from train.data import batches as batching
from train.data import decoded, folders


@pytest.fixture
def open_(tmp_path):
    """open_folder with a cache of its own, at 16 pixels."""

    def call(folder, **options):
        options = {"image_size": 16, "cache_dir": tmp_path / "cache", **options}
        return folders.open_folder(folder, **options)

    return call


class TestReading:
    def test_every_kind_of_picture(self, tmp_path):
        """All modes give the same soft picture, upright and in 8 bits."""
        size = (64, 48)
        wanted = np.asarray(draw(1, size), np.float32)
        grey = draw(1, size, "L")
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        alpha = draw(1, size).convert("RGBA")
        few = draw(1, size).quantize(256)
        turned = draw(1, size).transpose(Image.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        cases = {
            "rgb.png": (draw(1, size), wanted),
            "cmyk.jpg": (draw(1, size).convert("CMYK"), wanted),
            "palette.png": (few, np.asarray(few.convert("RGB"), np.float32)),
            "alpha.png": (alpha, wanted),
            "grey.jpg": (grey, np.asarray(grey.convert("RGB"), np.float32)),
            "deep.png": (deep, np.asarray(grey.convert("RGB"), np.float32)),
            "la.png": (grey.convert("LA"), np.asarray(grey.convert("RGB"), np.float32)),
            "turned.jpg": (turned, wanted),
        }
        reader = decoded.Reader(side=48, folder=tmp_path / "cache")
        for name, (picture, pixels) in cases.items():
            options = {"quality": 95} if name.endswith("jpg") else {}
            if name == "turned.jpg":
                options["exif"] = exif
            picture.save(tmp_path / name, **options)
            assert decoded.upright_size(tmp_path / name) == size
            assert reader.prepare(tmp_path / name).size == size
            found = reader.read(tmp_path / name, place=reader.place(tmp_path / name))
            assert found.shape == (48, 64, 3) and found.dtype == np.uint8, name
            assert np.abs(found - pixels).mean() < 6, name

    def test_jpeg_is_decoded_at_a_reduced_scale(self, tmp_path):
        draw(1, (1600, 1200)).save(tmp_path / "a.jpg", quality=95)
        image, full = decoded.read_small(tmp_path / "a.jpg", 100)
        assert full == (1600, 1200) and image.size == (200, 150)
        small = decoded.reduce(image, None, side=50, fit="crop")
        whole = draw(1, (1600, 1200)).resize((67, 50), Image.BICUBIC)
        assert np.abs(small - np.asarray(whole, np.float32)).mean() < 3

    def test_boxes_and_masks_follow_a_long_picture(self):
        """Of 10:1 the middle 3:1 is kept; what is marked stays where it is drawn."""
        array = np.zeros((20, 200, 3), np.uint8)
        array[5:15, 90:110] = 255
        mask = array[..., 0] > 0
        pixels = decoded.reduce(Image.fromarray(array), mask, side=10, fit="crop")
        assert pixels.shape == (10, 30, 4)
        box = decoded.move_box((0.25, 0.45, 0.75, 0.55), (200, 20), "crop")
        np.testing.assert_allclose(box, (0.25, 1 / 3, 0.75, 2 / 3), atol=1e-6)
        inside = pixels[..., 3] > 0
        np.testing.assert_array_equal(inside[3:7, 11:19], True)
        assert (pixels[..., 0] > 127)[inside].mean() > 0.7
        squashed = decoded.move_box((0.25, 0.45, 0.75, 0.55), (200, 20), "squash")
        np.testing.assert_allclose(squashed, (0.25, 0.45, 0.75, 0.55), atol=1e-6)

    def test_a_tiny_object_does_not_vanish(self):
        mask = np.zeros((100, 100), bool)
        mask[50, 50] = True
        picture = Image.fromarray(np.zeros((100, 100, 3), np.uint8))
        assert decoded.reduce(picture, mask, side=10, fit="crop")[..., 3].sum() == 1

    @pytest.mark.parametrize("kind", ["0/1", "0/255", "palette", "alpha", "jpeg"])
    def test_masks(self, tmp_path, kind):
        wanted = np.zeros((16, 24), bool)
        wanted[:, 8:16] = True
        values = wanted.astype(np.uint8)
        path = tmp_path / ("mask.jpg" if kind == "jpeg" else "mask.png")
        if kind == "palette":
            image = Image.fromarray(values).convert("P")
            image.putpalette([0, 0, 0, 0, 0, 0])
        elif kind == "alpha":
            image = Image.merge("LA", [Image.new("L", (24, 16), 9)] * 2)
            image.putalpha(Image.fromarray(values * 255))
        else:
            image = Image.fromarray(values * (1 if kind == "0/1" else 255))
        image.save(path)
        np.testing.assert_array_equal(decoded.read_mask(path), wanted)

    def test_the_cache_is_used_and_renewed(self, tmp_path, open_, monkeypatch):
        folder = fill(tmp_path / "photos")
        first = open_(folder)
        images = [e["image"] for e in map_all(first.train)]
        with monkeypatch.context() as patch:
            patch.setattr(decoded, "read_small", None)  # not called
            again = open_(folder)
            for image, example in zip(images, map_all(again.train), strict=True):
                np.testing.assert_array_equal(image, example["image"])
        name = names_of(first, "train")[0]
        save(folder / name, 12345)
        changed = {row[0] for row in open_(folder).rows if row not in first.rows}
        assert changed <= {name}
        reader = decoded.Reader(side=18, folder=tmp_path / "cache")
        place = reader.place(folder / name)
        fresh = reader.read(folder / name, place=place)
        place.with_suffix(".npy").write_bytes(b"damaged")
        np.testing.assert_array_equal(reader.read(folder / name, place=place), fresh)

    def test_two_processes_share_a_cache(self, tmp_path):
        folder = fill(tmp_path / "photos", number=20)
        code = (
            "import sys; from train.data import folders; "
            "_, folder, cache = sys.argv; "
            "data = folders.open_folder(folder, image_size=16, cache_dir=cache); "
            "train = [data.train[i] for i in range(len(data.train))]; "
            "print(sum(int(example['image'].sum()) for example in train))"
        )
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        outputs = [run.communicate()[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0]
        assert outputs[0] == outputs[1] and int(outputs[0]) > 0
        assert not list((tmp_path / "cache").rglob("*.tmp"))

    def test_batches(self, tmp_path, open_):
        data = open_(fill(tmp_path / "photos"))
        sent = pickle.loads(pickle.dumps(data.train))  # to grain's workers
        np.testing.assert_array_equal(sent[1]["image"], data.train[1]["image"])
        batches = batching.make_train_dataset(
            data.train, batch_size=4, seed=0, augment="imagenet", image_size=16
        )
        batch = next(iter(batching.iterate(batches)))
        assert batch["image"].shape == (4, 16, 16, 3)
        evaluation = batching.make_eval_batches(
            data.test, batch_size=4, transform="resize_center", image_size=16
        )
        real = sum(b["example_mask"].sum() for b in batching.iterate(evaluation))
        assert real == len(data.test)
