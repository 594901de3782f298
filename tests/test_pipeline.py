"""The input pipeline: prepared once, in order, shared out, with boxes that follow."""

import io
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from PIL import Image

from train.data import sources, transforms
from train.data.batches import iterate, make_eval_batches, make_train_dataset
from train.errors import DatasetError

SIZES = dict(num_train=60, num_validation=20, num_test=25)


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def numbered(num, size=8):
    """A source whose example i has label i."""
    return [
        {"image": np.full((size, size, 3), i % 256, np.uint8), "label": np.int32(i)}
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def builder(data_dir):
    return sources.prepare("photo_digits", data_dir, **SIZES)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("foreign")

    class ToyGrey(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        LABEL = "label"

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 1)),
                self.LABEL: tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                image = np.full((20 + i, 30), 40 * i, np.uint8)
                yield i, {"image": encode(image), self.LABEL: i % 3}

    class ToyUnlabelled(ToyGrey):
        LABEL = "kind"

    for cls in (ToyGrey, ToyUnlabelled):
        cls(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


class TestPrepare:
    def test_splits_and_features(self, builder):
        for split in ("train", "validation", "test"):
            source = sources.open_source(builder, split)
            assert len(source) == SIZES[f"num_{split}"]
        example = source[3]
        assert example["image"].shape == (48, 48, 3)
        assert example["image"].dtype == np.uint8
        assert example["mask"].shape == (48, 48)
        assert set(np.unique(example["mask"])) == {0, 1}
        assert example["bbox"].dtype == np.float32
        rows, columns = np.nonzero(example["mask"])
        box = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
        np.testing.assert_allclose(example["bbox"] * 48, box, atol=1e-4)
        assert sources.num_classes(builder) == 10

    def test_prepares_once(self, builder, data_dir):
        before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*") if p.is_file()}
        again = sources.prepare("photo_digits/independent", data_dir, **SIZES)
        after = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*") if p.is_file()}
        assert before == after
        assert again.data_path == builder.data_path

    def test_survives_an_interrupted_run(self, builder, tmp_path):
        options = dict(num_train=3, num_validation=2, num_test=2)
        # What a killed run leaves: a temporary folder, or a folder half written.
        first = tmp_path / "photo_digits" / "shortcut_num_test2_num_train3"
        folder = first.with_name(first.name + "_num_validation2") / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "features.json").write_text("{")
        (folder.parent / "incomplete.ABCDEF_1.0.0").mkdir()
        ready = sources.prepare("photo_digits/shortcut", tmp_path, **options)
        assert ready.data_path == type(ready.data_path)(folder)
        assert len(sources.open_source(ready, "train")) == 3

    @pytest.mark.parametrize("process", [0, 1])
    def test_others_wait_for_process_0(self, builder, data_dir, monkeypatch, process):
        from jax.experimental import multihost_utils

        events = []
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(
            multihost_utils, "sync_global_devices", lambda _: events.append("barrier")
        )
        make_builder = lambda: events.append("builder") or builder  # noqa: E731
        sources._prepare_once(make_builder)
        expected = ["builder", "barrier"]
        assert events == (expected if process == 0 else expected[::-1])

    def test_names_what_is_missing_and_the_command(self, tmp_path):
        with pytest.raises(DatasetError) as error:
            sources.prepare("cifar10", tmp_path)
        message = str(error.value)
        assert "\n" not in message
        assert str(tmp_path) in message
        assert "python -m train.prepare cifar10" in message

    def test_options_are_for_the_embedded_set(self, tmp_path):
        with pytest.raises(DatasetError, match="num_train"):
            sources.prepare("cifar10", tmp_path, num_train=3)
        with pytest.raises(ValueError, match="shortcut"):
            sources.prepare("photo_digits/nothing", tmp_path)


