"""The command line: turns argv and the environment into a configuration and calls a command. Nothing else reads them.

Importing this module imports no torch and no web framework, so that --help answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sessile import __version__, commands
from sessile.config import API_KEY_VARIABLE, Config, Setting, compose, nearest, settings, settings_of
from sessile.errors import StartupError

if TYPE_CHECKING:
    from sessile.shell import CommandLine

EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130
DEFAULT_URL = "http://127.0.0.1:30000"

PRECEDENCE = (
    "Every setting can also be an environment variable (--page-size: SESSILE_PAGE_SIZE) or a line of the YAML file that"
    " --config names (page-size: 16). A flag wins over the environment, the environment over the file."
)


@dataclass(frozen=True)
class Command:
    """A command: what it is for, its flags, and what runs it. Without a summary it is not listed."""

    summary: str
    add_flags: Callable[["Parser"], None]
    run: Callable[[argparse.Namespace], int]


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
            return COMMANDS[name].run(parser_for(name).parse(argv[words:]))
    subcommands = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if subcommands:
        if argv[1:2] in (["-h"], ["--help"]):
            print(overview(subcommands))
            return 0
        raise StartupError(f"say which: sessile {argv[0]} {' | '.join(name.split()[1] for name in subcommands)}")
    raise StartupError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)} (see sessile --help)")


def parser_for(name: str) -> "Parser":
    """The parser of one command's flags."""
    command = COMMANDS[name]
    parser = Parser(f"sessile {name}", command.summary)
    command.add_flags(parser)
    return parser


def overview(names: Iterable[str] = ()) -> str:
    """The help of the program as a whole, or of some commands."""
    shown = [name for name in (names or COMMANDS) if COMMANDS[name].summary]
    width = max(map(len, shown)) + 2
    lines = [f"  {name:{width}}{COMMANDS[name].summary}" for name in shown]
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
        self._values: dict[str, tuple[str, ...]] = {}
        """The values of each flag of a setting that has only these."""

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
            self._values |= {f"--{flag}": setting.declared.metadata["choices"] for flag in setting.flags}

    def command_line(self, name: str, summary: str) -> "CommandLine":
        """This command as shell completion knows it."""
        from sessile.shell import CommandLine, Flag

        flags = [
            Flag(text, action.help or "", tuple(action.choices or self._values.get(text, ())), action.nargs != 0)
            for action in self._actions
            for text in action.option_strings
            if text.startswith("--") and action.help != argparse.SUPPRESS
        ]
        arguments = [word for action in self._actions if not action.option_strings for word in action.choices or ()]
        return CommandLine(name, summary, tuple(flags), tuple(arguments))

    def add_config(self) -> None:
        """Flags for every setting of the configuration, section by section."""
        self.epilog = PRECEDENCE
        self.add_argument("--config", type=Path, metavar="FILE", help="read settings from this YAML file")
        for section in dict.fromkeys(setting.section for setting in settings()):
            self.add_settings(section, [setting for setting in settings() if setting.section == section])


class CollectFlag(argparse.Action):
    """Keeps the text of a flag under its setting's name; the last occurrence counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Called by argparse for each occurrence. The dict is replaced, as the one at hand may be the default."""
        namespace.flags = {**namespace.flags, self.dest: values}


def add_serve_flags(parser: Parser) -> None:
    """Flags of `sessile serve`."""
    parser.add_config()
    # For `sessile chat`: a server that it started must not outlive it.
    parser.add_argument("--exit-with-stdin", action="store_true", help=argparse.SUPPRESS)


def serve(arguments: argparse.Namespace) -> int:
    """`sessile serve`."""
    return commands.serve(config_from(arguments), exit_with_stdin=arguments.exit_with_stdin)


def add_chat_flags(parser: Parser) -> None:
    """Flags of `sessile chat`: its own and those of the server that it starts."""
    parser.add_argument(
        "--url",
        help=f"talk to the server that runs there instead of starting one; if it wants a key, it gets the one in the "
        f"environment variable {API_KEY_VARIABLE}",
    )
    parser.add_settings("chat", settings_of(commands.ChatOptions))
    parser.add_config()


def chat(arguments: argparse.Namespace) -> int:
    """`sessile chat`. Settings given as flags are passed on; environment and file the server reads by itself."""
    options = options_from(commands.ChatOptions, arguments.flags)
    server_flags = flags_for_server(arguments, options)
    return commands.chat(
        config_from(arguments),
        options,
        server_flags=server_flags,
        url=arguments.url,
        api_key=os.environ.get(API_KEY_VARIABLE),
    )


