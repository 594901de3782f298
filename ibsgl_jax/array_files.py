"""Arrays from ``.npz``, ``.h5`` and ``.safetensors`` files, within bounds of length.

A file of a kilobyte may announce a terabyte: as a shape, or as a member that inflates
to it. Nothing is allocated or inflated before the announced sizes are checked. Imports
only numpy; safetensors and h5py where such a file is read.
"""

import math
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from ibsgl_jax.tensor_pickle import Refused, printable

# Weights hardly compress; small files and those with many zeros may.
MAX_INFLATED = 64 * 2**20
MAX_INFLATION = 16
_MAX_HEADER = 16 * 2**20
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path) -> dict[str, np.ndarray]:
    """Name -> array of an ``.npz`` file, compressed or not.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if it is no such file, is damaged, holds objects, or
        announces more than it holds.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if sum(entry.compress_size for entry in entries) > size:
                    raise Refused("its entries overlap, or announce more than it holds")
                bound = MAX_INFLATED + MAX_INFLATION * size
                if sum(entry.file_size for entry in entries) > bound:
                    raise Refused("it inflates to more than weights can")
                return {
                    entry.filename.removesuffix(".npy"): _read_npy(archive, entry)
                    for entry in entries
                }
        except Exception as error:  # zip, zlib, header errors and ours alike
            raise ValueError(f"{path}: not an npz file ({_cause(error)})") from None


def _read_npy(archive, entry) -> np.ndarray:
    if entry.compress_type not in _COMPRESSIONS:
        raise Refused("an entry compressed in a way that NumPy never does")
    with archive.open(entry) as opened:
        version = np.lib.format.read_magic(opened)
        if version not in _HEADERS:
            raise Refused("an array of another version of the format")
        shape, fortran, dtype = _HEADERS[version](opened)
        if dtype.hasobject:
            raise Refused("it holds objects, not numbers")
        left = entry.file_size - opened.tell()
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != left:
            raise Refused(f"array '{printable(entry.filename)}' is not of its length")
        # With a size, an entry that inflates to more than it announces stays in bounds.
        data = opened.read(left)
    array = np.frombuffer(data, dtype, math.prod(shape)) if left else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def read_h5(path) -> dict[str, np.ndarray]:
    """Name -> array of an ``.h5`` file, as "block1/layers/conv2d/vars/0" in Keras's.

    Only what lies in the file itself is read.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if h5py is not installed, or the file is no such file, is
        damaged, holds objects, or announces more than it holds.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: .h5 files need h5py: pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            found = {}
            file.visititems(lambda name, node: found.update({name: node}))
            arrays = {n: d for n, d in found.items() if isinstance(d, h5py.Dataset)}
            if any(d.dtype.hasobject for d in arrays.values()):
                raise Refused("it holds objects, not numbers")
            if any(d.is_virtual or d.external for d in arrays.values()):
                raise Refused("its arrays lie in other files")
            sizes = [math.prod(d.shape) * d.dtype.itemsize for d in arrays.values()]
            if sum(sizes) > MAX_INFLATED + MAX_INFLATION * size:
                raise Refused("it inflates to more than weights can")
            return {name: np.asarray(array[()]) for name, array in arrays.items()}
    except Exception as error:  # h5py's are of many kinds, OSError among them
        raise ValueError(f"{path}: not an h5 file ({_cause(error)})") from None


def read_safetensors(path) -> dict[str, np.ndarray]:
    """Name -> array of a ``.safetensors`` file.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if it is no such file or is damaged.
    """
    from safetensors.numpy import load_file

    with open(path, "rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < header <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"{path}: not a safetensors file (its header has no length)")
    try:
        return load_file(Path(path))
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and KeyError for its new dtypes
        raise ValueError(f"{path}: not a safetensors file ({_cause(error)})") from None


def _cause(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__, 200)
