"""Shell completion, written from the commands and their flags as they are: `sessile completion bash | zsh | fish`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, with its dashes. choices: its values, if there are only these; takes_value: whether it has any."""

    name: str
    help: str
    choices: tuple[str, ...]
    takes_value: bool


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command, of one or two words, and its flags."""

    name: str
    summary: str
    flags: tuple[Flag, ...]
    arguments: tuple[str, ...] = ()
    """Words that may follow, where there are only these."""


def bash(commands: Sequence[CommandLine]) -> str:
    """A script for bash: source it, or put it where bash-completion looks."""
    return _words_function(commands) + _BASH.replace("GROUPS", "|".join(_groups(commands)))


def zsh(commands: Sequence[CommandLine]) -> str:
    """A script for zsh: source it after compinit, or put it into $fpath as _sessile."""
    return "#compdef sessile\n" + _words_function(commands) + _ZSH.replace("GROUPS", "|".join(_groups(commands)))


def fish(commands: Sequence[CommandLine]) -> str:
    """A script for fish: put it into ~/.config/fish/completions as sessile.fish."""
    return "\n".join(_fish_lines(commands)) + "\n"


SHELLS: Mapping[str, Callable[[Sequence[CommandLine]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""What writes the script for each shell."""

_BASH = """
_sessile() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= words
    # Bash divides words at "=": --flag=value are three.
    [[ $current == = ]] && current=
    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    (( COMP_CWORD > 1 )) && command=${COMP_WORDS[1]}
    case $command in GROUPS) (( COMP_CWORD > 2 )) && command+=" ${COMP_WORDS[2]}" ;; esac
    if [[ $before != --* ]] || ! words=$(_sessile_words "$command $before"); then
        words=$(_sessile_words "$command")
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _sessile sessile
"""

_ZSH = """
_sessile() {
    local before=${words[CURRENT-1]} command= candidates
    (( CURRENT > 2 )) && command=${words[2]}
    case $command in GROUPS) (( CURRENT > 3 )) && command+=" ${words[3]}" ;; esac
    if [[ $PREFIX == --*=* ]]; then
        before=${PREFIX%%=*}
        compset -P '*='
    fi
    if [[ $before != --* ]] || ! candidates=$(_sessile_words "$command $before"); then
        candidates=$(_sessile_words "$command")
    fi
    compadd -- ${=candidates}
    [[ -n $command && $PREFIX != -* ]] && _files
}
compdef _sessile sessile
"""


def _words_function(commands: Sequence[CommandLine]) -> str:
    """What may follow a command, or a flag of it; it fails for a flag that takes no value."""
    lines = ["_sessile_words() {", '    case "$1" in']
    for first, following in _following(commands).items():
        lines.append(f"        '{first}') echo '{' '.join(following)}' ;;")
    for command in commands:
        words = [*command.arguments, *(flag.name for flag in command.flags)]
        lines.append(f"        '{command.name}') echo '{' '.join(words)}' ;;")
        free = [f"'{command.name} {flag.name}'" for flag in command.flags if flag.takes_value and not flag.choices]
        if free:
            lines.append(f"        {'|'.join(free)}) ;;")
        lines += [
            f"        '{command.name} {flag.name}') echo '{' '.join(flag.choices)}' ;;"
            for flag in command.flags
            if flag.choices
        ]
    return "\n".join([*lines, "        *) return 1 ;;", "    esac", "}"]) + "\n"


def _following(commands: Sequence[CommandLine]) -> dict[str, list[str]]:
    """What may follow nothing, and the first word of commands of two."""
    following: dict[str, list[str]] = {"": list(dict.fromkeys(command.name.split()[0] for command in commands))}
    for command in commands:
        first, _, second = command.name.partition(" ")
        if second:
            following.setdefault(first, []).append(second)
    return following


def _groups(commands: Sequence[CommandLine]) -> list[str]:
    return [first for first in _following(commands) if first]


def _fish_lines(commands: Sequence[CommandLine]) -> Iterator[str]:
    yield "complete -c sessile -f -n __fish_use_subcommand"
    for first in _following(commands)[""]:
        summaries = [command.summary for command in commands if command.name == first]
        summary = summaries[0] if summaries else f"see sessile {first} --help"
        yield f"complete -c sessile -n __fish_use_subcommand -a {first} -d {_quoted(summary)}"
    for command in commands:
        first, _, second = command.name.partition(" ")
        place = f"__fish_seen_subcommand_from {first}"
        if second:
            siblings = " ".join(_following(commands)[first])
            begun = f"{place}; and not __fish_seen_subcommand_from {siblings}"
            yield f"complete -c sessile -f -n {_quoted(begun)} -a {second} -d {_quoted(command.summary)}"
            place = f"{place}; and __fish_seen_subcommand_from {second}"
        if command.arguments:
            yield f"complete -c sessile -f -n {_quoted(place)} -a {_quoted(' '.join(command.arguments))}"
        for flag in command.flags:
            values = f" -x -a {_quoted(' '.join(flag.choices))}" if flag.choices else " -r" if flag.takes_value else ""
            name, described = flag.name.removeprefix("--"), _quoted(flag.help.split(". ")[0])
            yield f"complete -c sessile -n {_quoted(place)} -l {name}{values} -d {described}"


def _quoted(text: str) -> str:
    """A word of the shell."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
