"""What is chosen for a field that is left open."""

import jax
import pytest

from configs import default, photos
from tests import pictures
from train.run import choose


class TestComplete:
    def test_nothing_is_open_in_a_run_of_tfds(self, tmp_path):
        config = default.get_config()
        config.batch_size = 0  # a mistake there, for the check to tell
        same, chosen = choose.complete(config, tmp_path)
        assert not chosen and same.batch_size == 0

    def test_a_field_that_is_given_stays(self, tmp_path):
        config = photos.get_config()
        config.data = str(pictures.fill(tmp_path / "photos", number=30))
        config.batch_size = 24
        done, chosen = choose.complete(config, tmp_path / "run")
        assert done.batch_size == 24 and "batch_size" not in chosen
        assert config.image_size == 0  # the caller's is left as it was
        # 32 pixels high: EfficientNet's least, not its 224.
        assert done.image_size == chosen["image_size"] == 96
        assert set(chosen) == {
            "image_size",
            *(f"{p}.{f}" for p in config.phases for f in choose.OPEN_IN_PHASES),
        }

    def test_a_run_that_goes_on_takes_its_own(self, tmp_path):
        config = photos.get_config()
        config.data = str(pictures.fill(tmp_path / "photos"))
        first, _ = choose.complete(config, tmp_path / "run")
        first.image_size, first.plain.num_epochs = 128, 7.0
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(first.to_json())
        again, _ = choose.complete(config, tmp_path / "run")
        assert again.to_json() == first.to_json()

    def test_a_damaged_record_is_told_elsewhere(self, tmp_path):
        (tmp_path / "config.json").write_text("[")
        config = photos.get_config()
        config.data = str(pictures.fill(tmp_path / "photos"))
        assert choose.complete(config, tmp_path)[0].image_size == 96

    @pytest.mark.parametrize("data", ["", "gone", "~nobody-of-this-name", "\0"])
    def test_without_data_the_fields_are_no_faults(self, data, tmp_path):
        config = photos.get_config()
        config.data, config.batch_size = data, -1
        done, chosen = choose.complete(config, tmp_path)
        assert done.batch_size == -1 and done.image_size >= 96
        assert min(chosen.values()) > 0
        examples = iter([])  # no length
        assert choose.complete(config, tmp_path, examples=examples)[0].image_size > 0


@pytest.mark.parametrize("names", [("train", "validation"), ("Training", "val")])
def test_pictures_to_learn_from_under_any_of_their_names(names):
    train, validation = names
    examples = {train: range(400), validation: range(40), "test": range(40)}
    assert choose._number_and_side(photos.get_config(), examples) == (400, None)


class TestRules:
    def test_batches_are_shared_among_the_devices_and_an_epoch_has_four(self):
        for number in (8, 40, 400, 4000, 40_000):
            size = choose._batch_size(number, is_cpu=True)
            assert size % jax.device_count() == 0
            assert size <= max(jax.device_count(), number / 4)

    def test_more_pictures_fewer_epochs(self):
        config = photos.get_config()
        config.batch_size = 16
        epochs = [
            choose._choose(config, "plain.num_epochs", number, None)
            for number in (50, 400, 4000)
        ]
        assert epochs == [8.0, 5.0, 2.0]
        assert choose._choose(config, "guided.num_epochs", 400, None) == 2.0

    def test_sizes(self):
        lite = "efficientnet_lite0"
        assert choose._image_size(lite, 400, 3000, True) == 160
        assert choose._image_size(lite, 5000, 3000, True) == 128
        assert choose._image_size(lite, 5000, 3000, False) == 224
        assert choose._image_size(lite, 400, 120, True) == 128
        assert choose._image_size(lite, 400, 120, False) == 128
        assert choose._image_size("small_resnet", 400, 3000, True) == 96


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "about 10 seconds"), (600, "about 10 minutes"), (9000, "about 2.5 hours")],
)
def test_in_words(seconds, words):
    assert choose.in_words(seconds) == words
