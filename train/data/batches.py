"""Batches of a source: uint8 NumPy arrays, read ahead.

    batches = make_train_dataset(source, batch_size=64, seed=0, augment="shift")
    for batch in iterate(batches, start_step=step): ...

A batch is a dict of `image` uint8 [B, H, W, 3], `label` int32 [B] and, where the data
set has them, `bbox` float32 [B, 4] and `mask` uint8 [B, H, W] (see `sources`). Of
several labels per image `positives` uint8 [B, C] are all, and `label` is one of them:
drawn in training, the first in evaluation, 0 where there is none.
Evaluation batches add `example_mask` float32 [B]. Training batch i is a function of
(seed, i), so a run resumes by its step alone. Normalisation belongs on the device.
"""

import functools
import os
import pickle
import tempfile
import threading
import time

import jax
import numpy as np
from absl import flags

from train.data import transforms
from train.errors import DatasetError


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
        grain.MapDataset.source(_Handed(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(transforms.choose(transforms.AUGMENTATIONS, augment, image_size))[
            index::count
        ]
        .batch(local_size, drop_remainder=True)
    )


class _Handed:
    """A source that other processes read from a file, which vanishes with this process.

    Through the pipe that starts a process it would go by the megabyte, and if that
    process died meanwhile, Python would write to it for ever.
    """

    def __init__(self, source):
        self._source, self._file = source, None

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]

    def __reduce__(self):
        import cloudpickle

        if not os.path.exists("/proc/self/fd"):  # of Linux
            return _Handed, (self._source,)
        if self._file is None:
            self._file = tempfile.TemporaryFile()
            cloudpickle.dump(self._source, self._file)
            self._file.flush()
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return _read_handed, (path,)


def _read_handed(path):
    with open(path, "rb") as file:
        return pickle.load(file)


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
        transforms.choose(transforms.EVAL_TRANSFORMS, transform, image_size),
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


def _end_with(parent, *unused):
    """Ends this process when the one that started it is gone, as by kill -9."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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

    if not flags.FLAGS.is_parsed():  # grain's workers insist
        flags.FLAGS.mark_as_parsed()
    iterator = iter(
        dataset.to_iter_dataset().mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers),
            functools.partial(_end_with, os.getpid()),
        )
    )
    try:
        for batch in iterator:  # copied: the worker's memory goes away
            yield jax.tree.map(np.array, batch)
    except RuntimeError as error:
        if "exit code" not in str(error):
            raise
        raise DatasetError(
            "a process that prepares batches (num_workers) was killed, perhaps for its "
            "memory; the same command goes on from the last checkpoint"
        ) from error
    finally:
        iterator.close()
