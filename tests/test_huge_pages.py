"""Huge pages: asked for once, by our commands alone, where the system gives them."""

import os
import sys

import pytest

from train import huge_pages


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["python", "-m", "train", "--workdir=x"], True),
        (["python", "-u", "-m", "train.evaluate"], True),
        (["python", "/usr/bin/ibsgl", "train"], True),
        (["python", "-m", "pytest", "train"], False),
        (["python", "loop.py", "ibsgl"], False),
        (["python"], False),
    ],
)
def test_who_asks(argv, expected):
    assert huge_pages.is_command(argv) == expected


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
    monkeypatch.setattr(huge_pages, "POLICY", tmp_path / "enabled")
    if policy is not None:
        (tmp_path / "enabled").write_text(policy)
    assert huge_pages.is_possible(environment) == expected


def test_it_starts_again_once_with_the_same_words(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(huge_pages, "is_possible", lambda environment: True)
    huge_pages.restart()  # pytest is none of our commands
    assert not started
    words = [sys.executable, "-m", "train", "--workdir=a b"]
    monkeypatch.setattr(sys, "orig_argv", words)
    huge_pages.restart()
    ((program, given, environment),) = started
    assert (program, given) == (sys.executable, words)
    assert environment["GLIBC_TUNABLES"] == huge_pages.TUNABLE

    def refuse(*words):
        raise OSError("no more processes")

    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart()
