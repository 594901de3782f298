"""Scripts that print ratios; each runs as ``python -m benchmarks.NAME``."""
