"""``python -m ibsgl_jax``: the same as the console script ``ibsgl``."""

import sys

from ibsgl_jax.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