class TestForeignDataset:
    """Any tfds set prepared as array_record, read without its generating code."""

    def test_grey_becomes_three_channels(self, foreign):
        source = sources.open_source(sources.prepare("toy_grey", foreign), "train")
        assert isinstance(source, sources.DecodedSource)  # sizes differ: no cache
        assert sorted(e["image"].shape[0] for e in source) == list(range(20, 26))
        for example in source:
            assert example["image"].shape[1:] == (30, 3)
            assert set(example) == {"image", "label"}
        batches = make_eval_batches(
            source, batch_size=4, transform="resize_center", image_size=16
        )
        assert [b["image"].shape for b in batches] == [(4, 16, 16, 3)] * 2

    def test_other_file_formats_are_refused(self, foreign, tmp_path):
        shutil.copytree(foreign / "toy_grey", tmp_path / "toy_grey")
        info = tmp_path / "toy_grey" / "1.0.0" / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(DatasetError, match="train.prepare toy_grey"):
            sources.prepare("toy_grey", tmp_path)

    def test_missing_label_or_split(self, foreign):
        with pytest.raises(DatasetError, match="no feature 'label'"):
            builder = sources.prepare("toy_unlabelled", foreign)
            sources.open_source(builder, "train")
        with pytest.raises(DatasetError, match="no split 'test'"):
            sources.open_source(sources.prepare("toy_grey", foreign), "test")


class TestSources:
    def test_cache_equals_decoding(self, builder):
        cached = sources.open_source(builder, "test")
        decoded = sources.open_source(builder, "test", cache_bytes=0)
        assert isinstance(cached, sources.CachedSource)
        assert isinstance(decoded, sources.DecodedSource)
        assert len(cached) == len(decoded) == 25
        for a, b in zip(cached, decoded, strict=True):
            assert set(a) == {"image", "label", "bbox", "mask"}
            for name, value in b.items():
                np.testing.assert_array_equal(a[name], value)
                assert np.asarray(a[name]).dtype == np.asarray(value).dtype

    @pytest.mark.parametrize(
        "changes, match",
        [
            ({"label": 3}, r"label 3, outside \[0, 3\)"),
            ({"label": -1}, "label -1"),
            ({"image": np.zeros((4, 4, 4), np.uint8)}, "mode RGBA"),
            ({"image": np.zeros((4, 4), np.uint16)}, "mode I;16"),
            ({"mask": np.zeros((4, 4, 3), np.uint8)}, "mode RGB;"),
        ],
    )
    def test_one_line_errors(self, changes, match):
        record = {"image": np.zeros((4, 4, 3), np.uint8), "label": 2} | changes
        record = {k: v if k == "label" else encode(v) for k, v in record.items()}
        source = sources.DecodedSource([record], num_classes=3, name="toy")
        with pytest.raises(DatasetError, match=match) as error:
            source[0]
        assert "example 0 of toy" in str(error.value)
        assert "\n" not in str(error.value)

    def test_record_without_label(self):
        with pytest.raises(DatasetError, match="no label"):
            sources.DecodedSource([{"image": b""}])[0]


