"""Several labels per picture: how they are read, split, batched, refused."""

import numpy as np
import pytest

from configs import photos
from tests import shapes, tiny_run
from tests.pictures import fill, map_all, write_csv
from train.data import batches, dataset, folders, given, several
from train.errors import DatasetError, UserError
from train.measure import precision
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


class TestOneLabelEach:
    """A binary cross-entropy head: every class a question of its own, and said so."""

    def check(self, source, num_classes):
        for example in map_all(source):
            positives = np.eye(num_classes, dtype=np.uint8)[example["label"]]
            np.testing.assert_array_equal(example["positives"], positives)
            assert example["positives"].dtype == np.uint8

    @pytest.mark.parametrize("csv", [False, True])
    def test_a_folder(self, open_, tmp_path, csv):
        folder = fill(tmp_path / "photos")
        if csv:
            rows = [(f"{c}/{i}.png", c) for c in ("cat", "dog") for i in range(8)]
            folder = write_csv(folder, ("file", "label"), rows)
        data, plain = open_(folder), open_(folder, link="softmax")
        self.check(data.train, data.num_classes)
        (note,) = (line for line in data.warnings if "just one label" in line)
        assert "--config.link=sigmoid" in note
        assert not any("just one label" in line for line in plain.warnings)
        assert data.class_names == plain.class_names and data.rows == plain.rows

    def test_split_folders(self, open_, tmp_path):
        for split in ("train", "test"):
            fill(tmp_path / "photos" / split)
        data = open_(tmp_path / "photos")
        self.check(data.train, data.num_classes)

    def test_examples(self):
        given_ = [{**e, "label": "ab"[i % 2]} for i, e in enumerate(examples())]
        data = given.open_examples(given_, image_size=16, link="sigmoid")
        self.check(data.train, 2)
        assert any("just one label" in line for line in data.warnings)

    def test_a_data_set_of_tfds(self, photo_digits_dir):
        config = tiny_run.make_config(photo_digits_dir)
        without = dataset.load_data(config)
        config.link = "sigmoid"
        data = dataset.load_data(config)
        for source, other in zip(data[:3], without[:3], strict=True):
            self.check(source, 10)
            assert "positives" not in other[0]
            np.testing.assert_array_equal(source[0]["image"], other[0]["image"])
        assert data[3:] == without[3:]


class TestTopLabel:
    def test_is_the_accuracy_where_there_is_one_label(self):
        logits = np.random.default_rng(0).normal(size=(40, 5))
        labels = np.arange(40) % 5
        positives = np.eye(5, dtype=np.uint8)[labels]
        accuracy = np.mean(np.argmax(logits, axis=1) == labels)
        assert precision.top_label(logits, positives) == accuracy

    def test_leaves_out_an_image_without_a_label(self):
        logits = np.float32([[1, 2, 0], [3, 2, 1], [0, 0, 1]])
        positives = np.uint8([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
        assert precision.top_label(logits, positives) == 0.5
        assert np.isnan(precision.top_label(logits, np.zeros_like(positives)))


class TestRefusals:
    """One line each, with the mend."""

    def one_line(self, error):
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_lists_under_a_softmax(self):
        with pytest.raises(DatasetError, match="--config.link=sigmoid") as error:
            given.open_examples(examples(), image_size=16)
        assert "a list of labels" in self.one_line(error)

    def test_a_vector_of_0_and_1_is_no_list_of_classes(self):
        rows = [{**example, "label": np.eye(5, dtype=int)[1]} for example in examples()]
        with pytest.raises(
            DatasetError, match="names class 0 or 1 twice; give classes by"
        ):
            given.open_examples(rows, image_size=16, link="sigmoid")

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
