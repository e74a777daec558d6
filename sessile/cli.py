"""The command line: turns argv and the environment into a configuration and calls a command. Nothing else reads them.

Importing this module imports no torch and no web framework, so that --help answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sessile import __version__, commands
from sessile.config import Config, Setting, compose, nearest, settings, settings_of
from sessile.errors import StartupError

EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130

PRECEDENCE = (
    "Every setting can also be an environment variable (--page-size: SESSILE_PAGE_SIZE) or a line of the YAML file that"
    " --config names (page-size: 16). A flag wins over the environment, the environment over the file."
)


@dataclass(frozen=True)
class Command:
    """A command: what it is for, and what runs it with the rest of argv. Without a summary it is not listed."""

    run: Callable[["Parser", Sequence[str]], int]
    summary: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A wrong flag, setting or file is one line on standard error and status 2."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except StartupError as error:
        print(f"sessile: {error}", file=sys.stderr)
        return EXIT_WRONG_USE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (head, less) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED


def run(argv: Sequence[str]) -> int:
    """Find the command and run it. Raises StartupError for what is wrong in argv, environment or file."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else EXIT_WRONG_USE
    if argv[0] in ("-V", "--version"):
        print(f"sessile {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            command = COMMANDS[name]
            return command.run(Parser(f"sessile {name}", command.summary), argv[words:])
    subcommands = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if subcommands:
        if argv[1:2] in (["-h"], ["--help"]):
            print(overview(subcommands))
            return 0
        raise StartupError(f"say what: {' or '.join(f'sessile {name}' for name in subcommands)}")
    raise StartupError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)} (see sessile --help)")


def overview(names: Iterable[str] = ()) -> str:
    """The help of the program as a whole, or of some commands."""
    shown = [name for name in (names or COMMANDS) if COMMANDS[name].summary]
    lines = [f"  {name:16}{COMMANDS[name].summary}" for name in shown]
    return "\n".join(
        [
            "Sessile: a serving engine for language models in which a conversation's KV cache stays put.",
            "",
            "usage: sessile COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "sessile COMMAND --help lists the flags of a command.",
        ]
    )


class Parser(argparse.ArgumentParser):
    """Parser of one command. Its complaints are StartupErrors, so that the line that matters is not buried in usage."""

    def __init__(self, prog: str, summary: str) -> None:
        super().__init__(prog=prog, description=f"{summary[:1].upper()}{summary[1:]}.", allow_abbrev=False)
        self.set_defaults(flags={})

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it cannot make sense of."""
        raise StartupError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments. Raises StartupError, with the nearest known flag for an unknown one."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            hint = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            raise StartupError(f"unknown argument {unknown[0]}{hint} (see {self.prog} --help)")
        return arguments

    def add_settings(self, title: str, declared: Iterable[Setting]) -> None:
        """Flags for these settings, in a group of that title. Their text is collected in the namespace's `flags`."""
        group = self.add_argument_group(title)
        for setting in declared:
            group.add_argument(
                *(f"--{flag}" for flag in setting.flags),
                dest=setting.name,
                action=CollectFlag,
                metavar=_metavar(setting),
                help=_help(setting),
                default=argparse.SUPPRESS,
            )

    def add_config(self) -> None:
        """Flags for every setting of the configuration, section by section."""
        self.epilog = PRECEDENCE
        self.add_argument("--config", type=Path, metavar="FILE", help="read settings from this YAML file")
        for section in dict.fromkeys(setting.section for setting in settings()):
            self.add_settings(section, [setting for setting in settings() if setting.section == section])

    def parse_config(self, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
        """The configuration from all its sources, and the parsed arguments."""
        arguments = self.parse(argv)
        return compose(arguments.flags, os.environ, arguments.config), arguments


class CollectFlag(argparse.Action):
    """Keeps the text of a flag under its setting's name; the last occurrence counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Called by argparse for each occurrence. The dict is replaced, as the one at hand may be the default."""
        namespace.flags = {**namespace.flags, self.dest: values}


def serve(parser: Parser, argv: Sequence[str]) -> int:
    """`sessile serve`."""
    parser.add_config()
    # For `sessile chat`: a server that it started must not outlive it.
    parser.add_argument("--exit-with-stdin", action="store_true", help=argparse.SUPPRESS)
    config, arguments = parser.parse_config(argv)
    return commands.serve(config, exit_with_stdin=arguments.exit_with_stdin)


def chat(parser: Parser, argv: Sequence[str]) -> int:
    """`sessile chat`. Its flags are passed on to the server it starts, which reads environment and file as well."""
    parser.add_argument("--url", help="talk to the server that runs there instead of starting one")
    parser.add_config()
    config, arguments = parser.parse_config(argv)
    server_flags = flags_of(arguments.flags)
    if arguments.config:
        server_flags.append(f"--config={arguments.config}")
    return commands.chat(config, server_flags=server_flags, url=arguments.url)


def doctor(parser: Parser, argv: Sequence[str]) -> int:
    """`sessile doctor`."""
    parser.add_config()
    config, _ = parser.parse_config(argv)
    return commands.doctor(config)


def engine(parser: Parser, argv: Sequence[str]) -> int:
    """`sessile engine`: the child process of a server. Its configuration comes as the first line of standard input."""
    parser.add_argument("--address", required=True)
    return commands.engine(parser.parse(argv).address)


def bench(parser: Parser, argv: Sequence[str]) -> int:
    """`sessile bench …`: the last word of the parser's name says which."""
    options, measure = commands.bench(parser.prog.rpartition(" ")[2])
    declared = settings_of(options)
    parser.add_settings("settings", declared)
    flags = parser.parse(argv).flags
    values = {s.name: s.parse(flags[s.name], f"flag --{s.flags[0]}") for s in declared if s.name in flags}
    return measure(options(**values))


COMMANDS = {
    "serve": Command(serve, "serve a model over HTTP"),
    "chat": Command(chat, "talk to a model in this terminal; starts a server of its own, or uses --url"),
    "doctor": Command(doctor, "say what this machine offers, what is wrong with it, and what to do"),
    "bench step": Command(bench, "measure the host time of a step of the scheduler"),
    "bench history": Command(bench, "measure the host time of a turn on short and on long histories"),
    "bench sessions": Command(bench, "measure the latency of turns over HTTP, with sessions and by resending"),
    "engine": Command(engine, ""),
}


def flags_of(texts: Mapping[str, str]) -> list[str]:
    """Settings, as text by name, written as flags."""
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


def _metavar(setting: Setting) -> str:
    rules = setting.declared.metadata
    if rules["choices"]:
        return "{" + ",".join(rules["choices"]) + "}"
    return (rules["unit"] or {int: "N", float: "NUMBER", str: "TEXT"}[setting.type]).upper()


def _help(setting: Setting) -> str:
    default = setting.declared.default
    shown = setting.declared.metadata["help"] + ("" if default is None else f" [{default}]")
    return shown.replace("%", "%%")
