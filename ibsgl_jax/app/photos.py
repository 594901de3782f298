"""Which photos the arguments name, and those photos read in blocks."""

import glob
import os
import select
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibsgl_jax import images
from ibsgl_jax.app import outputs
from ibsgl_jax.images import ImageError

MAX_PIPE = 256 * 2**20
PIPE_SECONDS = 10
# Formats without a signature of their own: any bytes may pass for them, so in a folder
# the name has to say so too.
_WEAK_FORMATS = ("TGA", "SPIDER", "IM", "IMT", "PCD", "XVTHUMB", "MSP", "PCX", "CUR")


class Source(NamedTuple):
    """One photo to explain.

    Attributes:
      path: as the user would name it.
      data: its contents, if they came through a pipe.
    """

    path: Path
    data: bytes | None = None


class Found(NamedTuple):
    """What the arguments name.

    Attributes:
      sources: the photos, without repetition, in the order given (sorted in a folder).
      failures: one line for each argument and each photo that is none.
      skipped: files in folders that are no images.
      results: pictures and files that an earlier ``ibsgl explain`` wrote.
    """

    sources: list[Source]
    failures: list[str]
    skipped: list[Path]
    results: list[Path]


def find(arguments: Iterable[str]) -> Found:
    """The photos that arguments name: files, folders, wildcards, pipes, "-" for stdin.

    A folder stands for every file in it that Pillow opens, at any depth, through links
    to folders too, each folder once; hidden files are left out. Results of earlier runs
    are left out wherever they are found.
    """
    found = Found([], [], [], [])
    seen: set[str] = set()
    for argument in arguments:
        path = Path(argument)
        if argument == "-" or _is_pipe(path):
            _add_pipe(argument, found)
        elif path.is_dir():
            _add_folder(path, found, seen)
        elif os.path.lexists(path) or not glob.has_magic(argument):
            _add_file(path, found, seen)
        else:
            _add_matches(argument, found, seen)
    return found


def _add_matches(pattern: str, found: Found, seen: set) -> None:
    matches = sorted(set(_expand(pattern)))
    if not matches:
        found.failures.append(f"{pattern}: no file matches")
    for match in matches:
        path = Path(match)
        if not path.is_dir():
            _add_file(path, found, seen)
        elif "**" not in pattern:  # which names what is inside by itself
            _add_folder(path, found, seen)


def _expand(pattern: str) -> list[str]:
    """As glob.glob, but "**" enters each folder once, however links go round."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    at = parts.index("**")
    tail = os.sep.join(parts[at + 1 :]) or "*"
    starts = [os.sep.join(parts[:at]) or (os.sep if at else ".")]
    if glob.has_magic(starts[0]):
        starts = glob.glob(starts[0])
    folders = [folder for start in starts for folder, _ in _walk(Path(start), set())]
    return [
        match
        for folder in folders
        for match in _expand(os.path.join(glob.escape(str(folder)), tail))
    ]


def _walk(folder: Path, visited: set) -> Iterator[tuple[Path, list[Path]]]:
    """(folder, its files), depth first, sorted; hidden ones left out.

    Folders are entered through links too, but each only once: ``visited`` holds them.
    """
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            names = sorted(name for name in os.listdir(folder) if name[0] != ".")
        except OSError:
            yield folder.parent, [folder]  # one that cannot be listed, as if a file
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        paths = [folder / name for name in names]
        inner = [path for path in paths if path.is_dir()]
        yield folder, [path for path in paths if path not in set(inner)]
        waiting += reversed(inner)


def _add_folder(folder: Path, found: Found, seen: set) -> None:
    before = len(found.sources), len(found.results), len(found.failures)
    for inside, paths in _walk(folder, set()):
        marker = outputs.read_marker(inside)
        for path in paths:
            if path.name in marker.names:
                found.results.append(path)
            else:
                _add_searched(path, found, seen)
    if before == (len(found.sources), len(found.results), len(found.failures)):
        found.failures.append(f"{folder}: no images in this folder")


def _add_searched(path: Path, found: Found, seen: set) -> None:
    """A file of a folder: a photo, a result of ours, a damaged photo, or no image."""
    name = os.path.abspath(path)
    if name in seen:
        return
    try:
        mode = path.stat().st_mode
        is_regular = stat.S_ISREG(mode)
        if stat.S_ISDIR(mode):
            found.failures.append(f"{path}: this folder cannot be listed")
            return
    except OSError:
        is_regular = False
    if not is_regular:  # a device, a socket, a link to nothing: opening it may hang
        found.skipped.append(path)
        return
    kind = _sniff(path)
    if kind == "result":
        found.results.append(path)
    elif kind == "image":
        seen.add(name)
        found.sources.append(Source(path))
    elif path.suffix.lower() in _image_suffixes():
        seen.add(name)
        found.failures.append(_why_not(path))
    else:
        found.skipped.append(path)


def _add_file(path: Path, found: Found, seen: set) -> None:
    """A file that the user names: nothing else about it may be a reason to skip it."""
    name = os.path.abspath(path)
    if name in seen:
        return
    seen.add(name)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                empty = not file.read(1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else error.strerror
        found.failures.append(f"{path}: {reason}")
        return
    if not stat.S_ISREG(mode):
        found.failures.append(f"{path}: is a device, not a file")
    elif empty:
        found.failures.append(f"{path}: the file is empty")
    elif _sniff(path) == "result":
        found.results.append(path)
    else:
        found.sources.append(Source(path))


def _is_pipe(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _add_pipe(argument: str, found: Found) -> None:
    try:
        if argument == "-":
            data = sys.stdin.buffer.read(MAX_PIPE + 1) if sys.stdin else b""
        else:
            data = _read_pipe(argument)
    except OSError as error:
        found.failures.append(f"{argument}: {error.strerror}")
        return
    if not data:
        found.failures.append(f"{argument}: nothing came through the pipe")
    elif len(data) > MAX_PIPE:
        size = MAX_PIPE // 2**20
        found.failures.append(f"{argument}: more than {size} MiB came through the pipe")
    else:
        name = "stdin" if argument == "-" else argument
        found.sources.append(Source(Path(name), data))


def _read_pipe(path: str) -> bytes:
    """All that comes; b"" if nobody has begun to write after some seconds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        if not poll.poll(1000 * PIPE_SECONDS):
            return b""
        os.set_blocking(descriptor, True)
        return file.read(MAX_PIPE + 1)


