"""What the person at the terminal sees: progress, warnings, and one line per error.

Names of files may hold anything: what is printed goes through ``shown``.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterable

from ibsgl_jax.app.interrupt import interrupts_kept, raise_on_interrupt
from ibsgl_jax.errors import UserError

BROKEN_PIPE, BUG, INTERRUPTED, MISTAKE, TERMINATED = 141, 1, 130, 2, 143
# Control, format, surrogate, private and unassigned characters; line separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MAX_LENGTH = 2000
# Module -> its package and the extra that has it.
_OPTIONAL = {
    "PIL": ("pillow", "explain"),
    "matplotlib": ("matplotlib", "explain"),
    "flatbuffers": ("flatbuffers", "explain"),
    "jax2onnx": ("jax2onnx", "onnx"),
}


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C saves is saved."""

    number = signal.SIGTERM


def shown(text) -> str:
    """Text or a path as one printable line, valid as UTF-8.

    Bytes of a name that are no UTF-8 become replacement marks; control characters (a
    newline, an escape sequence of the terminal) their escapes.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(text))
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _UNPRINTABLE
        else c
        for c in text
    )


def escape_unencodable():
    """What the terminal's encoding has no letter for is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(command: Callable[[], int]) -> int:
    """Runs a command; every end of it is a fixed exit status.

    Returns:
      What the command returns; 2 after a ``UserError`` (one line on stderr), 130 after
      Ctrl-C (one line), 143 after SIGTERM (one line), 141 if nobody reads the output
      any more (nothing is said), and 1 after anything else, which is a bug of ours: its
      traceback, and a line that asks for a report.
    """
    escape_unencodable()
    try:
        raise_on_interrupt()
        with _notices(), _terminable(), interrupts_kept():
            status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UserError as error:
        _say_last(str(error))
        return MISTAKE
    except KeyboardInterrupt as interrupt:
        _say_last(f"interrupted{f': {interrupt}' if interrupt.args else ''}")
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        return BROKEN_PIPE
    except Exception as error:
        line = _outside_cause(error)
        if line is not None:
            _leave_stdout()
            _say_last(line)
            return MISTAKE
        end_progress()
        traceback.print_exc()
        say("this is a bug of ibsgl: please report it with the lines above")
        return BUG


@contextlib.contextmanager
def _terminable():
    """SIGTERM raises ``Terminated``, where nobody has a handler for it."""

    def raise_terminated(number, frame):
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Notices(logging.Handler):
    """What the library logs, as lines like all the others."""

    def emit(self, record):
        end_progress()
        say(record.getMessage())


@contextlib.contextmanager
def _notices():
    logger, handler = logging.getLogger("ibsgl_jax"), _Notices()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _outside_cause(error: Exception) -> str | None:
    """The line for an error that is neither the user's mistake nor our bug, or None."""
    if isinstance(error, ModuleNotFoundError) and error.name in _OPTIONAL:
        package, extra = _OPTIONAL[error.name]
        return f"no package {package}: pip install 'ibsgl_jax[{extra}]'"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "not enough memory: try a smaller --chunk-size"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return None


def _leave_stdout() -> None:
    """Python flushes stdout once more when it ends, and would fail there again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # a test's stdout has no fileno
        pass


def say(line: str) -> None:
    """One line on stderr, whatever is in it; nothing if stderr is closed."""
    _write(f"ibsgl: {_shortened(shown(line))}\n")


def warn(line: str) -> None:
    """One line on stderr that the command goes on after."""
    end_progress()
    say(f"warning: {line}")


def say_list(heading: str, lines: Iterable[str]) -> None:
    """A heading and an indented line for each."""
    end_progress()
    say(f"{heading}:")
    for line in lines:
        _write(f"  {_shortened(shown(line))}\n")


def show_progress(text: str) -> None:
    """A line that the next one replaces, on a terminal; a plain line elsewhere."""
    text = _shortened(shown(text))
    _write(f"\r\x1b[K{text}" if _is_terminal() else f"{text}\n")


def end_progress() -> None:
    """Clear the line of ``show_progress``, on a terminal."""
    if _is_terminal():
        _write("\r\x1b[K")


def _say_last(line: str) -> None:
    end_progress()
    say(line)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _write(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # closed: the command's work is worth more
        pass


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_LENGTH else line[: _MAX_LENGTH - 1] + "\u2026"
