"""The plan of an evaluation: what it costs, what is cut, what is kept on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import attribution
from tests import tiny_run
from train.data import dataset, folders, given
from train.measure import plan, splits
from train.measure.parts import Parts, checksum
from train.method.build import make_model

FAST = plan.Speed(seconds=1e-4, compilation=1.0, batch=64)
# EfficientNet-Lite0 at 224 pixels on two cores.
SLOW = plan.Speed(seconds=0.012, compilation=9.0, batch=16)
SIZES = plan.Sizes(images=500, phases=3, shown=2)


class ByClass(list):
    """A source of pictures, which stand class by class."""


@pytest.fixture
def by_class(monkeypatch):
    """The class of such sources."""
    monkeypatch.setattr(dataset, "BY_CLASS", (ByClass,))
    return ByClass


class TestChoose:
    def test_what_fits_is_made_whole(self):
        options = plan.Options()
        sizes = SIZES._replace(images=2000)
        assert plan.total_seconds(options, sizes, FAST) < plan.COMPLETE
        assert plan.choose(options, sizes, FAST) == options

    @pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
    def test_what_does_not_fits_in_two_minutes(self, factor):
        options = plan.Options(limit=500)
        speed = SLOW._replace(seconds=factor * SLOW.seconds)
        assert plan.total_seconds(options, SIZES, speed) > 20 * 60
        less = plan.choose(options, SIZES, speed)
        assert plan.total_seconds(less, SIZES, speed) <= plan.BUDGET
        assert less.limit == 500 and less.num_images >= plan.FEWEST
        assert set(less.methods) < set(attribution.METHODS)
        assert "hirescam" in less.methods

    def test_programs_that_are_there_leave_time_for_images(self):
        found = SLOW._replace(found=True)
        options = plan.Options()
        without = plan.choose(options, SIZES, SLOW)
        assert plan.total_seconds(without, SIZES, found) < plan.BUDGET
        assert (plan.choose(options, SIZES, found).num_images or SIZES.images) > (
            without.num_images
        )

    def test_the_slowest_still_measures_the_fewest(self):
        speed = SLOW._replace(seconds=10.0)
        less = plan.choose(plan.Options(), SIZES, speed)
        assert less.num_images == plan.FEWEST and less.num_perturbed == 0
        few = plan.choose(plan.Options(), SIZES._replace(images=5), speed)
        assert few.num_images is None

    def test_never_more_than_asked(self):
        options = plan.Options(num_method_images=3, num_sanity=2, num_statistics=10)
        less = plan.choose(options, SIZES, SLOW)
        assert (less.num_method_images, less.num_sanity) == (3, 2)
        assert less.num_statistics == 10

    def test_more_time_is_never_less(self):
        numbers = [
            plan.choose(plan.Options(), SIZES, SLOW._replace(seconds=s)).num_images
            or SIZES.images
            for s in (0.04, 0.02, 0.012)
        ]
        assert numbers == sorted(numbers)


class TestParts:
    def test_numbers_are_those_of_the_passes(self):
        options = plan.Options(
            num_perturbed=5,
            num_sensitivity=0,
            num_method_images=9,
            num_sanity=4,
            methods=("hirescam",),
        )
        parts = plan.parts_of(list(range(20)), options)
        assert {name: len(part) for name, part in parts.items()} == {
            "measures": 20,
            "perturbed": 5,
            "sensitivity": 0,
            "methods": 9,
            "sanity": 4,
        }
        sizes = plan.Sizes(20, 2, 1)
        # 20 images are two batches of 16, 5 are one; 9 + 4 maps.
        expected = 2 * (6 * 32 + 180 * 16) + (3 + 5) * (9 + 4)
        assert plan.total_passes(options, sizes, 16) == expected

    def test_drawn_is_the_same_part_of_all_classes(self):
        source = list(range(100))  # as a folder's: class by class
        part = plan.drawn(source, 20)
        chosen = [part[i] for i in range(len(part))]
        assert len(set(chosen)) == 20 and min(chosen) < 25 and max(chosen) > 75
        again = plan.drawn(source, 20)
        assert chosen == [again[i] for i in range(20)]
        assert chosen == list(part.places)
        assert plan.drawn(source, None) is source and plan.drawn(source, 100) is source

    def test_the_first_pictures_of_a_folder_are_of_all_classes(self, by_class):
        source = by_class(range(100))
        options = plan.Options(num_perturbed=20, num_method_images=100, num_sanity=8)
        parts = plan.parts_of(source, options)
        found = {
            name: [part[i] for i in range(len(part))] for name, part in parts.items()
        }
        for name in ("perturbed", "sensitivity", "sanity"):
            assert min(found[name]) < 25 and max(found[name]) > 75
            assert found[name] == found["measures"][: len(found[name])]
        assert found["methods"] == found["measures"] == list(parts["measures"].places)
        assert sorted(found["measures"]) == source
        limited = dataset.first_examples(source, 20)
        assert list(limited.places) == found["perturbed"]
        assert list(plan.drawn(limited, 5).places) != found["perturbed"][:5]
        assert set(plan.drawn(limited, 5).places) < set(found["perturbed"])

    def test_which_sources_are_by_class(self):
        for kind in (folders.PictureSource, given.GivenSource):
            assert issubclass(kind, dataset.BY_CLASS)
        assert dataset.mixed([1, 2]) == [1, 2]

    def test_statistics_of_features_are_of_all_classes(self, by_class, monkeypatch):
        config, seen = tiny_run.make_config("nowhere"), []
        source = by_class(
            {"image": np.full((48, 48, 3), i, np.uint8), "label": i // 25}
            for i in range(100)
        )
        model = make_model(config, 10)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 48, 48, 3)))

        def update(_, stats, images, mask, **unused):
            seen.extend(images[:, 0, 0, 0])
            return stats

        monkeypatch.setattr(splits, "_update_stats", update)
        splits.data_set_stats(config, model, variables, source, num_examples=20)
        assert len(set(seen)) == 32 and min(seen) < 25 and max(seen) > 75


class TestKept:
    def test_a_part_is_made_once(self, tmp_path):
        values = {"a/b": np.arange(3.0), "c": np.float64(np.nan)}
        folder = tmp_path / "parts"
        kept = Parts(folder, {"of": (1, 2)})
        assert kept.plan is None and not folder.exists()
        kept.start({"n": 3})
        assert not kept.has("x/y") and kept.get("x/y", lambda: values) is values
        kept = Parts(folder, {"of": [1, 2]})
        assert kept.plan == {"n": 3} and kept.has("x/y")
        found = kept.get("x/y", pytest.fail)
        np.testing.assert_equal(found, values)
        kept.clear()
        assert not folder.exists()

    def test_of_something_else_or_damaged_is_made_again(self, tmp_path):
        kept = Parts(tmp_path, {"of": 1})
        kept.start({})
        kept.get("x", lambda: {"a": np.ones(2)})
        (path,) = tmp_path.glob("*.npz")
        path.write_bytes(path.read_bytes()[:40])
        assert kept.get("x", lambda: {"a": np.zeros(1)})["a"].shape == (1,)
        assert Parts(tmp_path, {"of": 2}).plan is None
        assert not tmp_path.exists()

    def test_without_a_folder_nothing_is_kept(self):
        kept = Parts()
        kept.start({})
        assert kept.get("x", lambda: 7) == 7 and not kept.has("x")

    def test_other_weights_have_another_checksum(self):
        weights = {"a": np.ones(3, np.float32), "b": np.zeros(2)}
        assert checksum(weights) == checksum(dict(weights))
        assert checksum(weights) != checksum({**weights, "b": np.array([0.0, 1e-9])})


def test_the_first_batch_tells_the_speed(evaluated):
    run, source, _, _ = evaluated
    speed = plan.time_first_batch(
        run.config, run.model, run.states["plain"].variables, source
    )
    assert 0 < speed.seconds < 1 and speed.compilation >= 0 and speed.batch == 16
    assert dataclasses.is_dataclass(plan.choose(plan.Options(), SIZES, speed))
