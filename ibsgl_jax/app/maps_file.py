"""``maps.npz`` written photo by photo, in the memory of one map.

An ``.npz`` is a zip of ``.npy`` files, and ``np.savez`` wants each array whole. Here
every array's place in the (uncompressed) file is known from the start: the disk space
is reserved before anything is computed, each map is written where it belongs, and the
zip's directory comes last. Imports numpy only.
"""

import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np

_PIECE = 2**20
_TAIL = 4096  # room for the zip's directory, per array
_DATE = 0x21  # the first day that a zip can name
# The comment that ends the zip, by which a later run knows the file for its own.
SIGN = b"ibsgl explain"


class MapsFile:
    """Arrays [N, H, W] of one shape, filled one index at a time.

    Args:
      path: a file that must not exist.
      names: of the arrays.
      num_maps: how many at most.
      shape: (H, W).

    Raises:
      OSError: the file cannot be made, or the disk has no room for all of it.
    """

    def __init__(
        self, path, names: Sequence[str], num_maps: int, shape: tuple[int, int]
    ):
        self._names, self._shape = list(names), tuple(shape)
        self._map_bytes = 4 * int(np.prod(shape))
        heads = [self._head(name, num_maps, 0) for name in names]
        lengths = [len(head) + num_maps * self._map_bytes for head in heads]
        self._starts = np.cumsum([0, *lengths]).tolist()
        self._head_bytes = [len(head) for head in heads]
        self._file = open(path, "x+b")
        size = self._starts[-1] + _TAIL * len(self._names)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise

    def write(self, index: int, maps: dict[str, np.ndarray]) -> None:
        """Put one photo's maps, name -> [H, W], in their places."""
        for place, name in enumerate(self._names):
            values = np.ascontiguousarray(maps[name], "<f4").reshape(self._shape)
            at = self._starts[place] + self._head_bytes[place]
            self._file.seek(at + index * self._map_bytes)
            self._file.write(values.tobytes())

    def finish(self, num_maps: int) -> None:
        """Make it a whole ``.npz`` of the first ``num_maps`` maps; close it."""
        directory, end = [], 0
        for place, name in enumerate(self._names):
            size = num_maps * self._map_bytes
            # What was reserved for photos that failed is closed up: data only ever move
            # towards the start.
            head_bytes = len(self._head(name, num_maps, 0))
            source = self._starts[place] + self._head_bytes[place]
            npy = self._npy_head(num_maps)
            crc = self._move(source, end + head_bytes, size, zlib.crc32(npy))
            self._file.seek(end)
            self._file.write(self._head(name, num_maps, crc))
            directory.append(self._entry(name, len(npy) + size, crc, end))
            end += head_bytes + size
        self._file.seek(end)
        self._file.write(b"".join(directory) + self._ends(directory, end))
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Let go of the file without finishing it."""
        self._file.close()

    def _move(self, source: int, target: int, size: int, crc: int) -> int:
        """Copy bytes towards the start of the file; their checksum goes on from crc."""
        for done in range(0, size, _PIECE):
            self._file.seek(source + done)
            piece = self._file.read(min(_PIECE, size - done))
            crc = zlib.crc32(piece, crc)
            if source != target:
                self._file.seek(target + done)
                self._file.write(piece)
        return crc

    def _npy_head(self, num_maps: int) -> bytes:
        shape = ", ".join(map(str, (num_maps, *self._shape)))
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}"
        # 128 bytes in all whatever the shape, so that nothing behind it moves.
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + f"{text:117}\n".encode()

    def _head(self, name: str, num_maps: int, crc: int) -> bytes:
        """A zip's local header with 64-bit sizes, and the npy header behind it."""
        npy = self._npy_head(num_maps)
        size = len(npy) + num_maps * self._map_bytes
        file_name = f"{name}.npy".encode()
        fixed = struct.pack(
            "<IHHHHHIIIHH",
            *(0x04034B50, 45, 0, 0, 0, _DATE, crc, 0xFFFFFFFF, 0xFFFFFFFF),
            *(len(file_name), 20),
        )
        return fixed + file_name + struct.pack("<HHQQ", 1, 16, size, size) + npy

    def _entry(self, name: str, size: int, crc: int, offset: int) -> bytes:
        """A zip's central directory entry."""
        file_name = f"{name}.npy".encode()
        fixed = struct.pack(
            "<IHHHHHHIIIHHHHHII",
            *(0x02014B50, 45, 45, 0, 0, 0, _DATE, crc, 0xFFFFFFFF, 0xFFFFFFFF),
            *(len(file_name), 28, 0, 0, 0, 0o600 << 16, 0xFFFFFFFF),
        )
        return fixed + file_name + struct.pack("<HHQQQ", 1, 24, size, size, offset)

    def _ends(self, directory: list[bytes], start: int) -> bytes:
        """The 64-bit end record, its locator, and the classical end record."""
        count, size = len(directory), sum(map(len, directory))
        end64 = struct.pack(
            "<IQHHIIQQQQ",
            *(0x06064B50, 44, 45, 45, 0, 0, count, count, size, start),
        )
        locator = struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
        full = 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
        classical = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *full, len(SIGN))
        return end64 + locator + classical + SIGN
