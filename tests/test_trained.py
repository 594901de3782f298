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


class TestFind:
    def test_folder_means_its_newest_model(self, saved):
        path, _, _ = saved
        assert trained.find(path.parent.parent) == path
        assert trained.find(path) == path

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