def add_batch_flags(parser: Parser) -> None:
    """Flags of `sessile run-batch`: its own and those of the server that it starts."""
    parser.add_argument("input", type=Path, metavar="IN", help="requests, a line of JSON each, as OpenAI's batches")
    parser.add_argument("output", type=Path, metavar="OUT", help="answers; rows that it has are not done again")
    parser.add_argument("--url", help=f"use the server that runs there; its key is in {API_KEY_VARIABLE}")
    parser.add_settings("batch", settings_of(commands.BatchOptions))
    parser.add_config()


def run_batch(arguments: argparse.Namespace) -> int:
    """`sessile run-batch`."""
    options = options_from(commands.BatchOptions, arguments.flags)
    server_flags = flags_for_server(arguments, options)
    return commands.run_batch(
        config_from(arguments),
        options,
        (arguments.input, arguments.output),
        server_flags=server_flags,
        url=arguments.url,
        api_key=os.environ.get(API_KEY_VARIABLE),
    )


def flags_for_server(arguments: argparse.Namespace, options: Any) -> list[str]:
    """Take a command's own options out of the flags; the rest, as flags for the server that it starts."""
    arguments.flags = {name: text for name, text in arguments.flags.items() if name not in vars(options)}
    server_flags = [f"--{name.replace('_', '-')}={text}" for name, text in arguments.flags.items()]
    return [*server_flags, f"--config={arguments.config}"] if arguments.config else server_flags


def add_completion_flags(parser: Parser) -> None:
    """Arguments of `sessile completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="for example: source <(sessile completion bash)")


def completion(arguments: argparse.Namespace) -> int:
    """`sessile completion`."""
    listed = [(name, command.summary) for name, command in COMMANDS.items() if command.summary]
    return commands.completion(
        arguments.shell, [parser_for(name).command_line(name, summary) for name, summary in listed]
    )


def add_key_flags(parser: Parser) -> None:
    """Flags of `sessile key`."""
    parser.add_argument("--tenant", required=True, metavar="NAME", help="whom the key stands for")
    parser.add_argument("--role", choices=("user", "admin"), default="user", help="what it allows [user]")


def key(arguments: argparse.Namespace) -> int:
    """`sessile key`."""
    return commands.key(arguments.tenant, arguments.role)


def doctor(arguments: argparse.Namespace) -> int:
    """`sessile doctor`."""
    return commands.doctor(config_from(arguments))


def add_engine_flags(parser: Parser) -> None:
    """Flags of the engine process; its configuration comes as the first line of standard input."""
    parser.add_argument("--address", required=True)


def engine(arguments: argparse.Namespace) -> int:
    """`sessile engine`: the child process of a server."""
    return commands.engine(arguments.address)


def add_no_flags(parser: Parser) -> None:
    """For a command that has none."""


def builder(arguments: argparse.Namespace) -> int:
    """`sessile builder`: the child process of a server that builds indexes; its configuration comes as `engine`'s."""
    return commands.builder()


def add_corpus_build_flags(parser: Parser) -> None:
    """Flags of `sessile corpus build`."""
    parser.add_argument("texts", nargs="+", type=Path, metavar="FILE", help="texts: .jsonl, any other file, folders")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the index, a .corpus")
    parser.add_argument("--model", default="default", help="whose tokenizer to use, as for serve [default]")


def add_server_flags(parser: Parser) -> None:
    """Flags of commands that talk to a running server."""
    shown = f"the server; its key is in {API_KEY_VARIABLE} [{DEFAULT_URL}]"
    parser.add_argument("--url", default=DEFAULT_URL, help=shown)


def add_corpus_add_flags(parser: Parser) -> None:
    """Flags of `sessile corpus add`."""
    add_server_flags(parser)
    parser.add_argument("texts", nargs="*", type=Path, metavar="FILE", help="texts: .jsonl, any other file, folders")
    parser.add_argument("--path", help="instead: a file or folder below the server's --corpora-dir")
    parser.add_argument("--id", help="name of the corpus; one is made up if there is none")
    parser.add_argument("--replace", action="store_true", help="take the place of a corpus of this name")
    parser.add_argument("--own", action="store_true", help="with an admin's key: for its own tenant, not for everybody")


def add_corpus_remove_flags(parser: Parser) -> None:
    """Flags of `sessile corpus remove`."""
    add_server_flags(parser)
    parser.add_argument("corpus", metavar="ID", help="name of the corpus")


def corpus_build(arguments: argparse.Namespace) -> int:
    """`sessile corpus build`."""
    return commands.corpus_build(arguments.model, arguments.texts, arguments.output)


