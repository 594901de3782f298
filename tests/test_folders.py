"""A user's own pictures: every layout and every fault."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.pictures import SIZE, draw, fill, map_all, names_of, save, write_csv
from train.data import folders, labels_csv
from train.errors import DatasetError


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

    @pytest.mark.parametrize(
        "splits", [("train", "validation", "test"), ("Train", "Val", "Test")]
    )
    def test_split_folders_are_kept(self, tmp_path, open_, splits):
        for i, split in enumerate(splits):
            fill(tmp_path / "photos" / split, number=3 - i, first=10 * i)
        data = open_(tmp_path / "photos")
        assert [len(s) for s in data[:3]] == [6, 4, 2]
        test = splits[2]
        assert names_of(data, "test") == [f"{test}/cat/0.png", f"{test}/dog/0.png"]
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

    def test_what_ends_a_row_and_what_does_not(self, tmp_path, open_):
        folder = fill(tmp_path / "photos", classes=("x",), number=12)
        groups = ["a\x85b", "a\u2028b", '"a\nb"']
        rows = (f'x/{i}.png,"c,{i % 2}",{groups[i % 3]}' for i in range(12))
        text = "\r\n".join(["file,label,group", *rows])
        (folder / "labels.csv").write_bytes(text.encode())
        assert open_(folder).class_names == ("c,0", "c,1")

    def test_the_other_systems_separator_in_files_and_masks(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        (folder / "masks").mkdir()
        Image.fromarray(np.eye(32, 40, dtype=np.uint8)).save(folder / "masks/one.png")
        write_csv(
            folder,
            ("file", "label", "mask"),
            [
                (rf"{c}\{i}.png", c, r"masks\one.png")
                for c in ("cat", "dog")
                for i in range(8)
            ],
        )
        assert "16 with a mask" in open_(folder).understood

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

    def test_folders_inside_class_folders_are_told(self, tmp_path, open_):
        """They might have been meant as the classes."""
        fill(tmp_path / "photos" / "2023")
        fill(tmp_path / "photos" / "2024", first=1000)
        data = open_(tmp_path / "photos")
        assert data.class_names == ("2023", "2024")
        assert data.warnings == (
            "folders inside a class folder belong to its class: 2023/ (cat, dog), "
            "2024/ (cat, dog)",
        )
        for i, split in enumerate(("train", "val", "test")):
            fill(tmp_path / "split" / split, classes=("a", "b/c"), first=1000 * i)
        (line,) = open_(tmp_path / "split").warnings
        assert line.endswith("test/b/ (c), train/b/ (c), val/b/ (c)")

    def test_pictures_that_look_wrong_are_told(self, tmp_path, open_):
        """Twelve bits in sixteen are black to whoever does not know it."""
        folder = fill(tmp_path / "photos")
        for i in range(2):
            values = np.asarray(draw(900 + i, mode="L")).astype(np.uint16) * 16
            Image.fromarray(values).save(folder / "cat" / f"deep{i}.png")
        for _ in range(2):  # read, and from the cache
            (line,) = open_(folder).warnings
            assert line.startswith("2 pictures may have been read wrongly; the first, ")
            assert "deep0.png: 16 bits, but its largest value is" in line

    def test_a_class_name_that_is_no_text(self, tmp_path, refused):
        folder = fill(tmp_path / "photos", classes=("a", "b\x1b[31m"))
        (line,) = refused(folder)
        assert r"class 'b\x1b[31m': its name is not printable text" in line

    def test_a_slash_in_a_class_of_labels_csv(self, tmp_path, open_):
        folder = fill(tmp_path / "photos", classes=("x",), number=12)
        rows = [(f"x/{i}.png", ("good", "n/a")[i % 2]) for i in range(12)]
        data = open_(write_csv(folder, ("file", "label"), rows))
        assert data.class_names == ("good", "n/a")


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
