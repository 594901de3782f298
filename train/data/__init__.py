"""Data of the training program: the embedded set and the input pipeline."""
