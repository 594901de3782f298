"""What the commands share: the flag of the configuration, and one end for mistakes."""

import functools
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from train.errors import UserError

REPORT = "This is a fault of the program; please report it with the lines above."


def run(main):
    """A command's ``main``, so that it ends as a user expects.

    A UserError is one line on stderr and exit status 2; an interrupt one line and 130;
    a reader that has gone away (``| head``) is no error to tell. Any other exception
    keeps its traceback, which ends with a line that asks for a report.
    """

    @functools.wraps(main)
    def run_main(*args, **kwargs) -> int:
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except UserError as error:
            print("error:", "\n".join(error.lines), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Else Python fails once more when it flushes stdout at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a shell tells of SIGPIPE
        except Exception as error:
            error.add_note(REPORT)
            raise

    return run_main


def define_config(default: str):
    """The flag --config, whose fields change with --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The configuration file; single fields change with --config.FIELD=VALUE. "
        f"{default} if absent.",
        lock_config=True,
    )


def _find_config(argument: str) -> str:
    """--config=FILE with a file of the trainer's own where there is no such file."""
    name, is_given, value = argument.partition("=")
    if not is_given or name.lstrip("-") != "config":
        return argument
    file, colon, rest = value.partition(":")
    own = Path(__file__).resolve().parents[1] / file
    if Path(file).exists() or not own.is_file():
        return argument
    return f"{name}={own}{colon}{rest}"


def make_parser(default: str):
    """For absl's ``app.run``: a flag that cannot be is one line, exit status 2.

    The default comes in here, not with the flag: there, a mistake in the arguments
    would be a traceback.
    """

    def parse(argv):
        if not any(a.lstrip("-").split("=")[0] == "config" for a in argv):
            argv = [argv[0], f"--config={default}", *argv[1:]]
        argv = [argv[0], *map(_find_config, argv[1:])]
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
