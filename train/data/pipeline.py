"""Input pipeline: prepared tfds data in, uint8 NumPy batches out.

    builder = prepare("photo_digits/shortcut", data_dir)
    source = open_source(builder, "train")             # examples at random access
    batches = make_train_dataset(source, batch_size=64, seed=0, augment="shift")
    for batch in iterate(batches, start_step=step): ...

A batch is a dict of `image` uint8 [B, H, W, 3], `label` int32 [B] and, where the data
set has them, `bbox` float32 [B, 4] (ymin, xmin, ymax, xmax in [0, 1]) and `mask`
uint8 [B, H, W] of 0 and 1. Evaluation batches add `example_mask` float32 [B].
Training batch i is a function of (seed, i), so a run resumes by its step alone.
Normalisation belongs on the device. At import only numpy and jax are needed; tfds,
grain and PIL are imported where they are used.
"""

import functools
import importlib
import io
import operator
import shutil

import jax
import numpy as np

# Generated here when absent; each has a package with its builder beside this file.
EMBEDDED = ("photo_digits", "photo_textures")

# Where a data set keeps its mask, if not in "mask", and the values of the object in it:
# most annotators agreed (birds); the animal without its unsure rim (pets).
MASKS = {
    "caltech_birds2011": ("segmentation_mask", range(128, 256)),
    "oxford_iiit_pet": ("segmentation_mask", range(1, 2)),
}


class DatasetError(ValueError):
    """A data set that is absent, incomplete or not what the program can use."""


# ---- Preparing ----------------------------------------------------------------------


def prepare(dataset, data_dir, **options):
    """Returns the tfds builder of a data set that is ready to be read.

    An embedded set is generated if absent: by process 0, while the others wait.
    Everything else must lie prepared in `data_dir`.

    Args:
      dataset: tfds name, such as "photo_digits", "photo_digits/shortcut", "cifar10".
      data_dir: folder that holds, or will hold, the prepared data.
      **options: for an embedded set only, fields of its config, such as `num_train`.

    Raises:
      DatasetError: if the data set is not there, or not as array_record.
      ValueError: for an unknown config or option of an embedded set.
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
    from jax.experimental import multihost_utils

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


# ---- Reading ------------------------------------------------------------------------


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


# ---- Transforms: example in, example out; boxes and masks follow the image ----------


def _window(example, top, left, height, width):
    """Cuts a window that may reach over the edge; the edge's pixels are repeated."""
    rows = np.arange(top, top + height)
    columns = np.arange(left, left + width)

    def cut(array):
        return array.take(rows, 0, mode="clip").take(columns, 1, mode="clip")

    old_height, old_width = example["image"].shape[:2]
    out = {**example, "image": cut(example["image"])}
    if "mask" in example:
        mask = out["mask"] = cut(example["mask"])
        mask[: max(0, -top)] = mask[max(0, old_height - top) :] = 0
        mask[:, : max(0, -left)] = mask[:, max(0, old_width - left) :] = 0
    if "bbox" in example:
        ymin, xmin, ymax, xmax = example["bbox"].tolist()
        box = (
            (ymin * old_height - top) / height,
            (xmin * old_width - left) / width,
            (ymax * old_height - top) / height,
            (xmax * old_width - left) / width,
        )
        out["bbox"] = np.array([min(max(v, 0), 1) for v in box], np.float32)
    return out


def _resize(example, height, width):
    """Resizes: bilinear with antialiasing; masks by nearest pixel."""
    from PIL import Image

    if example["image"].shape[:2] == (height, width):
        return example
    size = (width, height)
    image = Image.fromarray(example["image"]).resize(
        size, Image.BILINEAR, reducing_gap=2.0
    )
    out = {**example, "image": np.asarray(image)}
    if "mask" in example:
        mask = Image.fromarray(example["mask"]).resize(size, Image.NEAREST)
        out["mask"] = np.asarray(mask)
    return out


def _flip(example):
    """Mirrors left and right."""
    out = {**example, "image": example["image"][:, ::-1]}
    if "mask" in example:
        out["mask"] = example["mask"][:, ::-1]
    if "bbox" in example:
        ymin, xmin, ymax, xmax = example["bbox"]
        out["bbox"] = np.array([ymin, 1 - xmax, ymax, 1 - xmin], np.float32)
    return out


def none(example, rng=None, image_size=None):
    """The image as it is."""
    del rng, image_size
    return example


def shift(example, rng, image_size=None, *, distance=4):
    """Shifts by up to `distance` pixels each way. No flip: for digits."""
    del image_size
    top, left = rng.integers(-distance, distance + 1, 2).tolist()
    return _window(example, top, left, *example["image"].shape[:2])


def crop_flip(example, rng, image_size=None):
    """Shifts by up to 4 pixels (pad and crop), then mirrors half of the images."""
    example = shift(example, rng, image_size)
    return _flip(example) if rng.random() < 0.5 else example


def imagenet(example, rng, image_size):
    """A random part, 8 to 100 % of the area, resized; half of them mirrored.

    A box outside the part becomes a box of no area.
    Reference: Szegedy et al., Going Deeper with Convolutions, 2014, section 6.
    """
    height, width = example["image"].shape[:2]
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = rng.integers(0, height - h + 1)
            left = rng.integers(0, width - w + 1)
            example = _window(example, top, left, h, w)
            break
    else:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        example = _window(example, top, left, side, side)
    example = _resize(example, image_size, image_size)
    return _flip(example) if rng.random() < 0.5 else example


