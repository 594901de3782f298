"""A training run: its folder, its loop, its checkpoints, and a run read back."""
