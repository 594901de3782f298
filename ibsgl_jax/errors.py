"""The one error that a user mends: a command turns it into one line, never a traceback.

Imports nothing.
"""


class UserError(ValueError):
    """What the user has to mend, in one line that names the thing and the mend."""

    @property
    def lines(self) -> list[str]:
        """The message as it is printed."""
        return [" ".join(str(self).split())]