def resize_center(example, rng=None, image_size=None):
    """The shorter side becomes image_size / 0.875; then the central square."""
    del rng
    height, width = example["image"].shape[:2]
    scale = image_size / 0.875 / min(height, width)
    example = _resize(example, round(height * scale), round(width * scale))
    height, width = example["image"].shape[:2]
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return _window(example, top, left, image_size, image_size)


AUGMENTATIONS = {f.__name__: f for f in (none, shift, crop_flip, imagenet)}
EVAL_TRANSFORMS = {f.__name__: f for f in (none, resize_center)}


def _choose(table, name, image_size):
    """Returns example, rng -> example of a checked size."""
    if name not in table:
        raise ValueError(f"no transform {name!r}; choose one of {', '.join(table)}")
    if image_size is None and name in ("imagenet", "resize_center"):
        raise ValueError(f"transform {name!r} needs an image_size")
    return functools.partial(_transform, table[name], image_size)


def _transform(fn, image_size, example, rng=None):
    out = fn(example, rng, image_size)
    shape = out["image"].shape
    if image_size is not None and shape != (image_size, image_size, 3):
        raise DatasetError(
            f"an image of {shape[0]} x {shape[1]} left transform {fn.__name__!r}, not "
            f"{image_size} x {image_size}; choose 'imagenet' to train, "
            "'resize_center' to evaluate"
        )
    return out


# ---- Batches ------------------------------------------------------------------------


def _local_size(batch_size, num_shards):
    if batch_size % num_shards:
        raise ValueError(
            f"batch size {batch_size} is not a multiple of the {num_shards} processes"
        )
    return batch_size // num_shards


def make_train_dataset(
    source, *, batch_size, seed, augment="none", image_size=None, shard=None
):
    """Returns the endless, reshuffled sequence of training batches.

    `dataset[i]` is this process's share of batch i, a function of (seed, i): the
    shares together are the batch of a single process, augmentations included.

    Args:
      source: what `open_source` returned, or any sequence of such examples.
      batch_size: examples of a batch over all processes.
      seed: of order and augmentation.
      augment: "none", "shift", "crop_flip" or "imagenet".
      image_size: side of the images; needed by "imagenet", a check for the others.
      shard: (index, count) of this process; None asks jax.

    Returns:
      A grain.MapDataset; read it with `iterate`.
    """
    import grain

    index, count = shard or (jax.process_index(), jax.process_count())
    local_size = _local_size(batch_size, count)
    if len(source) < batch_size:
        raise DatasetError(
            f"{len(source)} examples do not fill a batch of {batch_size}; "
            "lower the batch size"
        )
    # Augmented before sharding: draws belong to the global position.
    return (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_choose(AUGMENTATIONS, augment, image_size))[index::count]
        .batch(local_size, drop_remainder=True)
    )


def make_eval_batches(
    source, *, batch_size, transform="none", image_size=None, shard=None
):
    """Returns the finite sequence of evaluation batches, every example once.

    The last batch is filled up with zeros; `example_mask` is 1 for real examples.
    All processes get the same number of batches, of the same shapes.

    Args:
      source, batch_size, image_size, shard: as in `make_train_dataset`.
      transform: "none" or "resize_center".

    Returns:
      A grain.MapDataset; read it with `iterate`.
    """
    import grain

    index, count = shard or (jax.process_index(), jax.process_count())
    local_size = _local_size(batch_size, count)
    make_batch = functools.partial(
        _eval_batch,
        source,
        _choose(EVAL_TRANSFORMS, transform, image_size),
        index,
        count,
        local_size,
    )
    return grain.MapDataset.range(-(-len(source) // batch_size)).map(make_batch)


def _eval_batch(source, transform, shard, num_shards, size, batch):
    start = (batch * size) * num_shards + shard
    indices = range(start, len(source), num_shards)[:size]
    # A share without an example still needs the shapes: take any, mask it out.
    examples = [transform(source[i]) for i in indices] or [transform(source[0])]
    mask = np.zeros(size, np.float32)
    mask[: len(indices)] = 1
    out = {"example_mask": mask}
    for name, value in examples[0].items():
        out[name] = np.zeros((size, *np.shape(value)), np.asarray(value).dtype)
        for i in range(len(indices)):
            out[name][i] = examples[i][name]
    return out


def iterate(dataset, *, start_step=0, num_threads=1, num_workers=0):
    """Yields the batches of a dataset from `start_step` on, read ahead.

    Args:
      dataset: from `make_train_dataset` or `make_eval_batches`.
      start_step: first batch; a resumed run continues the order.
      num_threads: threads that prepare batches; 0 for none. One is plenty for a
        cached source; raise it for large JPEG files.
      num_workers: processes instead of threads, for many cores and large images.
    """
    import grain

    dataset = dataset[start_step:]
    if num_workers == 0:
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=2 * num_threads
        )
        yield from dataset.to_iter_dataset(options)
        return
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers insist
        flags.FLAGS.mark_as_parsed()
    iterator = iter(
        dataset.to_iter_dataset().mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers)
        )
    )
    try:
        for batch in iterator:  # copied: the worker's memory goes away
            yield jax.tree.map(np.array, batch)
    finally:
        iterator.close()