class TestTransforms:
    @staticmethod
    def example(rng, height=60, width=80):
        """A bright rectangle with its mask and box, away from the border."""
        mask = np.zeros((height, width), np.uint8)
        top, left = rng.integers(8, 20, 2)
        bottom, right = rng.integers(35, 50, 2)
        mask[top:bottom, left:right] = 1
        box = np.array([top, left, bottom, right], np.float32)
        return {
            "image": np.repeat(200 * mask[..., None], 3, -1),
            "label": np.int32(0),
            "bbox": box / np.array([height, width] * 2, np.float32),
            "mask": mask,
        }

    @pytest.mark.parametrize(
        "name", ["shift", "crop_flip", "imagenet", "resize_center", "none"]
    )
    def test_box_and_mask_follow_the_image(self, name):
        table = transforms.AUGMENTATIONS | transforms.EVAL_TRANSFORMS
        rng = np.random.default_rng(0)
        moved = 0
        for _ in range(40):
            before = self.example(rng)
            out = table[name](before, rng, 48)
            height, width = out["mask"].shape
            assert out["image"].shape == (height, width, 3)
            if name in ("imagenet", "resize_center"):
                assert (height, width) == (48, 48)
            moved += (
                out["mask"].shape != (60, 80) or (out["mask"] != before["mask"]).any()
            )
            mask = out["mask"] > 0
            # Resizing blurs the outline: about one pixel of it may disagree.
            disagree = np.mean((out["image"][..., 0] > 100) != mask)
            assert disagree <= (0.06 if name in ("imagenet", "resize_center") else 0)
            assert (out["bbox"] >= 0).all() and (out["bbox"] <= 1).all()
            if not mask.any():
                continue
            rows, columns = np.nonzero(mask)
            tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            pixels = out["bbox"] * np.array([height, width] * 2)
            atol = 1.5 if name in ("imagenet", "resize_center") else 1e-3
            np.testing.assert_allclose(pixels, tight, atol=atol)
        assert moved > 30 or name == "none"

    def test_shift_repeats_the_edge_and_clears_the_mask(self):
        image = np.arange(25, dtype=np.uint8).reshape(5, 5)
        example = {
            "image": np.repeat(image[..., None], 3, -1),
            "mask": np.ones((5, 5), np.uint8),
            "bbox": np.array([0, 0, 1, 1], np.float32),
        }
        out = transforms._window(example, -2, 1, 5, 5)
        expected = np.pad(image, 2, "edge")[0:5, 3:8]
        np.testing.assert_array_equal(out["image"][..., 0], expected)
        visible = np.zeros((5, 5))
        visible[2:, :4] = 1
        np.testing.assert_array_equal(out["mask"], visible)
        np.testing.assert_allclose(out["bbox"], [0.4, 0, 1, 0.8], atol=1e-6)

    def test_crop_flip_flips_half(self):
        rng = np.random.default_rng(1)
        ramp = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None], 32, 0)
        example = {"image": np.repeat(ramp, 3, -1)}
        flipped = [
            transforms.crop_flip(example, rng)["image"][0, 0, 0] > 15
            for _ in range(200)
        ]
        assert 70 < sum(flipped) < 130

    def test_imagenet_crops_are_smaller_and_square(self):
        rng = np.random.default_rng(0)
        image = np.arange(100, dtype=np.uint8)[:, None, None].repeat(40, 1).repeat(3, 2)
        spans = [
            np.ptp(transforms.imagenet({"image": image}, rng, 24)["image"][..., 0])
            for _ in range(100)
        ]
        assert 10 < np.mean(spans) < 60

    def test_choosing(self):
        with pytest.raises(ValueError, match="crop_flip"):
            make_train_dataset(numbered(9), batch_size=2, seed=0, augment="x")
        with pytest.raises(ValueError, match="image_size"):
            make_eval_batches(numbered(9), batch_size=2, transform="resize_center")
        with pytest.raises(DatasetError, match="8 x 8"):
            make_train_dataset(numbered(9), batch_size=2, seed=0, image_size=16)[0]


