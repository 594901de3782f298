"""The whole road from a folder of pictures to a judged run, on forty drawn ones."""

import csv
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import images, trained
from ibsgl_jax.app import cli
from tests import pictures, tiny_run
from train.data import dataset
from train.errors import ConfigError, DatasetError, UserError
from train.run import choose, loop, results, saved_run, start

PHASES = ("head", "plain", "control", "guided")


def draw(label, seed):
    """A bright square on dim noise: left for "left", right for "right"."""
    rng = np.random.default_rng([label, seed])
    pixels = rng.integers(0, 60, (32, 40, 3), np.uint8)
    x, y = int(rng.integers(6, 12)) + 16 * label, int(rng.integers(6, 18))
    pixels[y : y + 8, x : x + 8] += np.uint8(180)
    return Image.fromarray(pixels)


def fill(folder, number=20):
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir(parents=True)
        for seed in range(number):
            draw(label, seed).save(folder / name / f"{seed}.png")
    return folder


def make_config(**changes):
    """configs/photos.py with a network of seconds."""
    config = tiny_run.make_photos_config()
    config.head.init = "random"
    config.head.num_epochs = 1.0
    config.plain.num_epochs = 6.0
    config.control.num_epochs = 1.0
    config.guided.bottleneck.num_steps = 3
    config.class_weights = 0.5
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A run of all phases: its folder of pictures, its workdir, its states."""
    top = tmp_path_factory.mktemp("road")
    folder = fill(top / "squares")
    outcome = loop.train_and_evaluate(make_config(data=str(folder)), top / "run")
    return folder, top / "run", outcome


class TestRoad:
    def test_what_was_open_is_chosen_and_recorded(self, road):
        config = json.loads((road[1] / "config.json").read_text())
        # Pictures of 32 pixels; 28 to learn from, at least four batches an epoch, in
        # multiples of the devices.
        assert config["image_size"] == 32
        assert config["batch_size"] == jax.device_count()
        assert config["head"]["learning_rate"] == 0.003
        assert config["plain"]["learning_rate"] == 0.01  # as it was given
        assert config["data"] == str(road[0])

    def test_the_splits_can_be_read(self, road):
        with open(road[1] / "splits.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 40
        assert {row["label"] for row in rows} == {"left", "right"}
        assert {row["split"] for row in rows} == {"train", "validation", "test"}

    def test_the_head_alone_learns_in_its_phase(self, road):
        head, plain = (road[2][name][0].params for name in ("head", "plain"))
        config = saved_run.load_config(road[1])
        start = loop.initial_state(
            config,
            config.head,
            {},
            *make_model_and_tx(config),
        ).params
        same = {
            name: all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(start[name]),
                    jax.tree.leaves(head[name]),
                    strict=True,
                )
            )
            for name in start
        }
        assert same.pop("fc") is False
        assert all(same.values()) and len(same) >= 3
        assert not np.array_equal(head["conv1"]["kernel"], plain["conv1"]["kernel"])

    def test_the_better_phase_is_gone_on_from(self, road):
        starts = json.loads((road[1] / "starts.json").read_text())
        assert set(starts) == {"control", "guided"}
        known = starts["guided"]["validation"]
        assert set(known) == {"head", "plain"}
        nll = {name: each["nll"] for name, each in known.items()}
        assert nll[starts["guided"]["init"]] == min(nll.values())

    def test_the_model_keeps_its_class_names(self, road):
        for phase in PHASES:
            model = trained.load(road[1] / "models" / f"{phase}.npz")
            assert model.class_names == ("left", "right")
            assert model.preprocessing.fit == "squash"

    def test_it_is_explained_as_it_was_trained(self, road, tmp_path):
        """The whole picture, squashed, without a flag that says so."""
        photo = str(road[0] / "left" / "0.png")
        out = tmp_path / "maps"
        arguments = [photo, f"--checkpoint={road[1]}", "--method=hirescam"]
        assert cli.main(["explain", *arguments, f"--out={out}"]) == 0
        told = json.loads((out / "explanation.json").read_text())
        assert told["fit"] == "squash"
        image = images.prepare(
            images.read(photo),
            trained.load(road[1] / "models/guided.npz").preprocessing,
            fit="squash",
        )
        assert told["photos"][0]["box"] == list(image.box)

    def test_sanity_is_in_the_results(self, road):
        results = json.loads((road[1] / "results.json").read_text())
        assert results["class_names"] == ["left", "right"]
        found = results["sanity"]["plain"]
        assert np.sum(found["confusion"]) == results["num_images"]
        assert found["accuracy"] == pytest.approx(
            results["phases"]["plain"]["accuracy"]
        )
        assert found["chance"] == 0.5

    def test_the_first_picture_rows_are_of_both_classes(
        self, road, tmp_path, monkeypatch
    ):
        config = saved_run.load_config(road[1])
        config.picture_phases = ("plain", "guided")
        data = dataset.load_data(config, road[1])
        data = data._replace(test=data.train)  # 28, one class after the other
        model, _ = make_model_and_tx(config)
        states = {"plain": road[2]["plain"][0]}
        drawn = []

        def keep_labels(config, model, states, data, workdir, *, phases):
            drawn.extend(int(data.test[i]["label"]) for i in range(4))

        monkeypatch.setattr(results.figures, "write_before_after", keep_labels)
        results.evaluate_phases(config, model, states, data, tmp_path)
        assert set(drawn) == {0, 1}

    def test_a_resumed_run_takes_what_it_chose(self, road):
        before = (road[1] / "config.json").read_bytes()
        # The pictures' number would choose the same; a recorded value must win.
        config = make_config(data=str(road[0]))
        assert config.image_size == 0
        loop.train_and_evaluate(config, road[1], table=False)
        assert (road[1] / "config.json").read_bytes() == before

    def test_it_is_read_back(self, road):
        run = saved_run.Run(road[1])
        assert run.data.class_names == ("left", "right")
        assert not run.notes
        assert len(saved_run.open_split(run, "validation")) == len(run.data.validation)
        with pytest.raises(ConfigError, match="no split 'rest'"):
            saved_run.open_split(run, "rest")

    def test_other_pictures_are_another_run(self, road, tmp_path):
        folder = shutil.copytree(road[0], tmp_path / "squares")
        draw(0, 99).save(folder / "left" / "new.png")
        config = make_config()
        config.data = str(road[0])
        data = dataset.load_data(saved_run.load_config(road[1]))
        assert dataset.changed_pictures(data, road[1]) == ""
        more = saved_run.load_config(road[1])
        more.data = str(folder)
        told = dataset.changed_pictures(dataset.load_data(more), road[1])
        assert "1 new" in told and "left/new.png" in told


def make_model_and_tx(config):
    from train.method.build import make_model, make_optimizer

    return make_model(config, 2), make_optimizer(config.optimizer, lambda step: 0.0)


def test_examples_from_python(tmp_path):
    examples = [
        {"image": np.asarray(draw(label, seed)), "label": name}
        for label, name in enumerate(("left", "right"))
        for seed in range(20)
    ]
    config = make_config(phases=("plain",))
    config.plain.init = "random"
    config.plain.num_epochs = 1.0
    outcome = loop.train_and_evaluate(config, tmp_path / "run", data=examples)
    assert int(outcome["plain"][0].step) > 0
    assert 0.0 <= outcome["plain"][1]["accuracy"] <= 1.0
    with pytest.raises(ConfigError, match="given from Python"):
        saved_run.Run(tmp_path / "run")
    assert saved_run.Run(tmp_path / "run", data=examples).data.num_classes == 2


def command(*arguments, cwd):
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=120,
    )


def test_the_command_refuses_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    config = os.path.abspath("configs/photos.py")
    done = command(f"--config={config}", "--config.data=empty", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/empty: the folder is empty"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


WRONG = {
    "no data": ({}, "--config.data="),
    "a folder as dataset": ({"dataset": "."}, "give it as --config.data="),
    "a split that is none": ({"test_split": "test[:10%]"}, "pictures have train"),
    "a transform that leaves another size": ({"fit": "crop"}, "resize_center"),
    "no such fit": ({"fit": "stretch"}, "fit='stretch'"),
    "too large a batch": ({"batch_size": 64}, "lower --config.batch_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_leave_nothing(name, tmp_path):
    changes, told = WRONG[name]
    folder = pictures.fill(tmp_path / "photos")
    data = "" if name in ("no data", "a folder as dataset") else str(folder)
    config = make_config(data=data, **changes)
    if changes.get("dataset"):
        config.image_size, config.batch_size = 32, 8
        for phase in PHASES:
            config[phase].num_epochs = config[phase].learning_rate = 1.0
    with pytest.raises(UserError) as info:
        loop.train_and_evaluate(config, tmp_path / "run")
    assert told in str(info.value)
    assert not (tmp_path / "run").exists()


class TestClasses:
    """What is said of unequal classes before the first step."""

    @pytest.fixture
    def told(self, tmp_path, monkeypatch, capsys):
        pictures.fill(tmp_path / "photos", classes=("rare",), number=6)
        pictures.fill(tmp_path / "photos", classes=("usual",), number=40, first=500)

        def tell(**changes):
            config = make_config(data=str(tmp_path / "photos"), **changes)
            config, _ = choose.complete(config, tmp_path / "run")
            data = dataset.load_data(config, tmp_path / "run")
            loop._tell(config, [], data, {})
            return data, capsys.readouterr().out

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tell

    def test_it_is_shown(self, told):
        data, text = told(class_weights=0.0)
        few, many = (
            sum(row[1:] == (label, "", "train") for row in data.pictures.rows)
            for label in ("rare", "usual")
        )
        rows = [line.split() for line in text.splitlines()]
        assert ["rare", str(few)] in [row[:2] for row in rows]
        assert ["usual", str(many)] in [row[:2] for row in rows]
        assert (
            f"note: the classes are unequal: {many} pictures of usual to learn from "
            f"and {few} of rare; --config.class_weights=1 makes them count alike"
        ) in text

    def test_it_is_weighted_on_request(self, told):
        data, text = told(class_weights=1.0)
        rare, usual = data.pictures.class_weights()
        assert rare > 4 * usual
        line = f"weights of the classes in the loss: rare {rare:.2g}, usual {usual:.2g}"
        assert line in text and "unequal" not in text


def test_pictures_that_vanish_in_the_run_are_one_line(tmp_path, monkeypatch):
    """Those in the cache are not missed; without it the run ends, and can go on."""
    folder = fill(tmp_path / "squares", number=8)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    config = make_config(phases=("plain",), data=str(folder))
    config.plain.init = "random"
    away = tmp_path / "away"

    def tell(*args):  # when all is checked
        folder.rename(away)

    monkeypatch.setattr(loop, "_tell", tell)
    outcome = loop.train_and_evaluate(config, tmp_path / "run")
    assert 0.0 <= outcome["plain"][1]["accuracy"] <= 1.0
    away.rename(folder)
    monkeypatch.setattr(loop, "_tell", lambda *args: (tell(), shutil.rmtree(cache)))
    with pytest.raises(DatasetError, match="no such file; it was there when") as info:
        loop.train_and_evaluate(config, tmp_path / "other")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("field, best", [("nll", "plain"), ("accuracy", "head")])
def test_best_is_the_likeliest(field, best, tmp_path):
    """Of a run that an earlier version began, the most accurate."""
    config = make_config(phases=("head", "plain", "control"))
    scores = {
        "head": {"accuracy": 0.75, "nll": 0.52},
        "plain": {"accuracy": 0.74, "nll": 0.44},
    }
    if field == "accuracy":
        del scores["plain"]["nll"]
    plan = types.SimpleNamespace(name="control", phase=config.control)
    plan._replace = lambda phase: phase
    assert start.choose_start(config, plan, scores, tmp_path).init == best
    assert config.control.init == "best"
    told = json.loads((tmp_path / "starts.json").read_text())
    assert told == {"control": {"init": best, "validation": scores}}


def test_best_needs_something_to_choose_from(tmp_path):
    config = make_config(data=str(pictures.fill(tmp_path / "photos")))
    config.phases = ("control",)
    with pytest.raises(ConfigError, match=r"control\.init='best'"):
        loop.train_and_evaluate(config, tmp_path / "run")


def test_a_workdir_in_the_folder(tmp_path):
    folder = pictures.fill(tmp_path / "photos")
    with pytest.raises(DatasetError, match="lies in the data folder"):
        loop.train_and_evaluate(make_config(data=str(folder)), folder / "run")
    assert not (folder / "run").exists()


def test_a_run_of_an_earlier_version_is_read(photo_digits_dir, tmp_path):
    """Its config.json has none of the fields of pictures."""
    config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
    tiny_run.save_untrained(config, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    recorded = json.loads(path.read_text())
    for field in ("data", "fit", "class_weights", "trackers"):
        del recorded[field]
    for phase in ("plain", "control", "guided"):
        del recorded[phase]["layers"]
    del recorded["link"], recorded["guided"]["guidance"]["move"]
    del recorded["guided"]["mask_first"], recorded["guided"]["mask_share"]
    path.write_text(json.dumps(recorded))
    run = saved_run.Run(tmp_path / "old")
    assert run.data.class_names == tuple("0123456789")
    assert len(saved_run.open_split(run, "validation")) == 24
    assert dataset.class_weights(run.config, run.data) is None
    run.config.class_weights = 1.0
    weights = dataset.class_weights(run.config, run.data)
    assert len(weights) == 10 and min(weights) > 0
