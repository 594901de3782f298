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


class FaultsError(ConfigError, DatasetError):
    """Several faults, told together: a heading and a line for each.

    Of a configuration, a data set or both; the heading may name what they are of.
    """

    @property
    def lines(self) -> list[str]:
        """The heading, and each fault indented."""
        heading, *faults = str(self).splitlines()
        return [heading, *(f"  {fault.strip()}" for fault in faults)]

    @property
    def faults(self) -> list[str]:
        """Each fault with the name of what it is a fault of."""
        heading, *faults = map(str.strip, str(self).splitlines())
        name = heading.rpartition(": ")[0]
        return [f if name in f else f"{name}: {f}" for f in faults] or [heading]


class CheckpointError(UserError):
    """No usable checkpoint; the message names the folder and what to do."""


class CompileError(UserError):
    """No such topology, no libtpu, or a step that does not fit; one line."""


class DiskError(UserError):
    """The disk took no more; one line that says where."""


class Faults:
    """Mistakes, gathered to be told together.

    Example:
      faults = Faults()
      if config.batch_size < 1:
          faults.add("batch_size", "=0: must be at least 1")
      with faults.gather():
          check_something_else(config)
      faults.stop()
    """

    def __init__(self):
        self._errors, self._fields = [], set()

    def __bool__(self):
        return bool(self._errors)

    def add(self, field: str, text: str, *, of: str | None = None):
        """A fault of a field, "FIELD" and the text; the first of each field counts.

        of: another field that may be its cause, and has a fault then, too.
        """
        if field not in self._fields:
            self._fields |= {field, of or field}
            self._errors.append(ConfigError(field + text))

    def has(self, *fields) -> bool:
        """Whether a fault of any of these fields is known."""
        return not self._fields.isdisjoint(fields)

    @contextlib.contextmanager
    def gather(self):
        """Keep the UserError that is raised inside.

        Any other exception is raised if nothing is wrong so far; else it may come of
        that.
        """
        try:
            yield
        except UserError as error:
            self._errors.append(error)
        except Exception:
            if not self:
                raise

    def stop(self):
        """Raise what was gathered, if anything was.

        Raises:
          UserError: the only one; a FaultsError if there are several.
        """
        told = [
            fault
            for error in self._errors
            for fault in getattr(error, "faults", error.lines)
        ]
        told = list(dict.fromkeys(told))
        if len(self._errors) == 1 or len(told) == 1:
            raise self._errors[0]
        if told:
            raise FaultsError("\n  ".join([f"{len(told)} faults", *told]))


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
