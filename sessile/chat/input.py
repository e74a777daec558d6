"""Where lines come from: typed at a terminal, with editing, history and several lines at once; or from a pipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from sessile.errors import StartupError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

COMMANDS = ("/help", "/stats", "/sessions", "/new", "/fork", "/rewind", "/quit")


def typed_lines(console: Console, history: Path | None) -> Iterator[str]:
    """What is typed at a terminal, message by message; ends with Ctrl-D. Ctrl-C drops what was typed.

    history: a file that keeps what was typed for the next time. Raises StartupError if it cannot be used.
    """
    prompt = _prompt_of(history)
    while True:
        try:
            text = prompt.prompt("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if text:
            yield text


def piped_lines(stdin: TextIO, console: Console) -> Iterator[str]:
    """Lines of a pipe or file, each shown as if it had been typed."""
    for line in map(str.strip, stdin):
        if line:
            console.print(f"> {line}", markup=False, emoji=False)
            yield line


def _prompt_of(history: Path | None) -> "PromptSession[str]":
    # Here, as a pipe does without.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.shortcuts import CompleteStyle

    if history is not None:
        try:
            history.touch(mode=0o600)
        except OSError as error:
            raise StartupError(f"cannot write --history {history}: {error.strerror}. Give another path.") from error
    return PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep eight lines below the prompt free
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
    )


def _keys() -> "KeyBindings":
    """Enter sends, Alt-Enter begins another line. What is pasted keeps its lines by itself.

    A line feed (Ctrl-J) sends as well: it is what a terminal makes of an Enter that was typed during an answer.
    """
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def send(event: "KeyPressEvent") -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return keys
