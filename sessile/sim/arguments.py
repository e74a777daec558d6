"""The command line of `python -m sessile.sim` refuses as that of `sessile` does: one line, status 2."""

import argparse
from typing import NoReturn

from sessile.errors import StartupError


class Parser(argparse.ArgumentParser):
    """Its complaints are StartupErrors, and so are those of its subcommands' parsers."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it cannot make sense of."""
        raise StartupError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """A number from 1 on: of nothing, nothing is found, which would look like success. Raises as argparse has it."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text:.100}")
    return number
