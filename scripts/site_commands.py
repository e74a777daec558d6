"""The page of the documentation site that lists the commands with their flags, from the parsers of the command line."""

import argparse
import re

from sessile.cli import COMMANDS, parser_for
from sessile.config import settings

INTRODUCTION = """\
# Commands

What `sessile` can do, each with flags of its own. `serve`, `chat` and `doctor` also take every [switch](SWITCHES.md) of
the server. `sessile COMMAND --help` says the same in a terminal.
"""


def render() -> str:
    """The page as Markdown."""
    return "\n".join([INTRODUCTION, *(section(name) for name, command in COMMANDS.items() if command.summary)])


def section(name: str) -> str:
    """One command: what it is for, and its flags."""
    parser = parser_for(name)
    switches = {f"--{flag}" for setting in settings() for flag in setting.flags}
    own = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [row(action) for action in own
            if action.help != argparse.SUPPRESS and not switches & set(action.option_strings)]  # fmt: skip
    summary = f"{COMMANDS[name].summary[:1].upper()}{COMMANDS[name].summary[1:]}."
    parts = [f"## `sessile {name}` {{ #{name.replace(' ', '-')} }}", summary]
    if rows:
        parts.append("\n".join(["| flag | takes | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def row(action: argparse.Action) -> str:
    """One flag or argument."""
    flags = " ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = re.sub(r"\s+", " ", (action.help or "").replace("%%", "%")).replace("|", "\\|").replace("<", "&lt;")
    remark = f"*required*. {text}" if action.required and action.option_strings else text
    return f"| {flags} | {taken(action)} | {remark} |"


def taken(action: argparse.Action) -> str:
    """What stands behind a flag: nothing, one of some words, or a kind of value."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    metavar = str(action.metavar or "")
    words = action.choices or (metavar.strip("{}").split(",") if metavar.startswith("{") else [metavar.lower()])
    return ", ".join(map(str, words))
