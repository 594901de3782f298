"""The training program: one file per command, the rooms below them."""

import os
import signal
import sys

# Read when jax loads XLA: its C++ warnings are of no use to the reader of a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def end_quietly(number, frame):
    """Ctrl-C while the rest is imported, where libraries may swallow an exception."""
    del number, frame
    print("stopped; the same command goes on", file=sys.stderr, flush=True)
    os._exit(130)


# ``python -m train...`` imports this first; ``command.run`` ends it.
if sys.argv[:1] == ["-m"]:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
