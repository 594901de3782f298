"""python -m train [--config=configs/quickstart.py] [--workdir=...]: flags, then run."""

from ibsgl_jax.app.interrupt import exit_on_interrupt
from train import memory

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()
    memory.restart()

import contextlib
import logging
import re
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from ibsgl_jax.app.terminal import shown
from train import command, programs
from train.errors import UserError
from train.run.loop import train_and_evaluate
from train.run.stop import Stopped
from train.run.watch import NonFiniteError

DEFAULT_CONFIG = "configs/quickstart.py"

command.define_config(DEFAULT_CONFIG)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/NAME, after the config's file, if absent."
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost",
    False,
    "Run as one of several processes. TPU pods, Slurm, MPI and Kubernetes are "
    "detected; elsewhere give the next three flags.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT that process 0 listens on."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_EVALUATE = flags.DEFINE_bool(
    "evaluate",
    True,
    "Measure every phase on the test split at the end and draw the picture; "
    "--noevaluate leaves that to train.evaluate or train.scores.",
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "FIRST:LAST step of each phase to write a profiler trace of, such as 10:20; it "
    "goes to profile/ in the workdir.",
)


@contextlib.contextmanager
def plain_lines():
    """What the run and the library log is plain lines; ``ibsgl`` tells the latter's."""
    loggers = [logging.getLogger(name) for name in ("train", "ibsgl_jax")]
    before = [(log, log.handlers[:], log.propagate, log.level) for log in loggers]
    for log in loggers:
        log.handlers = log.handlers or [logging.StreamHandler()]
        log.propagate = False
        log.setLevel(logging.INFO)  # absl has just set the root's
    try:
        yield
    finally:
        for log, log.handlers, log.propagate, level in before:
            log.setLevel(level)


@command.run
@plain_lines()
def main(argv):
    """Run the training."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    # Orbax and tfds tell much that no reader of a run needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    profile = parse_window(_PROFILE.value)
    initialize()
    workdir = _WORKDIR.value
    if workdir is None:
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = Path("runs") / Path(name.split(":")[0]).stem
    command.check_folder("workdir", str(workdir))
    if jax.process_index() == 0:
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{shown(workdir)}: {devices}", flush=True)
    try:
        with programs.kept():
            train_and_evaluate(
                flags.FLAGS.config, workdir, profile=profile, table=_EVALUATE.value
            )
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130 if stopped.number == signal.SIGINT else 0
    return 0


def initialize():
    """Join the other processes, if the flags say that there are any.

    Raises:
      UserError: the flags do not fit together, or no process is there to join.
    """
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _MULTIHOST.value:
        if any(value is not None for value in explicit):
            raise UserError("--coordinator and its kin need --multihost")
        return
    if None in explicit and any(value is not None for value in explicit):
        raise UserError("give --coordinator, --num_processes and --process_id together")
    try:
        # Without them jax asks the cluster's environment.
        jax.distributed.initialize(*explicit)
    except ValueError as error:
        raise UserError(
            f"--multihost: no cluster found here ({error}); give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    except RuntimeError as error:
        raise UserError(str(error)) from error


def parse_window(text):
    """ "10:20" -> (10, 20); None stays None."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    is_window = re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", text)
    if not is_window or not 1 <= int(first) <= int(last):
        raise UserError(f"--profile={text}: give FIRST:LAST, such as 10:20")
    return int(first), int(last)


if __name__ == "__main__":
    app.run(main, flags_parser=command.make_parser(DEFAULT_CONFIG))
