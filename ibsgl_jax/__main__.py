"""``python -m ibsgl_jax``, and what the console script ``ibsgl`` starts."""

import sys

from ibsgl_jax.app.interrupt import exit_on_interrupt

exit_on_interrupt()

from ibsgl_jax.app.cli import main  # noqa: E402  (imports jax)

if __name__ == "__main__":
    sys.exit(main())
