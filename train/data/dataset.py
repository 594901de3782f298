"""The data that a configuration names: its splits, parts of them, their batches."""

import collections
import csv
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data import folders, given, several, sources, splitting
from train.data.batches import make_eval_batches
from train.data.faults import listed, shown
from train.errors import ConfigError, Faults

LOGGER = logging.getLogger("train")
# `config.data` of a run whose examples came from Python.
GIVEN = "(given from Python)"
SPLITS_FILE = "splits.csv"
# Sources of pictures, which stand class by class, or as somebody gave them.
BY_CLASS = (folders.PictureSource, given.GivenSource)
# How many times as many pictures of one class as of another are worth a word.
UNEQUAL = 4


class Data(NamedTuple):
    """The splits of a data set, as sequences of examples.

    Attributes:
      train, validation, test: of dicts of image, label and what there is beside.
      num_classes: number of classes.
      class_names: tuple of str, or None if nobody named them.
      pictures: `folders.Pictures`, if they are somebody's own.
    """

    train: Any
    validation: Any
    test: Any
    num_classes: int
    class_names: tuple[str, ...] | None = None
    pictures: folders.Pictures | None = None


def which(config) -> list:
    """Where the data of a configuration are from."""
    options = config.dataset_options.to_dict()
    return [config.get("data", ""), config.dataset, options]


def load_data(config, workdir=None, *, examples=None, look_only=False) -> Data | None:
    """The data that a configuration names.

    Args:
      config: `data` (a folder), or `dataset` (of tfds, or an embedded one, which is
        generated if absent). Fields that a run of an earlier version lacks are off.
      workdir: of the run, for which the folder is no place.
      examples: of ``given.open_examples``, in the place of both.
      look_only: find what is wrong, and write nothing; None for data that could be
        had only by writing, or in minutes.

    Raises:
      ConfigError, DatasetError: what is wrong with them.
    """
    name = config.get("data", "")
    options = {"image_size": config.image_size, "fit": config.get("fit", "crop")}
    options |= {"link": config.get("link", "softmax"), "look_only": look_only}
    if examples is not None:
        return _of_pictures(config, given.open_examples, examples, **options)
    if name == GIVEN:
        raise ConfigError(
            "the examples of this run were given from Python; give them again, as "
            "data=... of train_and_evaluate or of saved_run.Run"
        )
    if name:
        options |= {"workdir": workdir, "progress": config.progress}
        return _of_pictures(config, folders.open_folder, name, **options)
    if not config.dataset:
        raise ConfigError(
            "no data: give the folder of your pictures, --config.data=FOLDER"
        )
    return _of_tfds(config, look_only)


def _of_pictures(config, open_fn, data, **options) -> Data | None:
    faults, pictures = Faults(), None
    wanted = {f: config[f] for f in ("train_split", "validation_split", "test_split")}
    for field, split in wanted.items():
        if split not in splitting.SPLITS:
            known = ", ".join(splitting.SPLITS)
            faults.add(field, f"={split!r}: pictures have {known}")
    with faults.gather():
        pictures = open_fn(data, **options)
    faults.stop()
    if pictures is None:
        return None
    return Data(
        *(getattr(pictures, split) for split in wanted.values()),
        num_classes=pictures.num_classes,
        class_names=pictures.class_names,
        pictures=pictures,
    )


