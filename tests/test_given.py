"""Examples given from Python: sequences of dicts and Hugging Face data sets."""

import io
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from tests.pictures import SIZE, draw, fill, map_all, save
from train.data import given
from train.errors import DatasetError


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

    def test_whole_numbers_of_jax(self):
        rows = [{**row, "label": jnp.asarray(row["label"])} for row in self.rows()]
        data = given.open_examples(rows, image_size=16, fit="squash")
        assert data.class_names == ("0", "1")

    def test_a_damaged_picture_that_pil_or_a_data_set_opens(self, tmp_path):
        save(tmp_path / "a.png", 0)
        whole = (tmp_path / "a.png").read_bytes()
        rows = self.rows()
        rows[2]["image"] = Image.open(io.BytesIO(whole[: len(whole) // 2]))
        with pytest.raises(DatasetError, match=r"cannot be used \(1\): example\[2\]"):
            given.open_examples(rows, image_size=16, fit="squash")

        class Decoding(list):
            def __getitem__(self, index):
                if index == 3:
                    raise UnidentifiedImageError("cannot identify it")
                return super().__getitem__(index)

        with pytest.raises(DatasetError, match=r"example\[3\] \(cannot identify it\)"):
            given.open_examples(Decoding(self.rows()), image_size=16, fit="squash")

    def test_pictures_that_look_wrong_are_told(self):
        rows = self.rows()
        dark = np.asarray(draw(77, mode="L")).astype(np.uint16)
        rows[3]["image"] = Image.fromarray(dark)
        (line,) = given.open_examples(rows, image_size=16).warnings
        assert line.startswith("image: 16 bits, but its largest value is 2")

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
            ([(np.zeros((4, 4)), "a")], r"no dict of image and label \(1\): example"),
            ([1, 2], r"no dict of image and label \(2\): example"),
            ([{"image": np.zeros((4, 4)), "label": 0}], "one class only"),
            ([{"image": np.zeros((4, 4)), "label": 2}], "labels must be 0, 1, ...;"),
        ],
    )
    def test_single_faults(self, data, message):
        with pytest.raises(DatasetError, match=message):
            given.open_examples(data, image_size=16)


class TestDatasetsPackage:
    """The same by the real package, where it is installed (`pip install datasets`)."""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():  # of the packages that it imports
            warnings.simplefilter("ignore")
            self.datasets = pytest.importorskip("datasets")
            yield

    def test_a_folder_of_images(self, tmp_path):
        fill(tmp_path / "photos" / "train", number=12)
        fill(tmp_path / "photos" / "test", number=3, first=500)
        loaded = self.datasets.load_dataset(
            "imagefolder", data_dir=str(tmp_path / "photos")
        )
        data = given.open_examples(loaded, image_size=16)
        assert data.class_names == ("cat", "dog")
        assert len(data.test) == 6 and len(data.train) + len(data.validation) == 24
        assert "validation cut out of train" in data.understood
        expected = np.asarray(draw(0).resize((22, 18), Image.BICUBIC), np.float32)
        found = [e["image"] for s in data[:2] for e in map_all(s)]
        assert min(np.abs(image - expected).mean() for image in found) < 3

    def test_columns_of_other_names(self):
        features = self.datasets.Features(
            {
                "picture": self.datasets.Image(),
                "kind": self.datasets.ClassLabel(names=["sound", "cracked"]),
                "group": self.datasets.Value("string"),
            }
        )
        rows = {
            "picture": [draw(i) for i in range(24)],
            "kind": [i % 2 for i in range(24)],
            "group": [f"part {i // 4}" for i in range(24)],
        }
        made = self.datasets.Dataset.from_dict(rows, features=features)
        data = given.open_examples(made, image_size=16)
        assert data.class_names == ("sound", "cracked")
        of_group = {}
        for _, _, group, split in data.rows:
            of_group.setdefault(group, set()).add(split)
        assert len(of_group) == 6 and all(len(s) == 1 for s in of_group.values())