class TestMakeTrainDataset:
    options = dict(batch_size=6, seed=3, augment="shift")

    def test_batch_layout(self, builder):
        source = sources.open_source(builder, "train")
        batch = make_train_dataset(source, image_size=48, **self.options)[0]
        layout = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert layout == {
            "image": ((6, 48, 48, 3), np.uint8),
            "label": ((6,), np.int32),
            "bbox": ((6, 4), np.float32),
            "mask": ((6, 48, 48), np.uint8),
        }

    def test_shards_make_up_the_batch_of_one_process(self, builder):
        source = sources.open_source(builder, "train")
        whole = make_train_dataset(source, shard=(0, 1), **self.options)
        shards = [
            make_train_dataset(source, shard=(p, 2), **self.options) for p in range(2)
        ]
        for step in (0, 1, 25):
            for p, shard in enumerate(shards):
                for name, value in shard[step].items():
                    np.testing.assert_array_equal(value, whole[step][name][p::2])

    def test_every_example_once_an_epoch_in_new_order(self):
        dataset = make_train_dataset(numbered(12), batch_size=6, seed=3)
        labels = [dataset[i]["label"].tolist() for i in range(4)]
        for epoch in (labels[:2], labels[2:]):
            assert sorted(sum(epoch, [])) == list(range(12))
        assert labels[:2] != labels[2:]
        other = make_train_dataset(numbered(12), batch_size=6, seed=4)
        assert other[0]["label"].tolist() != labels[0]

    @pytest.mark.parametrize("num_threads", [0, 2])
    def test_resume_continues_the_order(self, builder, num_threads):
        source = sources.open_source(builder, "train")
        dataset = make_train_dataset(source, **self.options)
        resumed = iterate(dataset, start_step=13, num_threads=num_threads)
        for step in range(13, 17):
            batch = next(resumed)
            for name, value in dataset[step].items():
                np.testing.assert_array_equal(batch[name], value)
        resumed.close()

    def test_augmentation_changes_every_epoch(self):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (9, 9, 3)).astype(np.uint8)
        source = [{"image": image, "label": np.int32(0)}] * 4
        dataset = make_train_dataset(source, batch_size=4, seed=0, augment="shift")
        images = {dataset[i]["image"].tobytes() for i in range(3)}
        assert len(images) == 3
        assert dataset[1]["image"].tobytes() in images  # and repeats itself exactly

    def test_batch_sizes_that_cannot_be(self):
        with pytest.raises(ValueError, match="multiple of the 2 processes"):
            make_train_dataset(numbered(9), batch_size=3, seed=0, shard=(0, 2))
        with pytest.raises(DatasetError, match="lower the batch size"):
            make_train_dataset(numbered(9), batch_size=10, seed=0)


class TestMakeEvalBatches:
    def test_ragged_last_batch_is_masked(self, builder):
        source = sources.open_source(builder, "test")
        batches = list(iterate(make_eval_batches(source, batch_size=10)))
        assert len(batches) == 3
        masks = np.stack([b["example_mask"] for b in batches])
        assert masks.dtype == np.float32
        np.testing.assert_array_equal(masks.ravel(), np.arange(30) < 25)
        assert {b["image"].shape for b in batches} == {(10, 48, 48, 3)}
        assert batches[-1]["bbox"].shape == (10, 4)
        assert not batches[-1]["image"][5:].any()
        np.testing.assert_array_equal(batches[2]["image"][4], source[24]["image"])

    @pytest.mark.parametrize("num", [8, 9, 12, 13])
    def test_two_processes_cover_every_example_once(self, num):
        seen, shapes = [], []
        for p in range(2):
            batches = list(make_eval_batches(numbered(num), batch_size=4, shard=(p, 2)))
            shapes.append([b["image"].shape for b in batches])
            for batch in batches:
                seen += batch["label"][batch["example_mask"] > 0].tolist()
        assert sorted(seen) == list(range(num))
        assert shapes[0] == shapes[1]


class TestImports:
    def test_light_import_and_no_tensorflow(self, tmp_path):
        """Importing is light; nothing on the whole way imports TensorFlow."""
        stub = tmp_path / "path" / "tensorflow"  # there to be found, so it can fail
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        program = f"""
            import sys
            from train.data import batches, sources
            loaded = {{"tensorflow_datasets", "grain", "PIL"}} & set(sys.modules)
            assert not loaded, loaded
            builder = sources.prepare(
                "photo_digits", {str(tmp_path)!r},
                num_train=8, num_validation=1, num_test=1,
            )
            source = sources.open_source(builder, "train")
            dataset = batches.make_train_dataset(source, batch_size=4, seed=0)
            next(batches.iterate(dataset))
            assert "tensorflow" not in sys.modules
            print("fine")
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([".", str(stub.parent)])},
            cwd=pathlib.Path(__file__).parents[1],
        )
        assert done.stdout.endswith("fine\n"), done.stderr
