"""What is wrong with a data set, as text: one line for each fault."""

import os

# Names in one line of a message.
MOST_NAMES = 8


def shown(name) -> str:
    """A name as text that a terminal can show: no control or broken characters."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names) -> str:
    """The first names of many, in one line."""
    names = list(names)
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def fault_message(name: str, faults) -> str:
    """The faults of a data set: one line, or a heading and one line each."""
    faults = list(faults)
    if len(faults) == 1:
        return faults[0] if name in faults[0] else f"{name}: {faults[0]}"
    return "\n  ".join([f"{name}: {len(faults)} faults", *faults])
