"""The folder that ``ibsgl explain`` writes: nobody else's file is ever replaced there.

``explanation.json`` is the marker: it lists what the command wrote. A file that is
there already is replaced only if the marker lists it and it bears the command's sign
(a PNG's text chunk, the comment of ``maps.npz``). Each file is written under a
temporary name and renamed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ibsgl_jax.app import drawing, maps_file
from ibsgl_jax.app.terminal import shown
from ibsgl_jax.errors import UserError

FORMAT = "ibsgl explain 1"
MARKER = "explanation.json"
MAPS = "maps.npz"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_MARKER = 2**28
_JSON_BYTES = 4096  # reserved for the description of a photo


class Marker(NamedTuple):
    """What an ``explanation.json`` says of the files beside it.

    Attributes:
      written: name -> size in bytes, of the files of all runs so far.
      planned: names that a run which did not end may have written as well.
      scratch: temporary names of such a run.
    """

    written: dict[str, int]
    planned: frozenset[str]
    scratch: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Everything of ours in the folder; empty if it is not ours."""
        return {*self.written, *self.planned, *self.scratch}


def read_marker(folder: Path) -> Marker:
    """The marker of a folder; an empty one where there is none, or another's file."""
    path = folder / MARKER
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MARKER:
            raise ValueError
        about = json.loads(path.read_bytes())
        if about["format"] != FORMAT:
            raise ValueError
        written = {str(name): int(size) for name, size in about["written"].items()}
        planned = frozenset(map(str, about.get("planned", ())))
        scratch = tuple(map(str, about.get("scratch", ())))
    except Exception:  # absent, damaged, somebody else's
        return Marker({}, frozenset(), ())
    written[MARKER] = status.st_size
    return Marker(written, planned, scratch)


def is_signed(image) -> bool:
    """Whether an open ``PIL.Image`` is one of our pictures."""
    return image.info.get("Software") == drawing.SOFTWARE


class Plan(NamedTuple):
    """The names of everything that a run may write.

    Attributes:
      photos: for each photo {method: file name}.
      shortened: for each photo, whether its own name was too long to be used.
      sheets: names of the contact sheets, in their order.
    """

    photos: list[dict[str, str]]
    shortened: list[bool]
    sheets: list[str]

    @property
    def names(self) -> list[str]:
        """All of them."""
        overlays = [name for names in self.photos for name in names.values()]
        return [MARKER, MAPS, *self.sheets, *overlays]


