"""Compiled programs, kept in the user's cache for the next command.

To compile an EfficientNet's steps takes minutes on a CPU: an evaluation finds what the
training compiled, and a run that goes on, or is made again, compiles nothing. They are
kept with the user's own files, not in the run: a program from elsewhere would be run.
What the compiler needed is given back to the system before the program runs.
"""

import contextlib
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

from train import memory
from train.files import cache_folder

MOST_BYTES = 2**30  # in the folder; the oldest go first
# jax's names of the events: found here, and compiled or found.
SAVED = "/jax/compilation_cache/compile_time_saved_sec"
COMPILED = "/jax/core/compile/backend_compile_duration"
_saved = []


def _listen(event, seconds, **_):
    if event == SAVED:
        _saved.append(seconds)
    if event == COMPILED and seconds > 1.0:
        memory.release()


def saved_seconds() -> float:
    """What compiling the programs that were found here would have taken so far."""
    return sum(_saved)


@contextlib.contextmanager
def kept():
    """Inside, programs that take a second or more to compile are kept and found.

    None is kept where jax has been given a folder (JAX_COMPILATION_CACHE_DIR), nor with
    several processes, which would have to agree on what is there.
    """
    if not _saved:
        _saved.append(0.0)
        jax.monitoring.register_event_duration_secs_listener(_listen)
    if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        yield
        return
    folder = cache_folder("programs")
    _prune(folder)
    _use(str(folder))
    try:
        with warnings.catch_warnings():
            # What cannot be read or kept is compiled, as ever.
            warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
            yield
    finally:
        _use(None)


def _use(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def _prune(folder):
    """Remove the oldest programs of too many; others may do so at the same time."""
    with contextlib.suppress(OSError):
        files = sorted(folder.glob("*-cache"), key=lambda path: -path.stat().st_mtime)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)