def _of_tfds(config, look_only=False) -> Data | None:
    if Path(config.dataset).is_dir():
        raise ConfigError(
            f"dataset={config.dataset} is a folder: give it as "
            f"--config.data={config.dataset}"
        )
    try:
        builder = sources.prepare(
            config.dataset,
            config.data_dir,
            look_only=look_only,
            **config.dataset_options,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if builder is None:
        return None
    splits = (config.train_split, config.validation_split, config.test_split)
    data = Data(
        *(sources.open_source(builder, split) for split in splits),
        num_classes=sources.num_classes(builder),
        class_names=sources.class_names(builder),
    )
    if data.num_classes is None:
        raise ConfigError(f"data set {config.dataset} does not say how many classes")
    for split, source in zip(splits, data[:3], strict=True):
        if not len(source):
            raise ConfigError(f"split {split!r} of {config.dataset} is empty")
    if config.get("link", "softmax") == "softmax":
        return data
    wrapped = (several.OneOfSeveral(source, data.num_classes) for source in data[:3])
    return Data(*wrapped, *data[3:])


def train_source(config, phase, data):
    """The examples that a phase learns from, with the masks that it may see.

    They are the run's, or its own data set's; ``mask_share`` of them keep their masks.
    """
    source, share = _own_source(config, phase, data), phase.get("mask_share", 1.0)
    return source if share == 1.0 else FewMasks(source, share)


def _own_source(config, phase, data):
    if phase.dataset in ("", config.dataset):
        return data.train
    own_config = config.copy_and_resolve_references()
    own_config.dataset = phase.dataset
    if "data" in own_config:
        own_config.data = ""
    own = load_data(own_config)
    if own.num_classes != data.num_classes:
        raise ConfigError(
            f"data set {phase.dataset} of a phase has {own.num_classes} classes, "
            f"{config.dataset} {data.num_classes}: one head cannot learn both"
        )
    return own.train


def open_split(config, data, split: str):
    """The examples of a split by its name: the run's own words, or tfds's."""
    if split == config.test_split:
        return data.test
    if data.pictures is not None:
        if split not in splitting.SPLITS:
            raise ConfigError(f"no split {split!r}: {', '.join(splitting.SPLITS)}")
        return getattr(data.pictures, split)
    config = config.copy_and_resolve_references()
    config.test_split = split
    return load_data(config).test


def class_weights(config, data) -> tuple[float, ...] | None:
    """The weight of each class in the loss; None if all count the same."""
    power = config.get("class_weights", 0.0)
    if not power:
        return None
    if data.pictures is not None:
        return tuple(data.pictures.class_weights(power=power))
    labels = [data.train[i]["label"] for i in range(len(data.train))]
    return tuple(splitting.class_weights(labels, data.num_classes, power=power))


def tell_classes(config, data) -> str:
    """How unequal the classes of pictures are, or how weighted; "" for neither."""
    if config.get("link", "softmax") != "softmax":
        return ""  # and the loss knows no weights
    names, weights = data.class_names, class_weights(config, data)
    if weights:
        pairs = zip(names, weights, strict=True)
        told = listed(f"{shown(name)} {weight:.2g}" for name, weight in pairs)
        return f"weights of the classes in the loss: {told}"
    counts = collections.Counter(
        row[1] for row in data.pictures.rows if row[3] == config.train_split
    )
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many < UNEQUAL * few:
        return ""
    return (
        f"the classes are unequal: {many} pictures of {shown(most)} to learn from and "
        f"{few} of {shown(least)}; --config.class_weights=1 makes them count alike"
    )


def changed_pictures(data, workdir) -> str:
    """How the pictures differ from those that the run began with; "" if they do not."""
    path = Path(workdir) / SPLITS_FILE
    if data.pictures is None or not path.exists():
        return ""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        before = {tuple(row) for row in csv.reader(file)} - {splitting.HEADER}
    now = set(data.pictures.rows)
    if before == now:
        return ""
    names = listed(map(shown, sorted({row[0] for row in before ^ now})))
    return (
        f"the pictures are no longer those of {path}: {len(now - before)} new or "
        f"elsewhere, {len(before - now)} gone or elsewhere ({names})"
    )


class Examples:
    """Some examples of a source, by index."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"no example {index}")
        return self._source[int(self._indices[index])]

    @property
    def places(self) -> np.ndarray:
        """Of the examples in their split."""
        return places(self._source)[np.asarray(self._indices, int)]


def places(source) -> np.ndarray:
    """The places of a source's examples in the split that it is a part of: int [N]."""
    return getattr(source, "places", np.arange(len(source)))


def mixed(source):
    """The examples in an order whose first ones are of all classes, always the same.

    Pictures stand class by class and are shuffled; a data set of tfds is as it is.
    """
    return shuffled(source) if isinstance(source, BY_CLASS) else source


def shuffled(source):
    """The examples in an order that is always the same."""
    return Examples(source, np.random.default_rng(0).permutation(len(source)))


class FewMasks:
    """A source that keeps the masks of a share of its examples; others get zeros.

    Which they are depends on index and share alone: every tenth for a share of .1.
    """

    def __init__(self, source, share: float):
        self._source, self._share = source, share

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        example = self._source[index]
        # A millionth, so that 10 * .1 is a whole number.
        before, after = (int(i * self._share + 1e-6) for i in (index, index + 1))
        if "mask" not in example or before < after:
            return example
        return {**example, "mask": np.zeros_like(example["mask"])}


def first_examples(source, number: int | None):
    """The first examples of ``mixed``; the source if number is None or no less."""
    if number is None or number >= len(source):
        return source
    return Examples(mixed(source), range(number))


def eval_batches(config, source, *, shard=None):
    """The finite sequence of evaluation batches of a split, with example_mask."""
    return make_eval_batches(
        source,
        batch_size=config.batch_size,
        transform=config.eval_transform,
        image_size=config.image_size,
        shard=shard,
    )


def image_stats(config) -> dict:
    """The mean and std of ``step.normalize_images``."""
    return {"mean": tuple(config.image_mean), "std": tuple(config.image_std)}
