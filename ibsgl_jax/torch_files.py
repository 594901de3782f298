"""Tensors from PyTorch files, without PyTorch and without running what is in them.

A PyTorch file is a pickle, and a pickle may name any function of the process that reads
it and call it. This reader knows tensors, storages and dictionaries only, each replaced
by a function of its own; a file that names anything else is refused with that name.
Reads the zip format and the older format of consecutive pickles, in either byte order,
with time and memory in proportion to the file's length, whatever the file announces.
Imports only numpy (and ml_dtypes, which jax brings, for bfloat16).
"""

import logging
import math
import os
import zipfile

import ml_dtypes
import numpy as np

from ibsgl_jax import tensor_pickle
from ibsgl_jax.tensor_pickle import Refused, Source, printable

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DIMENSIONS = 16
# Tied weights are the same bytes twice; nothing honest has them more often than this.
_MAX_REUSE = 16
_FIRST_KEYS = ("state_dict", "model_state_dict", "model")
_MAX_WRAPPERS = 3
_LOGGER = logging.getLogger("ibsgl_jax")


class _StorageType:
    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


_STORAGE_TYPES = {
    "DoubleStorage": _StorageType(np.float64),
    "FloatStorage": _StorageType(np.float32),
    "HalfStorage": _StorageType(np.float16),
    "BFloat16Storage": _StorageType(ml_dtypes.bfloat16),
    "LongStorage": _StorageType(np.int64),
    "IntStorage": _StorageType(np.int32),
    "ShortStorage": _StorageType(np.int16),
    "CharStorage": _StorageType(np.int8),
    "ByteStorage": _StorageType(np.uint8),
    "BoolStorage": _StorageType(np.bool_),
}


def read(path: str) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint by name.

    A checkpoint that holds more than one set of weights gives the one that was trained
    ("state_dict" or "model", say); a running average ("state_dict_ema") only where it
    is alone. Which one is taken is logged as one line by the logger "ibsgl_jax",
    unless there is only one and it bears a usual name. Prefixes of the names are left
    as they are.

    Args:
      path: a `.pth`, `.pt` or `.bin` file with a dictionary of tensors.

    Returns:
      Name -> array, in the file's dtypes; views of the file's contents, so a transposed
      tensor is not contiguous.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if it is no such file, is cut off, names anything but
        tensors, announces more than it holds, or holds no dictionary of tensors.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            contents = (_read_zip if is_zip else _read_legacy)(file, size)
            tensors, notice = _state_dict(contents)
            total = sum(t.num_bytes() for t in tensors.values())
            if total > _MAX_REUSE * size:
                raise Refused("its tensors announce more numbers than the file holds")
            arrays = {name: tensor.array() for name, tensor in tensors.items()}
        except Refused as error:
            raise ValueError(f"{path}: {error}") from None
        # Broken contents make the archive and our own functions raise almost anything.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: not a whole PyTorch file ({printable(cause, 200)})"
            ) from None
    if notice:
        _LOGGER.warning("%s: %s", path, notice)
    return arrays


class _Storage:
    """A flat block of numbers; `data` arrives after the pickle in the older format."""

    def __init__(self, dtype, numel):
        self.dtype, self.numel, self.data = dtype, numel, None
        if type(numel) is not int or numel < 0:
            raise Refused("a storage in the file has a negative length, or none")

    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def fill(self, buffer, byte_order):
        data = np.frombuffer(buffer, self.dtype, self.numel)
        self.data = data.byteswap() if byte_order == "big" else data


class _Tensor:
    """A strided view of a storage."""

    def __init__(self, storage, offset, size, stride):
        if not isinstance(storage, _Storage):
            raise Refused("a tensor in the file has no storage")
        shapes = isinstance(size, (tuple, list)) and isinstance(stride, (tuple, list))
        if not shapes or len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
            raise Refused("a tensor in the file has no shape")
        if any(type(n) is not int or not 0 <= n < 2**62 for n in (*size, *stride)):
            raise Refused("a tensor in the file reaches past its storage")
        if type(offset) is not int or offset < 0:
            raise Refused("a tensor in the file reaches past its storage")
        self.storage, self.offset = storage, offset
        self.size, self.stride = tuple(size), tuple(stride)

    def num_bytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        storage = self.storage
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.size, self.stride, strict=True)
        )
        if storage.data is None or not (0 in self.size or last < storage.numel):
            raise Refused("a tensor in the file reaches past its storage")
        if math.prod(self.size) > storage.numel:  # it repeats numbers, by strides of 0
            raise Refused("a tensor in the file announces more than its storage holds")
        if 0 in self.size:
            return np.zeros(self.size, storage.dtype)
        return np.lib.stride_tricks.as_strided(
            storage.data[self.offset :],
            self.size,
            # The stride of an axis of length 1 is never used, and may be anything.
            tuple(
                s * storage.dtype.itemsize if n > 1 else 0
                for n, s in zip(self.size, self.stride, strict=True)
            ),
            writeable=False,
        )


def _ordered_dict(pairs=()):
    result = {}
    tensor_pickle.update(result, pairs.items() if isinstance(pairs, dict) else pairs)
    return result


def _rebuild_tensor(storage, offset, size, stride, *_):
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor, *_):
    return tensor


def _size(dimensions=()):
    return tuple(dimensions)


_KNOWN = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
} | {("torch", name): kind for name, kind in _STORAGE_TYPES.items()}


