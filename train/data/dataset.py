"""The data that a configuration names: its splits, parts of them, their batches."""

from typing import Any, NamedTuple

from train.data import sources
from train.data.batches import make_eval_batches
from train.errors import ConfigError


class Data(NamedTuple):
    """The splits of a data set, as sequences of examples."""

    train: Any
    validation: Any
    test: Any
    num_classes: int


def load_data(config) -> Data:
    """Prepare and open the data set; the embedded one is generated if absent."""
    try:
        builder = sources.prepare(
            config.dataset, config.data_dir, **config.dataset_options
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    splits = (config.train_split, config.validation_split, config.test_split)
    data = Data(
        *(sources.open_source(builder, split) for split in splits),
        num_classes=sources.num_classes(builder),
    )
    if data.num_classes is None:
        raise ConfigError(f"data set {config.dataset} does not say how many classes")
    for split, source in zip(splits, data[:3], strict=True):
        if not len(source):
            raise ConfigError(f"split {split!r} of {config.dataset} is empty")
    return data


def train_source(config, phase, data):
    """The examples that a phase learns from: the run's, or its own data set's."""
    if phase.dataset in ("", config.dataset):
        return data.train
    own_config = config.copy_and_resolve_references()
    own_config.dataset = phase.dataset
    own = load_data(own_config)
    if own.num_classes != data.num_classes:
        raise ConfigError(
            f"data set {phase.dataset} of a phase has {own.num_classes} classes, "
            f"{config.dataset} {data.num_classes}: one head cannot learn both"
        )
    return own.train


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


def first_examples(source, number: int | None):
    """The first examples of a source; all of it if number is None or more."""
    if number is None or number >= len(source):
        return source
    return Examples(source, range(number))


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
