"""Prepared data sets as sequences of examples.

    builder = prepare("photo_digits/shortcut", data_dir)
    source = open_source(builder, "train")             # examples at random access

An example is a dict of `image` uint8 [H, W, 3], `label` int32 and, where the data set
has them, `bbox` float32 [4] (ymin, xmin, ymax, xmax in [0, 1]) and `mask` uint8 [H, W]
of 0 and 1.
"""

import functools
import importlib
import io
import operator
import shutil

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.errors import DatasetError

# Generated here when absent; each has a package with its builder beside this file.
EMBEDDED = ("photo_digits", "photo_textures", "photo_objects", "shortcut_digits")

# Where a data set keeps its mask, if not in "mask", and the values of the object in it:
# most annotators agreed (birds); the animal without its unsure rim (pets).
MASKS = {
    "caltech_birds2011": ("segmentation_mask", range(128, 256)),
    "oxford_iiit_pet": ("segmentation_mask", range(1, 2)),
}


def prepare(dataset, data_dir, *, look_only=False, **options):
    """Returns the tfds builder of a data set that is ready to be read.

    An embedded set is generated if absent: by process 0, while the others wait.
    Everything else must lie prepared in `data_dir`.

    Args:
      dataset: tfds name, such as "photo_digits", "photo_digits/shortcut", "cifar10".
      data_dir: folder that holds, or will hold, the prepared data.
      look_only: generate nothing; None for an embedded set that is absent.
      **options: for an embedded set only, fields of its config, such as `num_train`.

    Raises:
      DatasetError: if the data set is not there, or not as array_record; for an
        unknown config or option of an embedded set.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    name, _, config = dataset.partition("/")
    if name in EMBEDDED:
        module = importlib.import_module(f"train.data.{name}.{name}_dataset_builder")
        config = module.make_config(config or "independent", **options)
        builder = functools.partial(
            module.Builder, config=config, data_dir=data_dir, file_format="array_record"
        )
        if look_only:
            there = builder()
            return there if there.is_prepared() else None
        return _prepare_once(builder)
    if options:
        raise DatasetError(
            f"data set {dataset!r} takes no options, got {list(options)}"
        )
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        builder = None
    if builder is None or builder.info.file_format.value != "array_record":
        raise DatasetError(
            f"data set {dataset!r} is not prepared as array_record in {data_dir}; "
            f"run: python -m train.prepare {dataset}"
        )
    return builder


def _prepare_once(make_builder):
    """Generates an embedded set unless it is there; safe beside other processes."""
    wait = jax.process_count() > 1
    try:
        if wait and jax.process_index() != 0:
            multihost_utils.sync_global_devices("prepare")
        builder = make_builder()
        # tfds renames a finished folder into place, so one that exists without its
        # description is what an interrupted run or a broken copy left.
        if builder.data_path.exists() and not builder.is_prepared():
            shutil.rmtree(builder.data_path, ignore_errors=True)
        if not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except OSError:  # another program finished the same folder first
                if not builder.is_prepared():
                    raise
            builder = make_builder()
    finally:
        if wait and jax.process_index() == 0:
            multihost_utils.sync_global_devices("prepare")
    return builder


def open_source(builder, split, *, cache_bytes=512 * 2**20):
    """Returns a split as a sequence of decoded examples (dicts, as in a batch).

    Args:
      builder: what `prepare` returned.
      split: tfds split, such as "train" or "train[:10%]".
      cache_bytes: a split of images of one size is decoded at once and kept in
        memory if it takes no more than this; 0 to decode at each access.

    Raises:
      DatasetError: for an unknown split, or without `image` and `label`.
    """
    import tensorflow_datasets as tfds

    info = builder.info
    for name in ("image", "label"):
        if name not in info.features:
            raise DatasetError(
                f"data set {info.full_name} has no feature {name!r}; "
                f"it has {', '.join(info.features)}"
            )
    encoded = {
        name: tfds.decode.SkipDecoding()
        for name, feature in info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        records = builder.as_data_source(split, decoders=encoded)
    except ValueError as error:
        raise DatasetError(
            f"data set {info.full_name} has no split {split!r}; "
            f"it has {', '.join(info.splits)}"
        ) from error
    mask = MASKS.get(info.name, ("mask", range(1, 256)))
    source = DecodedSource(
        records, num_classes(builder), f"{info.full_name} {split}", mask=mask
    )
    shape = info.features["image"].shape
    if None not in shape:
        per_pixel = 3 + (mask[0] in info.features)
        if len(source) * shape[0] * shape[1] * per_pixel <= cache_bytes:
            return CachedSource(source)
    return source


def num_classes(builder):
    """Returns the number of classes of a builder's labels; None if it has no say."""
    return getattr(builder.info.features["label"], "num_classes", None)


def class_names(builder):
    """Returns the names of a builder's classes; None if it has none."""
    names = getattr(builder.info.features["label"], "names", None)
    return tuple(names) if names else None


class DecodedSource:
    """Decodes records (dicts with encoded images) when they are asked for.

    Args:
      records: sequence of dicts with image (PNG or JPEG bytes) and label, and perhaps
        bbox and a mask (PNG bytes).
      num_classes: labels must lie in [0, num_classes); None for no upper bound.
      name: of the data, for error messages.
      mask: name of the mask in a record, and the range of values that are the object.
    """

    def __init__(
        self,
        records,
        num_classes=None,
        name="source",
        *,
        mask=("mask", range(1, 256)),
    ):
        self._records = records
        self._num_classes = num_classes
        self._name = name
        self._mask = mask

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        if not 0 <= index < len(self):  # the records' own error would not end a loop
            raise IndexError(f"{self._name} has no example {index}")
        record = self._records[index]
        where = f"example {index} of {self._name}"
        if "label" not in record:
            raise DatasetError(f"{where} has no label")
        label = operator.index(np.asarray(record["label"]).item())
        if label < 0 or (self._num_classes is not None and label >= self._num_classes):
            raise DatasetError(
                f"{where} has label {label}, outside [0, {self._num_classes})"
            )
        example = {
            "image": _decode(record["image"], "RGB", where),
            "label": np.int32(label),
        }
        if "bbox" in record:
            example["bbox"] = np.asarray(record["bbox"], np.float32)
        name, values = self._mask
        if name in record:
            mask = _decode(record[name], "L", where)
            inside = (mask >= values.start) & (mask < values.stop)
            example["mask"] = inside.astype(np.uint8)
        return example


def _decode(encoded, mode, where):
    """Decodes image bytes to uint8 [H, W, 3] ("RGB") or [H, W] ("L")."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    if mode == "L" and image.mode == "P":  # a palette's indices are the values
        return np.asarray(image)
    if image.mode not in ("L", mode):
        raise DatasetError(
            f"{where} is an image of mode {image.mode}; photographs need one or three "
            "channels (L or RGB), masks one, of 8 bits"
        )
    return np.asarray(image.convert(mode))


class CachedSource:
    """Holds all examples of a source, which must have one shape, in memory."""

    def __init__(self, source):
        first = source[0]
        self._arrays = {
            name: np.empty((len(source), *value.shape), value.dtype)
            for name, value in first.items()
        }
        for i in range(len(source)):
            for name, value in source[i].items():
                self._arrays[name][i] = value

    def __len__(self):
        return len(self._arrays["label"])

    def __getitem__(self, index):
        return {name: array[index] for name, array in self._arrays.items()}
