"""The one door of the command: every end of it is a line and a status."""

import io
import logging
import os
import subprocess
import sys
import time

import pytest

from ibsgl_jax.app import terminal
from ibsgl_jax.errors import UserError


class TestShown:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("a b.png", "a b.png"),
            ("caf\u00e9 \u65e5\u672c \U0001f431", "caf\u00e9 \u65e5\u672c \U0001f431"),
            ("at 1.00\u202fPM", "at 1.00\u202fPM"),
            ("two\nlines\t", "two\\nlines\\t"),
            ("\x1b[31m\x07\x9b", "\\x1b[31m\\x07\\x9b"),
            ("\u202e\u2028", "\\u202e\\u2028"),
            ("caf\udce9", "caf\ufffd"),
        ],
    )
    def test_is_one_printable_line(self, text, expected):
        assert terminal.shown(text) == expected
        terminal.shown(text).encode()


class TestRun:
    def end(self, error, capsys):
        def command():
            raise error

        status = terminal.run(command)
        return status, capsys.readouterr().err

    @pytest.mark.parametrize(
        "error, status, line",
        [
            (UserError("--x: no\nsuch \x1b[2J"), 2, "ibsgl: --x: no\\nsuch \\x1b[2J"),
            (KeyboardInterrupt(), 130, "ibsgl: interrupted"),
            (KeyboardInterrupt("3 of 4"), 130, "ibsgl: interrupted: 3 of 4"),
            (OSError(28, "No space left", "x"), 2, "ibsgl: x: No space left"),
            (MemoryError(), 2, "ibsgl: not enough memory: try a smaller --chunk-size"),
            (
                ModuleNotFoundError("No module", name="PIL"),
                2,
                "ibsgl: no package pillow: pip install 'ibsgl_jax[explain]'",
            ),
            (
                ModuleNotFoundError("No module", name="jax2onnx"),
                2,
                "ibsgl: no package jax2onnx: pip install 'ibsgl_jax[onnx]'",
            ),
        ],
    )
    def test_one_line_and_a_status(self, capsys, error, status, line):
        assert self.end(error, capsys) == (status, line + "\n")

    def test_a_closed_pipe_is_quiet(self, capsys):
        assert self.end(BrokenPipeError(), capsys) == (141, "")

    @pytest.mark.parametrize(
        "error", [ValueError("x"), KeyError("x"), ImportError("x")]
    )
    def test_a_bug_keeps_its_traceback(self, capsys, error):
        status, told = self.end(error, capsys)
        assert status == 1 and "Traceback" in told
        assert "please report it" in told.splitlines()[-1]

    @pytest.mark.parametrize("kind, status", [(KeyboardInterrupt, 130), ("term", 143)])
    def test_an_interrupt_in_a_destructor_is_not_lost(self, capsys, kind, status):
        class Losing:
            def __del__(self):
                raise terminal.Terminated if kind == "term" else kind

        def command():
            Losing()
            time.sleep(60)

        assert terminal.run(command) == status
        assert capsys.readouterr().err == "ibsgl: interrupted\n"

    def test_what_the_library_logs_is_a_line_like_the_others(self, capsys):
        def command():
            logging.getLogger("ibsgl_jax").warning("%s: drops 'a'", "\x1b[2J.pth")
            return 0

        for _ in range(2):  # one handler at a time
            assert terminal.run(command) == 0
            assert capsys.readouterr().err == "ibsgl: \\x1b[2J.pth: drops 'a'\n"

    def test_a_closed_stderr_stops_nothing(self, monkeypatch):
        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

        for stream in (Closed(), None):
            monkeypatch.setattr(sys, "stderr", stream)
            terminal.warn("x")
            terminal.show_progress("x")
            terminal.say_list("x", ["y"])


class TestOutput:
    """With a real pipe and a full device behind the command."""

    def run(self, **options):
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from ibsgl_jax.app import terminal\n"
                "def many():\n    for i in range(99999): print(i)\n    return 0\n"
                "raise SystemExit(terminal.run(many))",
            ],
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_nobody_reads_on(self, unbuffered):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        process = self.run(stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141
        process.stderr.close()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
    def test_a_full_disk_behind_stdout(self):
        with open("/dev/full", "w") as full:
            process = self.run(stdout=full)
            assert "No space left" in process.stderr.read()
        assert process.wait() == 2
        process.stderr.close()
