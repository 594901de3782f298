"""What the commands share: the flag of the configuration, and mistakes in one line.

May import absl, ml_collections.
"""

import sys

from absl import flags
from ml_collections import config_flags


def define_config(default: str):
    """The flag --config, whose fields change with --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The configuration file; single fields change with --config.FIELD=VALUE. "
        f"{default} if absent.",
        lock_config=True,
    )


def make_parser(default: str):
    """For absl's ``app.run``: a flag that cannot be is one line, exit status 2.

    The default comes in here, not with the flag: there, a mistake in the arguments
    would be a traceback.
    """

    def parse(argv):
        if not any(a.lstrip("-").split("=")[0] == "config" for a in argv):
            argv = [argv[0], f"--config={default}", *argv[1:]]
        try:
            rest = flags.FLAGS(argv)
            # Here, not later: what went wrong in the config's file.
            getattr(flags.FLAGS.config, "is_locked")  # noqa: B009
            return rest
        except (AttributeError, KeyError) as error:
            while isinstance(error.args[0], Exception):
                error = error.args[0]
            text = f"no config field {error.args[0]}"
        except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
            text = str(error).removeprefix("Configuration is not available because of ")
        print("error:", " ".join(text.split()), file=sys.stderr)
        sys.exit(2)

    return parse
