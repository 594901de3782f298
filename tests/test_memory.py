"""Huge pages: asked for once, by our commands alone, where the system gives them.

And what compiling leaves behind: given back before the program runs.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

import jax
import pytest

from train import memory, programs


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["python", "-m", "train", "--workdir=x"], True),
        (["python", "-u", "-m", "train.evaluate"], True),
        (["python", "-m", "benchmarks.step"], True),
        (["python", "/usr/bin/ibsgl", "train"], True),
        (["python", "-m", "pytest", "train"], False),
        (["python", "loop.py", "ibsgl"], False),
        (["python"], False),
    ],
)
def test_who_asks(argv, expected):
    assert memory.is_command(argv) == expected


@pytest.mark.parametrize(
    "libc, policy, environment, expected",
    [
        ("glibc 2.36", "always [madvise] never\n", {}, True),
        ("glibc 2.34", "always [madvise] never\n", {}, False),
        ("glibc 2.36", "[always] madvise never\n", {}, False),
        ("glibc 2.36", None, {}, False),
        ("musl", "always [madvise] never\n", {}, False),
        ("glibc 2.36", "always [madvise] never\n", {"GLIBC_TUNABLES": ""}, False),
    ],
)
def test_where_it_is_possible(
    libc, policy, environment, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    monkeypatch.setattr(memory, "POLICY", tmp_path / "enabled")
    if policy is not None:
        (tmp_path / "enabled").write_text(policy)
    assert memory.is_possible(environment) == expected


def test_it_starts_again_once_with_the_same_words(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(memory, "is_possible", lambda environment: True)
    memory.restart()  # pytest is none of our commands
    assert not started
    words = [sys.executable, "-m", "train", "--workdir=a b"]
    monkeypatch.setattr(sys, "orig_argv", words)
    memory.restart()
    ((program, given, environment),) = started
    assert (program, given) == (sys.executable, words)
    assert environment["GLIBC_TUNABLES"] == memory.TUNABLES

    def refuse(*words):
        raise OSError("no more processes")

    monkeypatch.setattr(os, "execve", refuse)
    memory.restart()


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps other pieces"
)
def test_what_is_free_goes_back_to_the_system():
    malloc, free = (ctypes.CDLL("libc.so.6")[name] for name in ("malloc", "free"))
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.argtypes = [ctypes.c_void_p]
    pieces = [malloc(10_000) for _ in range(20_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 10_000)
    last = malloc(10_000)  # lies behind them, so that the heap cannot shrink by itself
    for piece in pieces:
        free(piece)
    before = resident_bytes()
    memory.release()
    assert before - resident_bytes() > 150e6
    free(last)


@pytest.mark.parametrize(
    "event, seconds, count",
    [(programs.COMPILED, 20.0, 1), (programs.COMPILED, 0.1, 0), ("other", 20.0, 0)],
)
def test_it_is_given_back_after_a_long_compilation(event, seconds, count, monkeypatch):
    released = []
    monkeypatch.setattr(memory, "release", lambda: released.append(None))
    programs._listen(event, seconds)
    assert len(released) == count


def test_jax_tells_of_a_compilation_before_the_program_runs():
    """Under the name that is listened for: jax does not promise it."""
    told = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: told.append(name)
    )
    jax.jit(lambda x: x * 3.25).lower(1.0).compile()
    assert programs.COMPILED in told


def test_who_keeps_programs_listens_once(monkeypatch):
    told = []
    monkeypatch.setattr(programs, "_saved", [])
    monkeypatch.setattr(
        jax.monitoring, "register_event_duration_secs_listener", told.append
    )
    for _ in range(2):
        with programs.kept():
            pass
    assert told == [programs._listen]
