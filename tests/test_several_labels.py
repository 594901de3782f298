"""Several labels per picture: how they are read, split, batched, refused."""

import numpy as np
import pytest

from configs import default, photos
from tests import shapes
from tests.pictures import fill, map_all, write_csv
from train.data import batches, dataset, folders, given, several
from train.errors import ConfigError, DatasetError, UserError
from train.method import check

NAMES = ("cross", "disc", "square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.fill(tmp_path_factory.mktemp("several") / "shapes")


@pytest.fixture
def open_(tmp_path):
    def call(folder, link="sigmoid", **options):
        options = {"image_size": 16, "cache_dir": tmp_path / "cache", **options}
        return folders.open_folder(folder, link=link, **options)

    return call


def examples(number=30):
    return [
        {"image": np.asarray(shapes.draw(names, seed)), "label": list(names)}
        for seed, names in enumerate(shapes.label_sets(number))
    ]


class TestData:
    def test_a_cell_holds_several(self):
        assert several.parse(" b;a ; b;") == ("b", "a")
        assert several.parse("") == several.parse("NaN") == ()
        assert several.written(("b", "a")) == "b;a" and several.written("a;b") == "a;b"

    def test_a_folder(self, folder, open_):
        data = open_(folder)
        assert data.class_names == NAMES and data.num_classes == 3
        assert "40 pictures in 3 classes, 4 without a label" in data.understood
        assert "(no label)" in data.table
        wanted = {f"{i}.png": ";".join(s) for i, s in enumerate(shapes.label_sets(40))}
        assert {row[0]: row[1] for row in data.rows} == wanted
        for split, source in zip(folders.SPLITS, data[:3], strict=True):
            rows = [row for row in data.rows if row[3] == split]
            for row, example in zip(rows, map_all(source), strict=True):
                there = [NAMES[i] for i in np.flatnonzero(example["positives"])]
                names = several.parse(row[1])
                assert set(there) == set(names)
                assert NAMES[example["label"]] == (names[0] if names else "cross")
                assert example["positives"].dtype == np.uint8

    def test_splits_are_of_the_content_and_have_every_class(self, folder, open_):
        data = open_(folder)
        for source in data[:3]:
            assert np.all(np.sum([e["positives"] for e in map_all(source)], axis=0) > 0)
        rows = [(row[0], row[1]) for row in reversed(data.rows)]
        try:
            before = (folder / "labels.csv").read_bytes()
            write_csv(folder, ("file", "label"), rows)
            again = open_(folder)
        finally:
            (folder / "labels.csv").write_bytes(before)
        assert set(again.rows) == set(data.rows)

    def test_splits_csv_is_a_labels_csv(self, folder, open_, tmp_path):
        data = open_(folder)
        copy = shapes.fill(tmp_path / "copy")
        data.write_splits(copy / "labels.csv")
        assert set(open_(copy).rows) == set(data.rows)

    def test_examples_from_python(self, folder, open_):
        data = given.open_examples(examples(), image_size=16, link="sigmoid")
        assert data.class_names == NAMES
        found = [tuple(e["positives"]) for s in data[:3] for e in map_all(s)]
        assert set(found) == {(0, 0, 0), (0, 1, 1), (1, 1, 0), (1, 0, 1)}
        numbers = [
            {**e, "label": np.array([NAMES.index(name) for name in e["label"]], int)}
            for e in examples()
        ]
        same = given.open_examples(
            numbers, image_size=16, link="sigmoid", class_names=NAMES
        )
        assert same.rows == data.rows

    def test_training_draws_a_label_and_evaluation_shows_the_first(self):
        data = given.open_examples(examples(), image_size=16, link="sigmoid")
        options = {"batch_size": 8, "seed": 0, "augment": "none", "shard": (0, 1)}
        stream = batches.make_train_dataset(data.train, **options)
        again = batches.make_train_dataset(data.train, **options)
        drawn = {}
        for step in range(12):
            batch = stream[step]
            np.testing.assert_array_equal(batch["label"], again[step]["label"])
            for label, there in zip(batch["label"], batch["positives"], strict=True):
                assert there[label] or not there.any()
                drawn.setdefault(tuple(there), set()).add(int(label))
        assert drawn.pop((0, 0, 0)) == {0}
        assert all(len(labels) == 2 for labels in drawn.values())
        batch = batches.make_eval_batches(data.train, batch_size=8, shard=(0, 1))[0]
        firsts = [data.train[i]["label"] for i in range(8)]
        np.testing.assert_array_equal(batch["label"], firsts)


class TestRefusals:
    """One line each, with the mend."""

    def one_line(self, error):
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_class_folders(self, open_, tmp_path):
        with pytest.raises(DatasetError) as error:
            open_(fill(tmp_path / "photos"))
        assert "--config.link=softmax" in self.one_line(error)

    def test_labels_csv_with_one_label_each(self, open_, tmp_path):
        folder = fill(tmp_path / "photos")
        rows = [(f"{c}/{i}.png", c) for c in ("cat", "dog") for i in range(8)]
        with pytest.raises(DatasetError, match="just one label: set --config.link=sof"):
            open_(write_csv(folder, ("file", "label"), rows))

    def test_a_data_set_of_tfds(self):
        config = default.get_config()
        config.link = "sigmoid"
        with pytest.raises(ConfigError) as error:
            dataset.load_data(config, look_only=True)
        assert "one label per image: set --config.link=softmax" in self.one_line(error)

    def test_lists_under_a_softmax(self):
        with pytest.raises(DatasetError, match="--config.link=sigmoid") as error:
            given.open_examples(examples(), image_size=16)
        assert "a list of labels" in self.one_line(error)

    def test_a_split_without_any_label(self):
        parts = {"train": examples(), "validation": examples(3), "test": examples(1)}
        with pytest.raises(DatasetError, match="no picture of test has a label"):
            given.open_examples(parts, image_size=16, link="sigmoid")

    def test_no_label_at_all(self):
        rows = [{**example, "label": []} for example in examples()]
        with pytest.raises(DatasetError, match="no picture of train has a label"):
            given.open_examples(rows, image_size=16, link="sigmoid")

    def test_a_semicolon_under_a_softmax_is_a_name_and_a_word(self, open_, tmp_path):
        """As it always was; where it ends in a fault the mend stands beside it."""
        folder = fill(tmp_path / "photos", classes=("x",), number=16)
        rows = [(f"x/{i}.png", ("a;b", "c")[i % 2]) for i in range(16)]
        data = open_(write_csv(folder, ("file", "label"), rows), link="softmax")
        assert data.class_names == ("a;b", "c")
        (told,) = [line for line in data.warnings if "a;b" in line]
        assert told.endswith("several labels of a picture, --config.link=sigmoid")
        rows[0] = ("x/0.png", "c;a")
        with pytest.raises(DatasetError, match="--config.link=sigmoid"):
            open_(write_csv(folder, ("file", "label"), rows), link="softmax")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"label_smoothing": 0.1}, r"label_smoothing=0\.1: knows one label per im"),
            ({"class_weights": 1.0}, r"class_weights=1\.0: knows one label.*leave it"),
            ({"guided.teacher": "mask"}, "guided.teacher='mask' knows one label"),
            ({"guided.mask_first": True}, "guided.mask_first=True knows one label"),
            ({"plain.method": "icasc"}, "plain.method='icasc' knows one.*'guided'"),
            ({"plain.method": "rrr"}, "plain.method='rrr' knows one.*'guided'"),
            ({"guided.guidance.link": "softmax"}, "guidance.link='softmax' where the"),
            ({"link": "probit"}, "link='probit': choose one of softmax, sigmoid"),
        ],
    )
    def test_a_configuration(self, changes, words):
        config = photos.get_config()
        config.image_size, config.batch_size, config.link = 32, 8, "sigmoid"
        for name in config.phases:
            config[name].num_epochs = config[name].learning_rate = 1.0
        config.plain.warmup_epochs = 0.0
        check.check_config(config)
        if "plain.method" in changes:
            config.plain.update(weight=1.0, omega=1.0, threshold=0.5)
        for field, value in changes.items():
            *path, name = field.split(".")
            section = config
            for part in path:
                section = section[part]
            section[name] = value
        with pytest.raises(UserError, match=words) as error:
            check.check_config(config)
        self.one_line(error)
