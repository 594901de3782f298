import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import feature_stats, models, trained
from ibsgl_jax.pretrained import Preprocessing
from tests.test_models import random_variables

PREPROCESSING = Preprocessing(48, 48, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def saved(tmp_path):
    model = models.create("small_resnet", num_classes=3)
    images = jnp.zeros((1, 48, 48, 3))
    variables = random_variables(model, images)
    stats = feature_stats.update(
        feature_stats.init((8, 8, 64)),
        jax.random.uniform(jax.random.key(0), (4, 8, 8, 64)),
    )
    path = tmp_path / "run" / "models" / "guided.npz"
    trained.save(
        path,
        variables,
        model_name="small_resnet",
        model_options={},
        num_classes=3,
        preprocessing=PREPROCESSING,
        stats=stats,
    )
    return path, variables, stats


class TestRoundTrip:
    def test_everything_comes_back(self, saved):
        path, variables, stats = saved
        loaded = trained.load(path)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
        jax.tree.map(np.testing.assert_array_equal, loaded.stats, stats)
        assert loaded.preprocessing == PREPROCESSING
        assert loaded.class_names == ("class 0", "class 1", "class 2")
        assert loaded.link == "softmax"
        assert loaded.model == models.create("small_resnet", num_classes=3)

    def test_empty_statistics_are_left_out(self, saved, tmp_path):
        _, variables, _ = saved
        path = tmp_path / "plain.npz"
        trained.save(
            path,
            variables,
            model_name="small_resnet",
            model_options={},
            num_classes=3,
            preprocessing=PREPROCESSING,
            stats=feature_stats.init((8, 8, 64)),
        )
        assert trained.load(path).stats is None


class TestClassNames:
    def test_come_back(self, saved, tmp_path):
        _, variables, _ = saved
        path = tmp_path / "named.npz"
        options = dict(model_name="small_resnet", model_options={}, num_classes=3)
        options |= dict(preprocessing=PREPROCESSING)
        trained.save(path, variables, class_names=("a", "b $x$", "c"), **options)
        assert trained.load(path).class_names == ("a", "b $x$", "c")
        with pytest.raises(ValueError, match="2 class names for 3 classes"):
            trained.save(path, variables, class_names=("a", "b"), **options)


class TestFind:
    def test_a_file_stands_for_itself(self, saved):
        path, _, _ = saved
        assert trained.find(path) == path

    def make_run(self, folder, phases, finished):
        (folder / "models").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"phases": phases}))
        for phase in finished:
            (folder / "models" / f"{phase}.npz").touch()
        return folder

    def test_the_last_finished_phase_whatever_the_time_stamps(self, tmp_path):
        phases = ["plain", "guided", "control", "later"]
        run = self.make_run(tmp_path / "run", phases, phases[:3])
        for age, phase in enumerate(["control", "guided", "plain"]):
            os.utime(run / "models" / f"{phase}.npz", (age, age))
        assert trained.find(run).stem == "control"
        shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile)
        assert trained.find(tmp_path / "copy").stem == "control"

    @pytest.mark.parametrize("config", [None, "{", "[]", '{"phases": 3}', "{}"])
    def test_without_a_list_of_phases(self, tmp_path, config):
        run = self.make_run(tmp_path / "run", [], ["plain"])
        (run / "config.json").unlink()
        if config is not None:
            (run / "config.json").write_text(config)
        assert trained.find(run).stem == "plain"  # the only one
        (run / "models" / "guided.npz").touch()
        with pytest.raises(ValueError, match="name one of .*guided.npz, plain.npz"):
            trained.find(run)

    def test_nothing_there_is_one_line(self, tmp_path):
        with pytest.raises(ValueError, match="no finished run"):
            trained.find(tmp_path)
        with pytest.raises(ValueError, match="no such file or folder"):
            trained.find(tmp_path / "absent")


