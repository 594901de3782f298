"""``main`` of the command ``ibsgl``, where it has always been."""

from ibsgl_jax.app.cli import main

__all__ = ["main"]
