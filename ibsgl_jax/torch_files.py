"""Tensors from PyTorch files, without PyTorch and without running what is in them.

A PyTorch file is a pickle, and a pickle may name any function of the process that reads
it and call it. This reader knows tensors, storages and dictionaries only, each replaced
by a function of its own; a file that names anything else is refused with that name.
Reads the zip format, the older format of consecutive pickles, in
either byte order. Imports only numpy (and ml_dtypes, which jax brings, for bfloat16).
"""

import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read(path: str) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint by name.

    A dictionary inside the file's own one under "state_dict", "model_state_dict" or
    "model" is taken in its place, and the prefix "module." that a parallel wrapper
    leaves is removed.

    Args:
      path: a `.pth`, `.pt` or `.bin` file with a dictionary of tensors.

    Returns:
      Name -> array, in the file's dtypes; views of the file's contents, so a transposed
      tensor is not contiguous.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if it is no such file, is cut off, names anything but
        tensors, or holds no dictionary of tensors.
    """
    with open(path, "rb") as file:
        try:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            contents = _read_zip(file) if is_zip else _read_legacy(file)
            return {name: t.array() for name, t in _state_dict(contents).items()}
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        # Broken contents make the unpickler, the archive and our own functions raise
        # almost anything.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: not a whole PyTorch file ({cause})") from None


class _Refused(Exception):
    """What this reader will not do, in words."""


class _Sealed:
    """An object whose attributes a pickle cannot set."""

    def __setstate__(self, state):
        raise _Refused("refused: the file alters an object of its reader")


class _Storage(_Sealed):
    """A flat block of numbers; `data` arrives after the pickle in the older format."""

    def __init__(self, dtype, numel):
        self.dtype = np.dtype(dtype)
        self.numel = numel
        self.data = None
        if numel < 0:
            raise _Refused("a storage in the file has a negative length")

    def fill(self, buffer, byte_order):
        size = self.numel * self.dtype.itemsize
        if len(buffer) < size:
            raise _Refused("the file is cut off inside its tensors")
        data = np.frombuffer(buffer, self.dtype, self.numel)
        if byte_order == "big":
            data = data.byteswap()
        self.data = data


class _Tensor(_Sealed):
    """A strided view of a storage."""

    def __init__(self, storage, offset, size, stride):
        if not isinstance(storage, _Storage):
            raise _Refused("a tensor in the file has no storage")
        self.storage = storage
        self.offset = int(offset)
        self.size = tuple(map(int, size))
        self.stride = tuple(map(int, stride))

    def array(self) -> np.ndarray:
        storage = self.storage
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.size, self.stride, strict=True)
        )
        inside = 0 in self.size or last < storage.numel
        positive = min((self.offset, *self.size, *self.stride)) >= 0
        if storage.data is None or not (inside and positive):
            raise _Refused("a tensor in the file reaches past its storage")
        if 0 in self.size:
            return np.zeros(self.size, storage.dtype)
        return np.lib.stride_tricks.as_strided(
            storage.data[self.offset :],
            self.size,
            tuple(s * storage.dtype.itemsize for s in self.stride),
            writeable=False,
        )


def _known_names() -> dict[tuple[str, str], object]:
    """What a file may name; made anew for each, as it could set attributes on these."""

    class Mapping(dict):
        """An ordered dictionary; the attributes that a file gives it are dropped."""

        __slots__ = ()

        def __setstate__(self, state):
            pass

    class StorageType(_Sealed):
        def __init__(self, dtype):
            self.dtype = dtype

    def rebuild_tensor(storage, offset, size, stride, *_):
        return _Tensor(storage, offset, size, stride)

    def rebuild_parameter(tensor, *_):
        return tensor

    def size(dimensions):
        return tuple(dimensions)

    known = {
        ("collections", "OrderedDict"): Mapping,
        ("torch", "Size"): size,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    }
    for name, dtype in _STORAGE_DTYPES.items():
        known["torch", name] = StorageType(dtype)
    return known


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, known=None, load_storage=None):
        super().__init__(file, encoding="utf-8")
        self._known = known or {}
        self._load_storage = load_storage

    def find_class(self, module, name):
        if (module, name) not in self._known:
            raise _Refused(
                f"refused: the file names {module}.{name}, which is no tensor; save "
                "the state_dict alone"
            )
        return self._known[module, name]

    def persistent_load(self, identifier):
        if not (isinstance(identifier, tuple) and identifier[:1] == ("storage",)):
            raise _Refused("refused: the file refers to something that is no tensor")
        if self._load_storage is None:
            raise _Refused("not a PyTorch file: a tensor before its header")
        _, storage_type, key, _, numel, *view = identifier
        return self._load_storage(storage_type.dtype, str(key), int(numel), *view)


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        entries = {}
        for entry in archive.infolist():
            # The archive's top folder has the file's first name.
            entries[entry.filename.partition("/")[2]] = entry
        if "data.pkl" not in entries:
            raise _Refused("a zip file, but not one that PyTorch wrote")

        def contents(name):
            entry = entries[name]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise _Refused(
                    "refused: compressed entries, which PyTorch never writes"
                )
            return archive.read(entry)

        byte_order = "little"
        if "byteorder" in entries:
            byte_order = contents("byteorder").decode()
        storages = {}

        def load_storage(dtype, key, numel):
            if key not in storages:
                storages[key] = _Storage(dtype, numel)
                storages[key].fill(contents(f"data/{key}"), byte_order)
            return storages[key]

        with archive.open(entries["data.pkl"]) as pickled:
            return _Unpickler(pickled, _known_names(), load_storage).load()


def _read_legacy(file):
    known = _known_names()
    file_size = os.fstat(file.fileno()).st_size
    if file.read(1) != b"\x80":
        raise _Refused("not a PyTorch file")
    file.seek(0)
    if _Unpickler(file, known).load() != _LEGACY_MAGIC:
        raise _Refused("a pickle, but not one that PyTorch wrote")
    if _Unpickler(file, known).load() != _LEGACY_PROTOCOL:
        raise _Refused("an unknown version of PyTorch's older format")
    system = _Unpickler(file, known).load()
    byte_order = "little" if system.get("little_endian", True) else "big"
    storages = {}

    def load_storage(dtype, key, numel, view=None):
        if view is not None:
            raise _Refused("storages that are views of others: save the file again")
        if key not in storages:
            storages[key] = _Storage(dtype, numel)
        return storages[key]

    contents = _Unpickler(file, known, load_storage).load()
    for key in _Unpickler(file, known).load():
        storage = storages[str(key)]
        (numel,) = struct.unpack("<q", file.read(8))
        size = storage.numel * storage.dtype.itemsize
        if numel != storage.numel or size > file_size - file.tell():
            raise _Refused("the file is cut off inside its tensors")
        storage.fill(file.read(size), byte_order)
    return contents


def _state_dict(contents) -> dict[str, _Tensor]:
    if isinstance(contents, dict):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(contents.get(key), dict):
                contents = contents[key]
                break
    if not isinstance(contents, dict) or not contents:
        raise _Refused("holds no dictionary of tensors")
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _Refused(f"holds {name!r}, which is no tensor, among its tensors")
    if all(name.startswith("module.") for name in contents):
        contents = {name.removeprefix("module."): t for name, t in contents.items()}
    return contents