class TestBadFiles:
    def test_foreign_and_damaged_files_are_one_line(self, saved, tmp_path):
        path, _, _ = saved
        text = tmp_path / "a.npz"
        text.write_text("not a zip")
        foreign = tmp_path / "b.npz"
        np.savez(foreign, x=np.zeros(3))
        cut = tmp_path / "c.npz"
        cut.write_bytes(path.read_bytes()[:1000])
        for file in (text, foreign, cut):
            with pytest.raises(ValueError, match="not a model file") as caught:
                trained.load(file)
            assert "\n" not in str(caught.value)

    def test_no_file_at_all(self, tmp_path):
        (tmp_path / "empty.npz").touch()
        for path in (tmp_path / "empty.npz", tmp_path, tmp_path / "absent.npz"):
            with pytest.raises(ValueError, match="not a model file"):
                trained.load(path)

    @pytest.mark.parametrize("about", ["[]", "3", "null", "{}", "{", '"text"'])
    def test_a_description_that_is_none(self, tmp_path, about):
        np.savez(tmp_path / "a.npz", about=about)
        with pytest.raises(ValueError, match="a.npz: (not a model file|format)"):
            trained.load(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        "field, value, line",
        [
            ("model", "resnet5", "no model 'resnet5'"),
            ("model", ["resnet18"], "not a whole model file"),
            ("model", None, "no field 'model'"),
            ("options", {"colour": "red"}, "colour"),
            ("options", {"num_filters": 10**9}, "options: num_filters"),
            ("options", {"stage_sizes": [10**5]}, "options: stage_sizes"),
            ("options", [1], "not a whole model file"),
            ("num_classes", -3, "num_classes -3"),
            ("num_classes", "3", "num_classes '3'"),
            ("num_classes", 4, "has shape|class_names"),
            ("preprocessing", {}, "not a whole model file"),
            ("preprocessing", {"size": 0}, "not a whole model file"),
            ("class_names", ["a"], "not 3 names"),
            ("class_names", 3, "not 3 names"),
            ("link", "probit", "link='probit': choose one of"),
        ],
    )
    def test_a_bad_field_is_one_line(self, saved, tmp_path, field, value, line):
        path, _, _ = saved
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        if value is None:
            del about[field]
        else:
            about[field] = value
        np.savez(tmp_path / "bad.npz", about=json.dumps(about), **arrays)
        with pytest.raises(ValueError, match=line) as caught:
            trained.load(tmp_path / "bad.npz")
        assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)

    def test_arrays_of_another_model_are_one_line(self, saved, tmp_path):
        path, _, _ = saved
        with np.load(path) as file:
            arrays = dict(file)
        name = next(k for k in arrays if k.startswith("params/"))
        stats = "feature_stats/mean"
        for change, line in (
            ({name: None}, "no array"),
            ({name: np.zeros(2)}, r"has shape \(2,\)"),
            ({name: np.full_like(arrays[name], np.nan)}, "finite"),
            ({"params/more": np.zeros(2)}, "no place in the model"),
            ({stats: arrays[stats][:2]}, "feature_stats of shapes"),
            ({stats: None}, "nbound|missing|mean"),
        ):
            changed = {k: v for k, v in (arrays | change).items() if v is not None}
            np.savez(tmp_path / "bad.npz", **changed)
            with pytest.raises(ValueError, match=line) as caught:
                trained.load(tmp_path / "bad.npz")
            assert "\n" not in str(caught.value)

    def test_a_bomb_is_not_unpacked(self, tmp_path):
        np.savez_compressed(tmp_path / "bomb.npz", about=np.zeros(10**7))
        with pytest.raises(ValueError, match="many times its size"):
            trained.load(tmp_path / "bomb.npz")

    def test_a_file_of_an_earlier_version_is_read(self, saved, tmp_path):
        path, _, _ = saved
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        del about["class_names"]
        np.savez(tmp_path / "old.npz", about=json.dumps(about), **arrays)
        loaded = trained.load(tmp_path / "old.npz")
        assert loaded.class_names == ("class 0", "class 1", "class 2")