def _sniff(path: Path) -> str | None:
    """What a regular file's first bytes make it: "image", "result" of ours, or None."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=images.formats()) as image:
                if outputs.is_signed(image):
                    return "result"
                suffixes = Image.registered_extensions()
                weak = image.format in _WEAK_FORMATS
                if weak and suffixes.get(path.suffix.lower()) != image.format:
                    return None
                return "image"
    except Exception:  # no image, or one whose header is damaged
        return None


def _image_suffixes() -> set[str]:
    from PIL import Image

    readable = images.formats()
    suffixes = Image.registered_extensions()
    return {suffix for suffix, name in suffixes.items() if name in readable}


def _why_not(path: Path) -> str:
    try:
        images.read(path)
    except ImageError as error:
        return str(error)
    return f"{path}: its contents are not what its name says"


class Block(NamedTuple):
    """Some photos read together.

    Attributes:
      photos: (source, Photo) of those that could be read.
      pixels: float32 [N, size, size, 3], N the same for all blocks; past the photos
        it repeats the last one. None without photos.
      failures: one line for each of the others.
    """

    photos: list[tuple[Source, images.Photo]]
    pixels: np.ndarray | None
    failures: list[str]


def read_blocks(
    sources: Sequence[Source],
    preprocessing,
    *,
    fit: str,
    block_size: int,
    warn_fn: Callable[[str], None] = lambda line: None,
) -> Iterator[Block]:
    """The photos, read and prepared block by block.

    Args:
      sources: from ``find``.
      preprocessing: as ``pretrained.preprocessing`` gives.
      fit: see ``images.crop_box``.
      block_size: photos in a block, less where there are fewer.
      warn_fn: called with a line for each photo that looks wrong.
    """
    block_size = min(block_size, len(sources))
    for start in range(0, len(sources), block_size or 1):
        photos, failures = [], []
        for source in sources[start : start + block_size]:
            try:
                image = images.read(source.path, data=source.data, warn_fn=warn_fn)
                photos.append((source, images.prepare(image, preprocessing, fit=fit)))
            except ImageError as error:
                failures.append(str(error))
            except (ValueError, MemoryError) as error:  # of resizing odd sizes
                failures.append(f"{source.path}: cannot be prepared ({error})")
        pixels = None
        if photos:
            prepared = [photo.pixels for _, photo in photos]
            missing = block_size - len(prepared)
            pixels = np.stack(prepared + prepared[-1:] * missing)
        yield Block(photos, pixels, failures)
