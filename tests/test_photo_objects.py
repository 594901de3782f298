"""Photographed objects: what a split owns, the mask, and what is said without them."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from train.data import photos, sources
from train.data.photo_objects import cutouts
from train.data.photo_objects import photo_objects_dataset_builder as photo_objects
from train.errors import DatasetError

SPLITS = tuple(photos.SHARES)
CONFIGS = {
    name: photo_objects.make_config(name) for name in ("independent", "families")
}
GREEN = np.array([0, 200, 0])


def decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def all_pictures(name):
    """(cut-outs of classes, things of no class, backgrounds) of all splits."""
    parts = [photo_objects.pictures(CONFIGS[name], split) for split in SPLITS]
    of_classes, others, families = zip(*parts, strict=True)
    return (
        [p for split in of_classes for names in split for p in names],
        [p for split in others for p in split],
        [p for split in families for names in split for p in names],
    )


@pytest.fixture(scope="module", autouse=True)
def share(tmp_path_factory):
    """Drawn pictures in place of the packages': green ellipses, red boxes, grey noise.

    A margin and a coloured transparent part are what a cut-out has.
    """
    folder = tmp_path_factory.mktemp("share")
    parts = zip(*map(all_pictures, CONFIGS), strict=True)
    of_classes, others, backgrounds = (set(sum(lists, [])) for lists in parts)
    draw = np.random.default_rng(0)
    for path in (*of_classes, *others):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGBA", (60, 40), (0, 0, 255, 0))
        if path in of_classes:
            ImageDraw.Draw(image).ellipse((5, 5, 49, 33), fill=(*GREEN, 255))
        else:
            ImageDraw.Draw(image).rectangle((5, 5, 49, 33), fill=(255, 0, 0, 255))
        image.save(folder / path)
    for path in backgrounds:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        grey = draw.integers(0, 60, (80, 120, 1), dtype=np.uint8).repeat(3, axis=2)
        Image.fromarray(grey).save(folder / path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo_objects, "SHARE", folder)
        yield folder


@pytest.fixture(scope="module")
def examples(share):
    config = photo_objects.make_config(image_size=64)
    return [photo_objects.generate_example(config, "train", i) for i in range(300)]


class TestSplits:
    def test_no_picture_is_in_two_splits_or_twice_in_one(self):
        for paths in itertools.chain(*map(all_pictures, CONFIGS)):
            assert len(paths) == len(set(paths))

    def test_things_beside_are_of_no_class(self):
        of_classes, others, _ = all_pictures("independent")
        assert not set(of_classes) & set(others)

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_class_has_cutouts(self, split):
        config = CONFIGS["independent"]
        of_classes, others, (backgrounds,) = photo_objects.pictures(config, split)
        assert len(of_classes) == 8 and all(len(names) >= 2 for names in of_classes)
        assert len(others) >= 6 and len(backgrounds) >= 4

    @pytest.mark.parametrize("split", SPLITS)
    def test_kinds_have_the_cutouts_of_their_classes(self, split):
        of_classes, _, _ = photo_objects.pictures(CONFIGS["independent"], split)
        kinds, _, families = photo_objects.pictures(CONFIGS["families"], split)
        first = dict(zip(cutouts.CLASSES, of_classes, strict=True))
        assert kinds[0] == first["bird"] + first["hoofed"] + first["carnivore"]
        assert len(families) == 2 and all(len(names) >= 2 for names in families)

    def test_seen_has_the_objects_of_train_in_scenes_of_validation(self):
        seen, train, validation = (
            photo_objects.pictures(CONFIGS["independent"], split)
            for split in ("seen", "train", "validation")
        )
        assert seen == (train[0], *validation[1:])

    @pytest.mark.parametrize("split", cutouts.SPLITS)
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_a_split_opens_its_own_only(self, config, split, share, monkeypatch):
        opened = set()
        for name in ("_open_cutout", "_open_background"):
            original = getattr(photo_objects, name)

            def spy(path, original=original):
                opened.add(str(path.relative_to(share)))
                return original(path)

            monkeypatch.setattr(photo_objects, name, spy)
        for i in range(20):
            photo_objects.generate_example(config, split, i)
        of_classes, others, families = photo_objects.pictures(config, split)
        own = {*itertools.chain(*of_classes, *families), *others}
        assert len(opened) > 10 and opened <= own

    def test_packages_have_every_picture(self, monkeypatch):
        """Where Debian's packages are installed."""
        monkeypatch.setattr(photo_objects, "SHARE", photo_objects.Path("/usr/share"))
        if not (photo_objects.SHARE / cutouts.STAMPS).is_dir():
            pytest.skip("tuxpaint-stamps-default is not installed")
        for config in CONFIGS.values():
            photo_objects.check_installed(config)


