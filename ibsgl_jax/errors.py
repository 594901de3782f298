"""The one error that a user mends: a command turns it into one line, never a traceback.

Imports nothing.
"""


class UserError(ValueError):
    """What the user has to mend, in one line that names the thing and the mend."""