def plan(
    out: Path, paths: Sequence[Path], methods: Sequence[str], rows_per_sheet: int
) -> Plan:
    """A name for each picture, all different even where letter case does not count."""
    num_sheets = -(-len(paths) // rows_per_sheet)
    sheets = [f"contact_sheet_{i}.png" for i in range(1, num_sheets + 1)]
    sheets[:1] = ["contact_sheet.png"]
    taken = {_folded(name) for name in (MARKER, MAPS, *sheets)}
    limit = _max_name_bytes(out)
    photos, shortened = [], []
    for path in paths:
        stem = _plain(path.stem)
        longest = max(len(f"-9999_{method}.png") for method in methods)
        is_short = len(stem.encode()) + longest <= limit
        if not is_short:
            digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
            room = max(1, limit - longest - len(digest) - 1)
            stem = stem.encode()[:room].decode(errors="ignore") + f"~{digest}"
        number, names = 1, None
        while names is None or any(_folded(name) in taken for name in names.values()):
            numbered = stem if number == 1 else f"{stem}-{number}"
            names = {method: f"{numbered}_{method}.png" for method in methods}
            number += 1
        taken |= {_folded(name) for name in names.values()}
        photos.append(names)
        shortened.append(not is_short)
    return Plan(photos, shortened, sheets)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _plain(stem: str) -> str:
    """A name that every terminal and JSON reader takes: no control characters."""
    return "".join("_" if shown(c) != c or c == "\\" else c for c in stem)


def _max_name_bytes(out: Path) -> int:
    try:
        return os.pathconf(_nearest_folder(out), "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def _nearest_folder(out: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    out = Path(os.path.abspath(out))
    while not os.path.lexists(out) and out != out.parent:
        out = out.parent
    return out


def is_address(path: str | Path) -> bool:
    """Whether a path is a URL, ``gs://bucket/folder``; ``Path`` makes that ``gs:/``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)", str(path)) is not None


def check(
    out: Path, names: Iterable[str], inputs: Iterable[Path], flag: str = "--out"
) -> Marker:
    """The folder's marker, if every name may be written there.

    Args:
      out: the folder, which may not exist yet.
      names: what is going to be written there.
      inputs: files that must not be written over.
      flag: for the message.

    Raises:
      UserError: the folder cannot be written, or holds a file of one of these names
        that is an input or that the command did not write.
    """
    if is_address(out):
        raise UserError(f"{flag} {out}: is an address, not a folder on this machine")
    above = _nearest_folder(out)
    if not above.is_dir():
        raise UserError(f"{flag} {out}: cannot write there ({above} is not a folder)")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {out}: cannot write there (no permission)")
    marker = read_marker(out)
    taken = [name for name in names if os.path.lexists(out / name)]
    if not taken:
        return marker
    identities = {_identity(path) for path in inputs} - {None}
    for name in taken:
        if _identity(out / name) in identities:
            raise UserError(
                f"{flag} {out}: {name} there is an input and would be written over; "
                f"choose another {flag}"
            )
    foreign = [name for name in taken if not _is_ours(out / name, marker)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise UserError(
            f"{flag} {out}: {foreign[0]}{more} is there already and was not written by "
            f"`ibsgl explain`; choose another {flag}"
        )
    return marker


def _identity(path: Path) -> tuple[int, int] | None:
    """What stays the same through links, hard links, ".." and letter case."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _is_ours(path: Path, marker: Marker) -> bool:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return False
    if path.name == MARKER:
        return MARKER in marker.written
    same_size = marker.written.get(path.name) == status.st_size
    return (same_size or path.name in marker.planned) and _bears_sign(path)


def _bears_sign(path: Path) -> bool:
    from PIL import Image

    try:
        if path.name == MAPS:
            with open(path, "rb") as file:
                file.seek(-len(maps_file.SIGN), os.SEEK_END)
                return file.read() == maps_file.SIGN
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["PNG"]) as image:
                return is_signed(image)
    except Exception:  # no picture
        return False


class OutputFolder:
    """A folder that this process alone writes; made by ``claim``.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path, marker: Marker, names: Sequence[str]):
        token = secrets.token_hex(4)
        self.path = path
        self._planned = list(names)
        self._may_replace = {name for name in names if os.path.lexists(path / name)}
        self._written = {
            name: size
            for name, size in marker.written.items()
            if name != MARKER and os.path.lexists(path / name)
        }
        self._scratch = {
            end: path / f".ibsgl-{token}.{end}" for end in ("png", "npz", "json")
        }
        self._leftovers = [
            name for name in marker.scratch if name.startswith(".ibsgl-")
        ]
        self._maps: maps_file.MapsFile | None = None

    def open(self, methods: Sequence[str], num_photos: int, shape) -> None:
        """Reserve the room for all maps and for the JSON, then leave the marker.

        Raises:
          OSError: there is no room; nothing is left behind.
        """
        self._maps = maps_file.MapsFile(
            self._scratch["npz"], methods, num_photos, shape
        )
        with open(self._scratch["json"], "xb") as file:
            if hasattr(os, "posix_fallocate"):
                size = _JSON_BYTES * (num_photos + 4)
                os.posix_fallocate(file.fileno(), 0, size)
        for name in self._leftovers:
            with contextlib.suppress(OSError):
                os.unlink(self.path / os.path.basename(name))
        scratch = [path.name for path in self._scratch.values()]
        marker = {"format": FORMAT, "complete": False, "written": self._written}
        marker |= {"planned": self._planned, "scratch": scratch}
        self.write(MARKER, json.dumps(marker).encode())

    def write(self, name: str, data: bytes) -> None:
        """A whole file or nothing of it.

        Raises:
          OSError: it cannot be written, or another process put a file there meanwhile.
        """
        scratch, target = self._scratch["png"], self.path / name
        try:
            with open(scratch, "xb") as file:
                file.write(data)
            self._rename(scratch, target)
        except BaseException as error:
            scratch.unlink(missing_ok=True)
            if isinstance(error, OSError):  # so that its line names the file
                error.filename = str(target)
            raise
        self._written[name] = len(data)

    def _rename(self, scratch: Path, target: Path) -> None:
        if target.name not in self._may_replace and os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, "somebody else's file is there meanwhile", str(target)
            )
        os.replace(scratch, target)
        self._may_replace.add(target.name)

    def remove(self, names: Iterable[str]) -> None:
        """Take back files that ``write`` wrote."""
        for name in names:
            if self._written.pop(name, None) is not None:
                (self.path / name).unlink(missing_ok=True)

    def write_maps(self, index: int, maps: dict) -> None:
        """One photo's maps, method -> [H, W]; see ``MapsFile.write``."""
        assert self._maps is not None, "open comes first"
        self._maps.write(index, maps)

    def finish(self, explanation: dict, num_photos: int) -> None:
        """``maps.npz`` of the first photos, and the JSON, into their places."""
        if num_photos:
            assert self._maps is not None, "open comes first"
            self._maps.finish(num_photos)
            self._rename(self._scratch["npz"], self.path / MAPS)
            self._written[MAPS] = (self.path / MAPS).stat().st_size
        elif MAPS in self._written:  # of an earlier run: it would contradict the JSON
            self.remove([MAPS])
        written = {k: v for k, v in self._written.items() if k != MARKER}
        about = {"format": FORMAT, **explanation, "written": written}
        with open(self._scratch["json"], "r+b") as file:
            file.write(json.dumps(about, indent=2).encode() + b"\n")
            file.truncate()
        self._rename(self._scratch["json"], self.path / MARKER)

    def close(self) -> None:
        """Remove what is temporary."""
        if self._maps is not None:
            self._maps.close()
        for path in self._scratch.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claim(
    out: Path, names: Sequence[str], inputs: Sequence[Path]
) -> Iterator[OutputFolder]:
    """The folder for this process alone, made if absent, after ``check``.

    Raises:
      UserError: as of ``check``, or another process is writing there.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"--out {out}: cannot write there ({reason})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another `ibsgl explain` is writing there; wait for it, "
                "or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        folder = OutputFolder(out, check(out, names, inputs), names)
        try:
            yield folder
        finally:
            folder.close()
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if nothing came into it
