"""A run that is asked to stop saves its state first."""

import contextlib
import signal
import threading

import jax


class Stopped(RuntimeError):
    """The run was asked to stop (SIGTERM) and has saved its state."""


@contextlib.contextmanager
def on_sigterm():
    """An event that SIGTERM sets, where this is the main thread and the only process.

    Several processes agree on a step through jax.distributed, whose handler must stay.
    """
    event = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or jax.process_count() > 1:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