class TestGenerateExample:
    def test_depends_on_seed_split_and_index_only(self):
        config = photo_objects.make_config(seed=3)
        fewer = photo_objects.make_config(seed=3, num_train=10)
        example = photo_objects.generate_example(config, "train", 7)
        assert photo_objects.generate_example(fewer, "train", 7) == example
        for other in (
            photo_objects.generate_example(config, "train", 8),
            photo_objects.generate_example(config, "test", 7),
            photo_objects.generate_example(config, "seen", 7),
            photo_objects.generate_example(photo_objects.make_config(), "train", 7),
        ):
            assert other["image"] != example["image"]

    def test_mask_is_where_the_object_shows(self, examples):
        """It lies above the thing beside it, and its edge has its own colour."""
        for example in examples[:50]:
            image, mask = decode(example["image"]), decode(example["mask"]) > 0
            inside = np.abs(image[mask].astype(int) - GREEN).max(-1)
            assert np.mean(inside < 60) > 0.8  # the rest: an edge
            assert image[..., 2].max() < 130  # no blue of transparent pixels
            greenish = (image[..., 1] > 150) & (image[..., 0] < 60)
            assert np.mean(greenish[~mask]) < 0.01

    def test_box_is_the_tight_box_of_the_mask(self, examples):
        for example in examples:
            rows, columns = np.nonzero(decode(example["mask"]))
            tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            np.testing.assert_allclose(64 * np.array(tuple(example["bbox"])), tight)

    def test_longer_side_is_a_third_to_a_half_and_places_differ(self, examples):
        boxes = np.array([tuple(example["bbox"]) for example in examples])
        longest = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        low, high = photo_objects.SIZE
        # Turned by ten degrees, and rounded to pixels.
        assert low - 0.04 < longest.min() and longest.max() < high + 0.05
        assert boxes[:, 0].min() < 0.1 and boxes[:, 2].max() > 0.9
        assert boxes[:, 1].min() < 0.1 and boxes[:, 3].max() > 0.9

    def test_every_class_about_as_often_on_every_background(self, examples):
        labels = np.array([example["label"] for example in examples])
        # 300 draws of 8: four standard deviations are 0.076.
        assert abs(np.bincount(labels, minlength=8) / 300 - 1 / 8).max() < 0.077
        places = {example["photo"] for example in examples}
        assert places == set(range(len(cutouts.BACKGROUNDS["train"])))


class TestFamilies:
    def families(self, config, split):
        """Whether the background is of the kind's own family in training, [300]."""
        of_first = len(cutouts.FAMILIES["water and sky"][split])
        drawn = [photo_objects.generate_example(config, split, i) for i in range(300)]
        return np.array([(e["photo"] >= of_first) == e["label"] for e in drawn])

    def test_the_background_tells_the_kind_in_train_and_misleads_elsewhere(self):
        config = photo_objects.make_config("families", image_size=32)
        # 300 draws: four standard deviations are 0.05.
        assert abs(self.families(config, "train").mean() - 0.95) < 0.05
        assert not self.families(config, "validation").any()
        assert not self.families(config, "test").any()

    def test_balanced_it_tells_nothing(self):
        config = photo_objects.make_config("families_balanced", image_size=32)
        for split in ("train", "validation"):
            assert abs(self.families(config, split).mean() - 0.5) < 0.12

    def test_labels_are_called_by_their_kind(self, tmp_path):
        sizes = {"num_train": 4, "num_validation": 2, "num_test": 2, "image_size": 32}
        builder = sources.prepare("photo_objects/families", tmp_path, **sizes)
        assert sources.class_names(builder) == ("animal", "plant")


class TestPrepare:
    def test_pipeline_prepares_it(self, tmp_path):
        sizes = {"num_train": 4, "num_validation": 2, "num_test": 2}
        builder = sources.prepare("photo_objects", tmp_path, **sizes)
        assert sources.class_names(builder) == tuple(cutouts.CLASSES)
        source = sources.open_source(builder, "train")
        assert len(source) == 4 and source[0]["image"].shape == (160, 160, 3)
        assert len(sources.open_source(builder, "seen")) == 2
        assert source[0]["mask"].max() == 1

    def test_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setattr(photo_objects, "SHARE", tmp_path / "none")
        with pytest.raises(DatasetError, match="needs .*; .*apt install tuxpaint"):
            sources.prepare("photo_objects", tmp_path / "data", num_train=4)
        assert not list((tmp_path / "data").glob("photo_objects/*/*/*.json"))

    def test_default_is_the_named_config(self):
        config = photo_objects.Builder.BUILDER_CONFIGS[0]
        assert photo_objects.make_config("independent", image_size=160) is config
        assert (
            photo_objects.make_config(image_size=48).name == "independent_image_size48"
        )
