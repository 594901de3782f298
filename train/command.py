"""What the commands share: the flag of the configuration, and one end for mistakes."""

import functools
import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ibsgl_jax.app.interrupt import interrupts_kept, raise_on_interrupt
from ibsgl_jax.app.terminal import escape_unencodable, shown
from train.errors import UserError

MAX_LENGTH = 2000  # of a line
REPORT = "This is a fault of the program; please report it with the lines above."


def run(main):
    """A command's ``main``, so that it ends as a user expects.

    A UserError, and a file that the system refuses, is one line on stderr and exit
    status 2; an interrupt one line and 130; a reader that has gone away (``| head``) is
    no error to tell. Any other exception keeps its traceback, which ends with a line
    that asks for a report.
    """

    @functools.wraps(main)
    def run_main(*args, **kwargs) -> int:
        escape_unencodable()
        try:
            raise_on_interrupt()
            with interrupts_kept():
                status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except UserError as error:
            tell(error.lines)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Else Python fails once more when it flushes stdout at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a shell tells of SIGPIPE
        except Exception as error:
            if isinstance(error, OSError) and error.filename and error.strerror:
                tell([f"{error.filename}: {error.strerror}"])
                return 2
            error.add_note(REPORT)
            raise

    return run_main


def tell(lines):
    """A mistake on stderr: names in it may hold anything, and be of any length."""
    lines = [shown(line) for line in lines]
    cut = [s if len(s) <= MAX_LENGTH else f"{s[:MAX_LENGTH]}..." for s in lines]
    print("error:", "\n".join(cut), file=sys.stderr)


def check_folder(flag: str, text: str):
    """UserError for what no system takes for the name of a folder."""
    if not text.strip() or "\0" in text:
        raise UserError(f"--{flag}={text}: give the name of a folder")


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
    try:
        if Path(file).exists() or not own.is_file():
            return argument
    except (OSError, ValueError):  # a name that cannot be one
        return argument
    return f"{name}={own}{colon}{rest}"


def make_parser(default: str | None = None):
    """For absl's ``app.run``: a flag that cannot be is one line, exit status 2.

    The default of --config comes in here, not with the flag: there, a mistake in the
    arguments would be a traceback. None for a command without that flag.
    """

    def parse(argv):
        given = any(a.lstrip("-").split("=")[0] == "config" for a in argv)
        if default and not given:
            argv = [argv[0], f"--config={default}", *argv[1:]]
        argv = [argv[0], *map(_find_config, argv[1:])]
        try:
            rest = flags.FLAGS(argv)
            if default:
                # Here, not later: what went wrong in the config's file.
                getattr(flags.FLAGS.config, "is_locked")  # noqa: B009
            return rest
        except Exception as error:  # noqa: BLE001  (a config may raise anything)
            tell([_flag_mistake(error)])
            sys.exit(2)

    return parse


def _flag_mistake(error: Exception) -> str:
    """What is wrong with the flags or in the configuration's file, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    is_ours = not any(name in place.filename for name in ("absl", "ml_collections"))
    if isinstance(error, SyntaxError):
        return f"--config: {text}"
    if "Error whilst parsing config file" in text:  # with its traceback, as text
        return f"--config: {str(error).strip().splitlines()[-1]}"
    if found := re.search(r"Attempted \[Relative path\]: (.*) \[Errno 2\]", text):
        return f"--config: no file {found[1]}"
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return f"--config: {cause.filename}: {cause.strerror}"
    if "earlier failure to load: " in text:
        return f"--config: {text.split('earlier failure to load: ', 1)[1]}"
    if isinstance(error, AttributeError) and text.startswith("module "):
        return "--config: the file defines no get_config()"
    if isinstance(error, AttributeError | KeyError) and not is_ours:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        return f"no config field {error.args[0]}"
    if isinstance(error, flags.Error | TypeError | ValueError) and not is_ours:
        return text
    where = f"{place.filename}, line {place.lineno}"
    return f"--config: {where}: {type(error).__name__}: {text}"
