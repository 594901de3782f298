"""Sweeps: one configuration each with many phases, run for several seeds."""
