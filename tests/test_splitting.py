"""Splits of pictures: stable, whole groups together, copies found."""

import shutil

import numpy as np
import pytest

from tests.pictures import draw, fill, map_all, save, write_csv
from train.data import folders, layouts, similar, splitting


@pytest.fixture
def open_(tmp_path):
    """open_folder with a cache of its own, at 16 pixels."""

    def call(folder, **options):
        options = {"image_size": 16, "cache_dir": tmp_path / "cache", **options}
        return folders.open_folder(folder, **options)

    return call


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

    def test_pictures_added_to_a_folder_move_no_other(self, tmp_path, open_):
        """But where a class has less than half its share of a split: `splitting`."""
        folder = fill(tmp_path / "photos", number=90, first=10_000)
        before = {row[0]: row[3] for row in open_(folder).rows}
        for i in range(30):
            save(folder / "cat" / f"new{i}.png", 5000 + i)
            save(folder / "eel" / f"{i}.png", 6000 + i)
        after = {row[0]: row[3] for row in open_(folder).rows}
        assert len(after) == 240
        assert {name: after[name] for name in before} == before

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
            near.startswith("near-identical pictures, each kept with its like (2)")
            and "cat/near.jpg" in near
        )
        assert len(open_(folder, look_alikes="ignore").warnings) == 1

    def test_many_copies_of_one_are_no_fixed_camera(self, tmp_path, open_):
        folder = fill(tmp_path / "photos")
        self.copies(folder)
        for i in range(12):
            shutil.copy(folder / "cat/original.png", folder / f"cat/copy{i}.png")
        data = open_(folder)
        same, near = data.warnings
        assert "kept with its like (14)" in same and "kept with its like (2)" in near
        names = ("cat/copy", "cat/near", "cat/original", "cat/same")
        assert len({row[3] for row in data.rows if row[0].startswith(names)}) == 1

    def test_across_given_splits_and_classes(self, tmp_path, open_):
        for i, split in enumerate(layouts.SPLITS):
            fill(tmp_path / "photos" / split, first=20 * i)
        save(tmp_path / "photos/train/cat/a.png", 5000)
        save(tmp_path / "photos/test/dog/b.png", 5000)
        across, classes = open_(tmp_path / "photos").warnings
        assert "identical pictures across splits (1 pairs): " in across
        assert "test/dog/b.png (test) and train/cat/a.png (train)" in across
        assert "test/dog/b.png (dog) and train/cat/a.png (cat)" in classes

    def test_near_copies_across_given_splits_are_named(self, tmp_path, open_):
        for i, split in enumerate(layouts.SPLITS):
            fill(tmp_path / "photos" / split, first=20 * i)
        picture = draw(1000, size=(200, 160), blobs=(40, 50))
        picture.save(tmp_path / "photos" / "train" / "cat" / "a.png")
        picture.resize((150, 120)).save(
            tmp_path / "photos" / "test" / "cat" / "b.jpg", quality=70
        )
        (across,) = open_(tmp_path / "photos").warnings
        assert across == (
            "near-identical pictures across splits (1 pairs): test/cat/b.jpg (test) "
            "and train/cat/a.png (train)"
        )

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
