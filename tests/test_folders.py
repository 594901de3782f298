"""A user's own pictures: every layout, every fault, and what a source gives."""

import csv
import io
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from train.data import (
    decoded,
    folders,
    given,
    labels_csv,
    layouts,
    pipeline,
    similar,
    splitting,
)
from train.data.pipeline import DatasetError

SIZE = (40, 32)  # width, height


def draw(seed, size=SIZE, mode="RGB", blobs=(6, 7)):
    """A picture of soft blobs that no other seed makes."""
    values = np.random.default_rng(seed).integers(0, 256, (*blobs, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.BICUBIC).convert(mode)


def save(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(seed, **options).save(path)
    return path


def fill(folder, classes=("cat", "dog"), number=8, first=0, suffix=".png"):
    for c, label in enumerate(classes):
        for i in range(number):
            save(folder / label / f"{i}{suffix}", first + 100 * c + i)
    return folder


def write_csv(folder, header, rows):
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


@pytest.fixture
def open_(tmp_path):
    """open_folder with a cache of its own, at 16 pixels."""

    def call(folder, **options):
        options = {"image_size": 16, "cache_dir": tmp_path / "cache", **options}
        return folders.open_folder(folder, **options)

    return call


@pytest.fixture
def refused(open_):
    """The lines of the error that a folder makes."""

    def call(folder, **options):
        with pytest.raises(DatasetError) as caught:
            open_(folder, **options)
        return [line.strip() for line in str(caught.value).splitlines()]

    return call


def names_of(data, split):
    return sorted(row[0] for row in data.rows if row[3] == split)


class TestLayouts:
    def test_class_folders(self, tmp_path, open_):
        data = open_(fill(tmp_path / "photos"))
        assert data.class_names == ("cat", "dog")
        assert data.num_classes == 2
        assert "CLASS/*: 16 pictures in 2 classes" in data.understood
        assert "made by content" in data.understood
        assert len(data.train) + len(data.validation) + len(data.test) == 16
        example = data.train[0]
        assert example.keys() == {"image", "label"}
        assert example["image"].shape == (18, 22, 3)
        assert example["image"].dtype == np.uint8
        with pytest.raises(IndexError):
            data.train[len(data.train)]

    @pytest.mark.parametrize("validation", ["validation", "val"])
    def test_split_folders_are_kept(self, tmp_path, open_, validation):
        for i, split in enumerate(("train", validation, "test")):
            fill(tmp_path / "photos" / split, number=3 - i, first=10 * i)
        data = open_(tmp_path / "photos")
        assert [len(s) for s in data[:3]] == [6, 4, 2]
        assert names_of(data, "test") == ["test/cat/0.png", "test/dog/0.png"]
        assert "the folder's" in data.understood

    def test_what_is_not_given_is_cut_out_of_train(self, tmp_path, open_):
        fill(tmp_path / "photos/train", number=10)
        fill(tmp_path / "photos/test", number=2, first=50)
        data = open_(tmp_path / "photos")
        assert len(data.test) == 4
        assert len(data.train) + len(data.validation) == 20
        assert len(data.validation) >= 2
        assert "validation cut out of train" in data.understood

    def test_a_class_may_be_called_train(self, tmp_path, open_):
        data = open_(fill(tmp_path / "photos", classes=("bus", "train")))
        assert data.class_names == ("bus", "train")

    def test_labels_csv(self, tmp_path, open_):
        folder = tmp_path / "photos"
        rows = []
        for i in range(12):
            save(folder / "raw" / f"{i}.png", i)
            mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
            mask[8:16, 10:20] = 1
            (folder / "truth").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / "truth" / f"{i}.png")
            box = (0.25, 0.25, 0.5, 0.5)
            split = ("train", "val", "test")[i % 3]
            rows.append((f"raw/{i}.png", i % 2, f"g{i}", split, *box, f"truth/{i}.png"))
        write_csv(folder, labels_csv.COLUMNS, rows)
        data = open_(folder, fit="squash")
        assert [len(s) for s in data[:3]] == [4, 4, 4]
        example = data.test[1]
        assert example["image"].shape == (16, 16, 3)
        np.testing.assert_allclose(example["bbox"], (0.25, 0.25, 0.5, 0.5), atol=1e-6)
        wanted = np.zeros((16, 16), np.uint8)
        wanted[4:8, 4:8] = 1
        np.testing.assert_array_equal(example["mask"], wanted)
        assert "12 with a box, 12 with a mask" in data.understood

    def test_pixel_boxes_are_told_by_their_values(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        rows = [
            (f"{c}/{i}.png", c, 8, 10, 16, 20) for c in ("cat", "dog") for i in range(8)
        ]
        rows[3] = (rows[3][0], "cat", "", "", "", "")
        write_csv(folder, ("file", "label", *labels_csv.BOX), rows)
        data = open_(folder, fit="squash")
        boxes = [tuple(e["bbox"].round(4)) for s in data[:3] for e in map_all(s)]
        assert sorted(set(boxes)) == [(0, 0, 0, 0), (0.25, 0.25, 0.5, 0.5)]
        assert boxes.count((0, 0, 0, 0)) == 1

    def test_semicolons_a_mark_and_numbered_classes(self, tmp_path, open_):
        folder = fill(tmp_path / "photos", classes=("x",), number=12)
        lines = ["File;Label", *(f"x/{i}.png;{(i % 3) * 5}" for i in range(12))]
        (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        assert open_(folder).class_names == ("0", "5", "10")

    @pytest.mark.parametrize("pictures", ["", "images"])
    def test_parallel_masks(self, tmp_path, open_, pictures):
        folder = tmp_path / "photos"
        fill(folder / pictures)
        mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        mask[:16] = 255
        (folder / "masks/cat").mkdir(parents=True)
        Image.fromarray(mask).save(folder / "masks/cat/3.png")
        Image.fromarray(mask).save(folder / "masks/cat/4_mask.png")
        data = open_(folder, fit="squash")
        assert data.class_names == ("cat", "dog")
        found = [e["mask"].mean() for s in data[:3] for e in map_all(s)]
        assert sorted(found) == [0.0] * 14 + [0.5] * 2

    def test_strange_names_and_what_is_left_out(self, tmp_path, open_):
        folder = fill(tmp_path / "my photos", classes=("a cat", "🐕", "$x_{1}$"))
        (folder / ".hidden").mkdir()
        save(folder / ".hidden/1.png", 1)
        save(folder / "a cat/.2.png", 2)
        save(folder / "loose.png", 3)
        (folder / "notes.txt").write_text("nothing")
        os.symlink(folder, folder / "🐕" / "loop")
        data = open_(folder)
        assert data.class_names == ("$x_{1}$", "a cat", "🐕")
        assert len(data.rows) == 24
        assert "left out, as outside class folders (1): loose.png" in data.warnings
        assert "left out, as no pictures (1): notes.txt" in data.warnings

    def test_a_class_name_that_is_no_text(self, tmp_path, refused):
        folder = fill(tmp_path / "photos", classes=("a", "b\x1b[31m"))
        (line,) = refused(folder)
        assert r"class 'b\x1b[31m': its name is not printable text" in line

    def test_a_slash_in_a_class_of_labels_csv(self, tmp_path, open_):
        folder = fill(tmp_path / "photos", classes=("x",), number=12)
        rows = [(f"x/{i}.png", ("good", "n/a")[i % 2]) for i in range(12)]
        data = open_(write_csv(folder, ("file", "label"), rows))
        assert data.class_names == ("good", "n/a")


def map_all(source):
    return [source[i] for i in range(len(source))]


class TestFaults:
    def test_nothing_there(self, tmp_path, refused):
        empty = tmp_path / "empty"
        assert "no such folder" in refused(empty)[0]
        empty.mkdir()
        assert "the folder is empty" in refused(empty)[0]
        save(empty / ".a/1.png", 1)
        assert "only hidden files" in refused(empty)[0]
        (empty / "notes.txt").write_text("no")
        assert "no picture among the files there (1)" in refused(empty)[0]
        assert "not a folder" in refused(empty / "notes.txt")[0]

    def test_pictures_without_classes(self, tmp_path, refused):
        save(tmp_path / "photos/1.png", 1)
        (line,) = refused(tmp_path / "photos")
        assert "no class folders" in line
        save(tmp_path / "photos/train/1.png", 1)
        lines = refused(tmp_path / "photos")
        assert any("train/: pictures outside class folders (1)" in x for x in lines)

    def test_one_class_and_a_small_class(self, tmp_path, refused):
        (line,) = refused(fill(tmp_path / "one", classes=("cat",)))
        assert "one class only, 'cat'" in line
        folder = fill(tmp_path / "small")
        fill(folder, classes=("rare",), number=2, first=500)
        (line,) = refused(folder)
        assert "rare (2)" in line and "fewer than 3 pictures" in line

    def test_three_copies_are_one_picture(self, tmp_path, refused):
        folder = fill(tmp_path / "photos")
        for i in range(3):
            save(folder / "copied" / f"{i}.png", 999)
        (line,) = refused(folder)
        assert "'copied' has no example for" in line and "copies count as one" in line

    def test_all_faults_of_labels_csv_at_once(self, tmp_path, refused):
        folder = fill(tmp_path / "photos")
        save(folder / "rotated.png", 77, size=(10, 10))
        box = ("", "", "", "")
        rows = [
            *((f"cat/{i}.png", "cat", "train", 0, 0, 1, 1, "") for i in range(8)),
            *((f"dog/{i}.png", "dog", "test", *box, "") for i in range(4)),
            ("cat/1.png", "cat", "train", *box, ""),
            ("gone.png", "cat", "train", *box, ""),
            ("dog/4.png", "NaN", "test", *box, ""),
            ("dog/5.png", "dog", "holdout", *box, ""),
            ("dog/6.png", "dog", "test", 0.5, 0.1, 0.4, 0.2, ""),
            ("dog/7.png", "dog", "test", 0.5, 0.1, 1.4, 0.2, "rotated.png"),
            ("", "dog", "test", *box, "nomask.png"),
            ("cat/2.png",),
        ]
        header = ("file", "label", "split", *labels_csv.BOX, "mask")
        lines = refused(write_csv(folder, header, rows))
        text = "\n".join(lines)
        assert lines[0] == f"{folder}: {len(lines) - 1} faults"
        for wanted in (
            "files named twice (1): cat/1.png",
            "files that are not there (1): gone.png (line 15)",
            "rows with an empty or NaN label (1): dog/4.png (line 16)",
            "none of train, validation, test (1): 'holdout' (line 17)",
            "ymin < ymax and xmin < xmax (1): dog/6.png (line 18)",
            "boxes, taken as shares of the sides, that reach outside their picture "
            "(1): dog/7.png",
            "rotated.png is 10 x 10, its picture 40 x 32",
            "rows without a file (1): line 20",
            "another number of cells than the header's 8 (1): line 21 has 1",
            "rows without a split while others have one, fill all or none (1)",
            "classes with fewer than 2 pictures in train",
        ):
            assert wanted in text, wanted

    def test_columns(self, tmp_path, refused):
        folder = fill(tmp_path / "photos")
        write_csv(folder, ("file", "class", "ymin", "file"), [("cat/1.png", "a", 1, 1)])
        text = "\n".join(refused(folder))
        assert "no column 'label'" in text
        assert "unknown column 'class'" in text
        assert "column 'file' occurs twice" in text
        assert "a box needs ymin, xmin, ymax, xmax" in text
        (folder / "labels.csv").write_text("")
        assert "labels.csv: the file is empty" in refused(folder)[0]
        (folder / "labels.csv").write_bytes(b"file,label\n\xff\xfe,1")
        assert "not UTF-8" in refused(folder)[0]
        (folder / "labels.csv").write_text("file,label\n")
        assert "no row below the header" in refused(folder)[0]

    def test_pixel_boxes_outside(self, tmp_path, refused):
        folder = fill(tmp_path / "photos", classes=("x",), number=12)
        rows = [(f"x/{i}.png", i % 2, 1, 1, 20, 30 + i) for i in range(12)]
        write_csv(folder, ("file", "label", *labels_csv.BOX), rows)
        (line,) = refused(folder)
        assert (
            "boxes, taken as pixels, that reach outside their picture (1): x/11.png"
            in line
        )

    def test_unreadable_pictures_are_counted_and_named(self, tmp_path, open_, refused):
        folder = fill(tmp_path / "photos", number=10)
        (folder / "cat/broken.png").write_bytes(b"no picture")
        data = open_(folder)
        (line,) = data.warnings
        assert line.startswith("pictures that cannot be read (1 of 21)")
        assert "cat/broken.png: not an image" in line
        whole = (folder / "dog/1.png").read_bytes()
        (folder / "dog/cut.png").write_bytes(whole[: len(whole) // 2])
        (line,) = refused(folder)
        assert (
            "pictures that cannot be read (2 of 22)" in line
            and "at most 5% may be" in line
        )
        assert "dog/cut.png: damaged" in line
        assert len(open_(folder, max_unreadable=0.1).rows) == 20

    @pytest.mark.parametrize("place", ["photos/runs/1", "photos", "."])
    def test_workdir_and_folder_inside_each_other(self, tmp_path, refused, place):
        folder = fill(tmp_path / "photos")
        (line,) = refused(folder, workdir=tmp_path / place)
        assert "workdir" in line and "choose another --workdir" in line
        assert not (tmp_path / "cache").exists()

    def test_nothing_is_written_when_refused(self, tmp_path, refused):
        folder = fill(tmp_path / "photos", classes=("cat",))
        before = sorted(tmp_path.rglob("*"))
        refused(folder)
        assert sorted(tmp_path.rglob("*")) == before

    def test_no_training_split(self, tmp_path, refused):
        folder = fill(tmp_path / "photos")
        rows = [(f"{c}/{i}.png", c, "test") for c in ("cat", "dog") for i in range(8)]
        write_csv(folder, ("file", "label", "split"), rows)
        assert any("no training pictures" in x for x in refused(folder))

    def test_a_picture_that_vanishes_is_one_line_at_use(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        data = open_(folder)
        cached = data.train[0]["image"]
        shutil.rmtree(folder)
        np.testing.assert_array_equal(data.train[0]["image"], cached)
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(DatasetError, match="no such file; it was there") as caught:
            data.train[0]
        assert "\n" not in str(caught.value)

    def test_the_folder_is_only_read(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        folder.chmod(0o500)
        assert len(map_all(open_(folder).train)) > 0
        folder.chmod(0o700)
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    def test_a_cache_that_cannot_be_written_to(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        (tmp_path / "file").write_text("in the way")
        data = open_(folder, cache_dir=tmp_path / "file" / "cache")
        (line,) = data.warnings
        assert "cannot be written to (Not a directory)" in line
        assert data.train[0]["image"].shape == (18, 22, 3)


class TestSplits:
    def test_added_pictures_move_no_other(self):
        keys = [f"{i:05}" for i in range(3000)]
        labels = ["ab"[i % 2] for i in range(3000)]
        few = splitting.assign(labels[:400], keys[:400])
        many = splitting.assign(labels, keys)
        assert few == many[:400]
        order = np.random.default_rng(0).permutation(3000)
        shuffled = splitting.assign(
            [labels[i] for i in order], [keys[i] for i in order]
        )
        assert shuffled == [many[i] for i in order]
        for split, share in splitting.SHARES.items():
            for label in "ab":
                cells = zip(labels, many, strict=True)
                count = sum(cell == (label, split) for cell in cells)
                assert abs(count / 1500 - share) < 0.04
        assert splitting.assign(labels, keys, seed=1) != many

    @pytest.mark.parametrize("number", [3, 4, 7, 20])
    def test_small_classes_are_in_every_split(self, number):
        for trial in range(30):
            labels = ["a", "b"] * number
            splits = splitting.assign(
                labels, [f"{trial}/{i}" for i in range(len(labels))]
            )
            assert not splitting.missing(labels, splits)
            for label in "ab":
                mine = [s for s, c in zip(splits, labels, strict=True) if c == label]
                assert mine.count("train") >= 0.35 * number - 1
                assert mine.count("test") >= max(1, int(0.075 * number))

    def test_groups_stay_whole(self, tmp_path, open_):
        folder = fill(tmp_path / "photos", classes=("x",), number=24)
        rows = [(f"x/{i}.png", i % 2, f"part {i // 4}") for i in range(24)]
        data = open_(write_csv(folder, ("file", "label", "group"), rows))
        of_group = {}
        for _, _, group, split in data.rows:
            of_group.setdefault(group, set()).add(split)
        assert len(of_group) == 6
        assert all(len(splits) == 1 for splits in of_group.values())

    def test_names_and_dates_do_not_matter(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        before = {row[0]: row[3] for row in open_(folder).rows}
        other = tmp_path / "other"
        for name in before:
            label, file = name.split("/")
            (other / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, other / label / f"renamed {file}")
        after = {row[0].replace("renamed ", ""): row[3] for row in open_(other).rows}
        assert after == before

    def test_written_splits_are_read_back(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        data = open_(folder)
        data.write_splits(tmp_path / "splits.csv")
        shutil.copy(tmp_path / "splits.csv", folder / "labels.csv")
        again = open_(folder, seed=5)
        assert again.rows == data.rows
        assert "the folder's" in again.understood

    def test_table_and_weights(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        fill(folder, classes=("eel",), number=48, first=1000)
        data = open_(folder)
        first, second = data.table.splitlines()[:2]
        assert first.split() == ["class", *splitting.SPLITS, "all", "share"]
        assert second.split()[0] == "eel" and second.split()[-2:] == ["48", "75.0%"]
        weights = data.class_weights()
        labels = [int(e["label"]) for e in map_all(data.train)]
        totals = [weights[c] * labels.count(c) for c in range(3)]
        np.testing.assert_allclose(totals, len(labels) / 3)
        assert splitting.class_weights([0, 0, 1], 3, power=0) == [1, 1, 0]


class TestCopies:
    @pytest.fixture(autouse=True)
    def hashes(self):
        pytest.importorskip("imagehash")

    def copies(self, folder):
        picture = draw(1000, size=(200, 160), blobs=(40, 50))
        picture.save(folder / "cat/original.png")
        shutil.copy(folder / "cat/original.png", folder / "cat/same.png")
        picture.resize((150, 120)).point(lambda v: 0.9 * v).save(
            folder / "cat/near.jpg", quality=70
        )

    def test_stay_in_one_split_and_are_named(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        self.copies(folder)
        for seed in range(5):
            data = open_(folder, seed=seed)
            splits = {row[0]: row[3] for row in data.rows}
            mine = {
                splits[f"cat/{n}"] for n in ("original.png", "same.png", "near.jpg")
            }
            assert len(mine) == 1
        same, near = data.warnings
        assert same == (
            "identical pictures, each kept with its like (2): "
            "cat/original.png and cat/same.png"
        )
        assert (
            near.startswith("near-identical pictures, each kept with its like (3)")
            and "cat/near.jpg" in near
        )
        assert len(open_(folder, look_alikes="ignore").warnings) == 1

    def test_across_given_splits_and_classes(self, tmp_path, open_):
        for i, split in enumerate(layouts.SPLITS):
            fill(tmp_path / "photos" / split, first=20 * i)
        save(tmp_path / "photos/train/cat/a.png", 5000)
        save(tmp_path / "photos/test/dog/b.png", 5000)
        across, classes = open_(tmp_path / "photos").warnings
        assert "identical pictures across splits (1 pairs): " in across
        assert "test/dog/b.png (test) and train/cat/a.png (train)" in across
        assert "test/dog/b.png (dog) and train/cat/a.png (cat)" in classes

    def test_without_imagehash_exact_copies_are_still_found(
        self, tmp_path, open_, monkeypatch
    ):
        folder = fill(tmp_path / "photos")
        self.copies(folder)
        monkeypatch.setattr(similar, "is_available", lambda: False)
        missing, same = open_(folder).warnings
        assert missing.endswith("pip install imagehash")
        assert same.endswith("cat/original.png and cat/same.png")
        monkeypatch.undo()  # what was cached without a hash is hashed now
        assert "near-identical" in open_(folder).warnings[1]

    def test_a_fixed_camera_is_no_copy(self, tmp_path, open_):
        folder = tmp_path / "photos"
        scene = draw(7, size=(160, 160))
        for i in range(40):
            picture = scene.copy()
            picture.putpixel((i, i), (255, 0, 0))
            path = folder / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        data = open_(folder)
        assert data.warnings[0].startswith("40 pictures look alike")
        assert {row[3] for row in data.rows} == set(splitting.SPLITS)

    def test_all_pairs_are_found(self):
        rng = np.random.default_rng(0)
        words = rng.integers(0, 256, (300, 32), np.uint8)
        words[250] = words[10]
        words[250, :2] ^= 0b111111  # 12 bits
        words[251] = words[11]
        words[251, :2] ^= 0b1111111  # 14 bits
        hashes = [row.tobytes().hex() for row in words]
        hashes[5] = hashes[6] = ""
        assert similar.near(hashes) == [(10, 250)]


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
        batches = pipeline.make_train_dataset(
            data.train, batch_size=4, seed=0, augment="imagenet", image_size=16
        )
        batch = next(iter(pipeline.iterate(batches)))
        assert batch["image"].shape == (4, 16, 16, 3)
        evaluation = pipeline.make_eval_batches(
            data.test, batch_size=4, transform="resize_center", image_size=16
        )
        real = sum(b["example_mask"].sum() for b in pipeline.iterate(evaluation))
        assert real == len(data.test)


class ClassLabel:
    def __init__(self, names):
        self.names = names


class HuggingFace:
    """What `datasets.Dataset` offers, as far as it is used."""

    def __init__(self, rows, names):
        self._rows = rows
        image = type("Image", (), {})()
        self.features = {"img": image, "fine": ClassLabel(names)}

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


class TestGiven:
    def rows(self, number=20, **columns):
        return [
            {"image": np.asarray(draw(i)), "label": i % 2, **columns}
            for i in range(number)
        ]

    def test_a_sequence_of_dicts(self):
        mask = np.zeros((SIZE[1], SIZE[0]), bool)
        mask[:16] = True
        rows = self.rows(mask=mask, bbox=(0.0, 0.0, 0.5, 1.0))
        del rows[3]["mask"]
        data = given.open_examples(
            rows, image_size=16, fit="squash", class_names=("cat", "dog")
        )
        assert data.class_names == ("cat", "dog")
        assert [len(s) > 0 for s in data[:3]] == [True] * 3
        examples = [e for s in data[:3] for e in map_all(s)]
        assert len(examples) == 20
        assert sorted(e["mask"].mean() for e in examples) == [0.0] + [0.5] * 19
        assert {e["label"].dtype for e in examples} == {np.dtype(np.int32)}
        np.testing.assert_allclose(examples[0]["bbox"], (0, 0, 0.5, 1))

    def test_kept_or_made_at_every_use(self):
        kept = given.open_examples(self.rows(), image_size=16)
        made = given.open_examples(self.rows(), image_size=16, cache_bytes=0)
        for a, b in zip(map_all(kept.train), map_all(made.train), strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
        assert kept.rows == made.rows

    def test_hugging_face(self):
        def split(first, number):
            return HuggingFace(
                [{"img": draw(first + i), "fine": i % 2} for i in range(number)],
                ["no defect", "crack"],
            )

        data = given.open_examples(
            {"train": split(0, 20), "test": split(100, 6)}, image_size=16
        )
        assert data.class_names == ("no defect", "crack")
        assert len(data.test) == 6
        assert "validation cut out of train" in data.understood

    def test_kinds_of_images(self, tmp_path):
        grey = np.asarray(draw(1, mode="L"))
        buffer = io.BytesIO()
        draw(2).save(buffer, "png")
        save(tmp_path / "3.png", 3)
        kinds = [
            grey,
            grey[..., None],
            (grey / 255).astype(np.float32),
            grey.astype(np.uint16) * 257,
            draw(1, mode="L").convert("LA"),
            Image.fromarray(grey.astype(np.uint16) * 257),
            {"bytes": buffer.getvalue(), "path": None},
            tmp_path / "3.png",
        ]
        for kind, value in enumerate(kinds):
            image, size = given._image(value, 16)
            wanted = {6: draw(2), 7: draw(3)}.get(kind, draw(1, mode="L"))
            assert size == SIZE
            difference = np.asarray(image, float) - np.asarray(wanted.convert("RGB"))
            assert np.abs(difference).max() <= 1, kind

    def test_all_faults_at_once(self):
        rows = self.rows()
        rows[0]["label"] = float("nan")
        rows[1]["image"] = np.zeros((4, 4, 7), np.uint8)
        rows[2]["bbox"] = (1, 2, 30, 40)
        rows[3]["mask"] = np.zeros((5, 5))
        rows[4]["image"] = np.full((4, 4), 200.0)
        rows[5] = {"image": 1}
        rows[6]["image"] = {"bytes": b"no picture", "path": None}
        with pytest.raises(DatasetError) as caught:
            given.open_examples(rows, image_size=16)
        text = str(caught.value)
        for wanted in (
            "data: 3 faults",
            "neither a whole number nor text (1): example[0]",
            "cannot be used (5): example[1] (image is an array [4, 4, 7], not [H, W]",
            "example[2] (bbox is not ymin, xmin, ymax, xmax in [0, 1])",
            "example[3] (mask is 5 x 5, its image 40 x 32)",
            "example[4] (image has floating-point values outside [0, 1])",
            "without 'label' (1): example[5]",
            "example[6] (image: its bytes are no image)",
        ):
            assert wanted in text, wanted

    @pytest.mark.parametrize(
        "data, message",
        [
            ([], "no examples"),
            ({"holdout": []}, "unknown split 'holdout'"),
            (iter([]), "has no length and no index"),
            ([{"image": np.zeros((4, 4)), "label": 0}], "one class only"),
            ([{"image": np.zeros((4, 4)), "label": 2}], "labels must be 0, 1, ...;"),
        ],
    )
    def test_single_faults(self, data, message):
        with pytest.raises(DatasetError, match=message):
            given.open_examples(data, image_size=16)
