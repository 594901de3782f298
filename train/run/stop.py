"""A run that is asked to stop saves its state first, where there is one to save."""

import contextlib
import logging
import signal
import threading

import jax

from ibsgl_jax.app.interrupt import interrupts_kept, is_postponed

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has saved its state.

    No Exception: a library's ``except Exception`` must not swallow it.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number


class Stop:
    """Whether SIGTERM or Ctrl-C came.

    By default the signal itself ends the run, by ``Stopped``. Inside ``deferred()`` it
    is only noted: there the loop looks at ``number`` after every step, and saves. A
    second Ctrl-C is an ordinary KeyboardInterrupt.
    """

    def __init__(self):
        self.number = None
        self._is_deferred = False

    @contextlib.contextmanager
    def deferred(self):
        """Note the signal and go on; the loop saves and stops."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def note(self, number, frame=None):
        """The handler of the signals."""
        if not self._is_deferred and is_postponed(number, frame):
            return
        if self.number is not None and number == signal.SIGINT:
            logging.disable()  # what it interrupts has nothing more to tell
            raise KeyboardInterrupt
        self.number = number
        if not self._is_deferred:
            raise Stopped("stopped; the same command goes on", number)


@contextlib.contextmanager
def on_signals():
    """A ``Stop`` that hears, where this is the main thread and the only process.

    Several processes agree on a step through jax.distributed, whose handler must stay.
    """
    stop = Stop()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or jax.process_count() > 1:
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in SIGNALS}
    try:
        with interrupts_kept():
            yield stop
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
