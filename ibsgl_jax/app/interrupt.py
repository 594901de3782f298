"""Ctrl-C where an exception would be lost: while modules load, and in destructors.

An import may take seconds. What a signal's handler raises there comes out in any
package's code: tried on tensorflow_datasets, it was swallowed, and half a package was
left behind.
"""

import contextlib
import os
import signal
import sys
import threading

IMPORT = "<frozen importlib._bootstrap>"
OURS = ("__main__", "ibsgl_jax", "train")


def exit_on_interrupt() -> None:
    """From here to ``raise_on_interrupt`` Ctrl-C is one line and status 130, at once.

    For a command that imports what it needs: there is nothing to save yet.
    """
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _raise):
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Ctrl-C is a KeyboardInterrupt again, but for one in the middle of an import."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, _raise)


def is_postponed(number: int, frame) -> bool:
    """For a signal's handler: the signal came in an import, and will come again.

    Args:
      number: the signal's.
      frame: where it came. An import counts if what it imports is not ours.
    """
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in OURS:
            return False
        if frame.f_code.co_filename == IMPORT:
            _send_again(number)
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def interrupts_kept():
    """An interrupt that Python would lose comes again.

    What a signal's handler raises while a destructor runs, or a callback of the garbage
    collector (jax has one), is printed as ignored, and the program goes on. The signal
    is the KeyboardInterrupt's ``number``, if it has one.
    """
    before = sys.unraisablehook

    def hook(lost):
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        _send_again(getattr(lost.exc_value, "number", signal.SIGINT))

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send_again(number):
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _exit(number, frame):
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _raise(number, frame):
    if not is_postponed(number, frame):
        raise KeyboardInterrupt
