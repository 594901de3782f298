"""The arguments of a command: numbers with bounds, and mistakes in one line."""

import argparse

from train.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors, which ``command.run`` tells."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def at_least(lowest: int):
    """The type of a whole number with a lowest value, of 32 bits."""

    def number(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if not lowest <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{value} is not in [{lowest}, 2^31)")
        return value

    return number


def some(text: str) -> str:
    """The type of a text that must say something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text
