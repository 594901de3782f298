"""The mistakes that a command tells in one line.

Each names the thing and what to do about it; ``command.run`` prints it. All are
ValueErrors, which is what a caller in Python catches.
"""

import contextlib
import errno

from ibsgl_jax.errors import UserError


class ConfigError(UserError):
    """The configuration asks for something impossible; one line that says what."""


class DatasetError(UserError):
    """A data set that is absent, incomplete or not what the program can use."""


class FaultsError(DatasetError):
    """Several faults of a data set, told together: a heading and a line for each."""

    @property
    def lines(self) -> list[str]:
        """The heading, and each fault indented."""
        heading, *faults = str(self).splitlines()
        return [heading, *(f"  {fault.strip()}" for fault in faults)]


class CheckpointError(UserError):
    """No usable checkpoint; the message names the folder and what to do."""


class CompileError(UserError):
    """No such topology, no libtpu, or a step that does not fit; one line."""


class DiskError(UserError):
    """The disk took no more; one line that says where."""


@contextlib.contextmanager
def disk_errors():
    """A full disk is one line: what is there stays whole, and the run can go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskError(
            f"cannot write {error.filename or 'the logs'}: {error.strerror}; make room "
            "and repeat the command"
        ) from error