def _storage_identifier(identifier):
    """(dtype, key, numel, views) of a reference to a storage."""
    if type(identifier) is not tuple or len(identifier) < 5:
        raise Refused("refused: the file refers to something that is no tensor")
    kind, storage_type, key, _, numel, *views = identifier
    whole = kind == "storage" and isinstance(storage_type, _StorageType)
    if not whole or type(key) not in (str, int):
        raise Refused("refused: the file refers to something that is no tensor")
    return storage_type.dtype, str(key), numel, views


def _read_zip(file, size):
    with zipfile.ZipFile(file) as archive:
        entries = {}
        for entry in archive.infolist():
            # The archive's top folder has the file's first name.
            entries[entry.filename.partition("/")[2]] = entry
        if "data.pkl" not in entries:
            raise Refused("a zip file, but not one that PyTorch wrote")
        if sum(entry.compress_size for entry in archive.infolist()) > size:
            raise Refused(
                "refused: its entries overlap, or announce more than it holds"
            )

        def open_entry(name):
            entry = entries[name]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Refused("refused: compressed entries, which PyTorch never writes")
            if entry.file_size != entry.compress_size:
                raise Refused("refused: an entry announces more than it holds")
            return archive.open(entry)

        def contents(name):
            with open_entry(name) as opened:
                return opened.read()

        byte_order = "little"
        if "byteorder" in entries:
            byte_order = contents("byteorder").decode()
        storages = {}

        def load_storage(identifier):
            dtype, key, numel, _ = _storage_identifier(identifier)
            if key not in storages:
                storage = _Storage(dtype, numel)
                if storage.num_bytes() > entries[f"data/{key}"].file_size:
                    raise Refused("the file is cut off inside its tensors")
                storage.fill(contents(f"data/{key}"), byte_order)
                storages[key] = storage
            return storages[key]

        with open_entry("data.pkl") as pickled:
            source = Source(pickled, entries["data.pkl"].file_size)
            return tensor_pickle.load(source, _KNOWN, load_storage)


def _read_legacy(file, size):
    source = Source(file, size)
    if file.peek(1)[:1] != b"\x80":
        raise Refused("not a PyTorch file")
    magic = tensor_pickle.load(source, _KNOWN)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise Refused("a pickle, but not one that PyTorch wrote")
    version = tensor_pickle.load(source, _KNOWN)
    if type(version) is not int or version != _LEGACY_PROTOCOL:
        raise Refused("an unknown version of PyTorch's older format")
    system = tensor_pickle.load(source, _KNOWN)
    byte_order = "little" if system.get("little_endian", True) else "big"
    storages = {}

    def load_storage(identifier):
        dtype, key, numel, views = _storage_identifier(identifier)
        if any(view is not None for view in views):
            raise Refused("storages that are views of others: save the file again")
        if key not in storages:
            storages[key] = _Storage(dtype, numel)
        return storages[key]

    contents = tensor_pickle.load(source, _KNOWN, load_storage)
    for key in tensor_pickle.load(source, _KNOWN):
        storage = storages[str(key) if type(key) is int else key]
        if source.number("<q") != storage.numel or storage.num_bytes() > source.left:
            raise Refused("the file is cut off inside its tensors")
        storage.fill(source.read(storage.num_bytes()), byte_order)
    return contents


def is_average(name: str) -> bool:
    """Whether a key or prefix is one of running averages of weights (EMA, SWA)."""
    words = name.lower().replace(".", "_").split("_")
    return any(word in ("ema", "swa", "averaged", "teacher") for word in words)


def _sets_of_weights(contents: dict) -> dict[str, dict]:
    """Path of keys -> dictionary, for those that hold tensors; optimizers' left out."""
    found, level, seen = {}, {"": contents}, {id(contents)}
    for _ in range(_MAX_WRAPPERS + 1):
        inner = {}
        for path, tree in level.items():
            if any(isinstance(value, _Tensor) for value in tree.values()):
                found[path] = tree
            for key, value in tree.items():
                skip = not isinstance(key, str) or key.lower().startswith("optim")
                if isinstance(value, dict) and id(value) not in seen and not skip:
                    seen.add(id(value))
                    inner[f"{path}.{key}" if path else key] = value
        level = inner
    return found


def _preference(path: str):
    """Smallest first: the trained before its average, usual names before others."""
    first, _, rest = path.partition(".")
    usual = _FIRST_KEYS.index(first) if first in _FIRST_KEYS else len(_FIRST_KEYS)
    return (is_average(path), usual, path != "", bool(rest))


def _state_dict(contents):
    """The dictionary of tensors to take, and a line that says which, or None."""
    sets = _sets_of_weights(contents) if isinstance(contents, dict) else {}
    if not sets:
        raise Refused(_why_none(contents))
    taken = min(sets, key=_preference)
    tensors = sets[taken]
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise Refused(
                f"holds '{printable(name)}', which is no tensor, among its tensors"
            )
    # A few tensors beside the weights (a queue, class means) are no second set.
    others = [p for p in sets if p != taken and 2 * len(sets[p]) >= len(tensors)]
    if others:
        left = ", ".join(f"'{printable(p)}'" for p in others[:3])
        return tensors, f"takes the weights under '{printable(taken)}', not {left}"
    if taken and taken not in _FIRST_KEYS:
        return tensors, f"takes the weights under '{printable(taken)}'"
    return tensors, None


def _why_none(contents) -> str:
    if isinstance(contents, dict) and contents:
        name = next(iter(contents))
        return f"holds '{printable(name)}', which is no tensor, among its tensors"
    return "holds no dictionary of tensors"
