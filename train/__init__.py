"""The training program: one file per command, the rooms below them."""

import os

# Read when jax loads XLA: its C++ warnings are of no use to the reader of a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
