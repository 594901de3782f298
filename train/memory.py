"""The memory of a training on a CPU; imports the standard library only.

XLA asks for the memory of a step anew in every step, and the system hands it out page
by page, 4 KiB each: a quarter of the time of an EfficientNet's step at 160 pixels.
glibc asks for pages of 2 MiB where it is told to when a process starts, not later; and
keeps up to 64 MiB that were given back, not 32, so that a small network's step has its
memory of the last one, pages and all.

To compile such a step takes a gigabyte in small pieces, which glibc keeps for the
process when they are free again. It gives them back where it is told to.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # from glibc 2.35 on
        f"glibc.malloc.mmap_threshold={64 << 20}",
        f"glibc.malloc.trim_threshold={256 << 20}",
    )
)
POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this command again with huge pages; returns where that is not to be.

    Nothing happens where the system gives none on request, or gives them anyway; where
    glibc's tunables are set already (GLIBC_TUNABLES; empty: as it was before); or where
    the process is none of our commands but imports one.
    """
    if not (is_command(sys.orig_argv) and is_possible(os.environ)):
        return
    try:
        os.execve(
            sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": TUNABLES}
        )
    except OSError:
        return


def is_command(argv) -> bool:
    """Whether it is ``python -m train...`` or ``benchmarks...``, or ``ibsgl``."""
    for option, value in zip(argv, argv[1:], strict=False):
        if option == "-m":
            return value.split(".")[0] in ("train", "benchmarks")
    return any(Path(word).name == "ibsgl" for word in argv[:2])


def is_possible(environment) -> bool:
    """Whether the system gives huge pages to those who ask, and glibc can."""
    if "GLIBC_TUNABLES" in environment:
        return False
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        major, minor = map(int, version.split(".")[:2])
        return (
            name == "glibc"
            and (major, minor) >= (2, 35)
            and ("[madvise]" in POLICY.read_text())
        )
    except (AttributeError, OSError, ValueError):  # another system, or libc
        return False


def release() -> None:
    """Gives the process's free memory back to the system, where glibc keeps it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