def corpus_add(arguments: argparse.Namespace) -> int:
    """`sessile corpus add`."""
    fields: dict[str, Any] = {"replace": arguments.replace}
    if arguments.id:
        fields["id"] = arguments.id
    if arguments.own:
        fields["shared"] = False
    key = os.environ.get(API_KEY_VARIABLE)
    return commands.corpus_add(arguments.url, key, arguments.texts, arguments.path, fields)


def corpus_list(arguments: argparse.Namespace) -> int:
    """`sessile corpus list`."""
    return commands.corpus_list(arguments.url, os.environ.get(API_KEY_VARIABLE))


def corpus_remove(arguments: argparse.Namespace) -> int:
    """`sessile corpus remove`."""
    return commands.corpus_remove(arguments.url, os.environ.get(API_KEY_VARIABLE), arguments.corpus)


def bench(name: str, summary: str) -> Command:
    """`sessile bench NAME`, whose flags are the fields of its options."""

    def add_flags(parser: Parser) -> None:
        parser.add_settings("settings", settings_of(commands.bench(name)[0]))

    def run_bench(arguments: argparse.Namespace) -> int:
        options, measure = commands.bench(name)
        return measure(options_from(options, arguments.flags))

    return Command(summary, add_flags, run_bench)


COMMANDS = {
    "serve": Command("serve a model over HTTP", add_serve_flags, serve),
    "chat": Command("talk to a model in this terminal; starts a server, or uses --url", add_chat_flags, chat),
    "run-batch": Command("answer a file of requests; what is done is not done again", add_batch_flags, run_batch),
    "key": Command("draw a key and print its entry for the keys file of serve", add_key_flags, key),
    "corpus add": Command("give a running server texts to draft from", add_corpus_add_flags, corpus_add),
    "corpus list": Command("show what a running server drafts from", add_server_flags, corpus_list),
    "corpus remove": Command("take a corpus away from a running server", add_corpus_remove_flags, corpus_remove),
    "corpus build": Command("index texts into a file, without a server", add_corpus_build_flags, corpus_build),
    "doctor": Command("say what this machine has, what is wrong with it, and what to do", Parser.add_config, doctor),
    "completion": Command("write a shell's script that completes our commands", add_completion_flags, completion),
    "bench step": bench("step", "measure the host time of a step of the scheduler"),
    "bench history": bench("history", "measure the host time of a turn on short and on long histories"),
    "bench audit": bench("audit", "measure what the audit costs on the books of a large, busy server"),
    "bench admission": bench("admission", "compare requests that leave max_tokens unset with exact limits"),
    "bench drafts": bench("drafts", "measure drafts looked up in Python source: how good, how fast, how large"),
    "bench grammar": bench("grammar", "measure masks of tokens and the compiling of grammars"),
    "bench speculate": bench("speculate", "measure what speculation gains and costs on a model, text by text"),
    "bench quality": bench("quality", "measure how far low precision is from float32, on text of people"),
    "bench profile": bench("profile", "measure where a step on the CPU goes, by the C++ kernels"),
    "bench cpu": bench("cpu", "measure decoding and prompts on the CPU, beside other engines if they are there"),
    "bench sessions": bench("sessions", "measure the latency of turns over HTTP, with sessions and by resending"),
    "bench agents": bench("agents", "measure agents with more KV than the pool holds, in sessions and by resending"),
    "bench throughput": bench("throughput", "measure tokens a second and latencies, in here or of a server"),
    "engine": Command("", add_engine_flags, engine),
    "builder": Command("", add_no_flags, builder),
}


def config_from(arguments: argparse.Namespace) -> Config:
    """The configuration from flags, environment and file. Raises StartupError for what is wrong in any of them."""
    return compose(arguments.flags, os.environ, arguments.config)


def options_from(options: Any, flags: Mapping[str, str]) -> Any:
    """A dataclass of options with those fields set that have a flag. Raises StartupError for a wrong value."""
    declared = [setting for setting in settings_of(options) if setting.name in flags]
    return options(**{s.name: s.parse(flags[s.name], f"flag --{s.flags[0]}") for s in declared})


def _metavar(setting: Setting) -> str:
    rules = setting.declared.metadata
    if rules["choices"]:
        return "{" + ",".join(rules["choices"]) + "}"
    return str(rules["unit"] or {int: "N", float: "NUMBER", str: "TEXT"}[setting.type]).upper()


def _help(setting: Setting) -> str:
    default = setting.declared.default
    shown = f"{setting.declared.metadata['help']}{'' if default is None else f' [{default}]'}"
    return shown.replace("%", "%%")
