"""The chat itself: takes lines, one turn or command each, and shows what comes of them.

After an answer a line says how many prompt tokens were new, how many were reused from the session, how long the first
token took, and the speed of the rest.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

from sessile.chat.conversations import Conversations
from sessile.chat.input import piped_lines, typed_lines
from sessile.client.sync_client import Client
from sessile.completion import SamplingParams
from sessile.config import API_KEY_VARIABLE
from sessile.errors import InvalidRequest, NotReady, Unauthenticated, UserError
from sessile.text.tokenizer import Tokenizer

HELP = """\
/stats       what the session holds on the server
/sessions    the conversations of this chat; /sessions 2 goes on with the second
/new         begin another conversation
/fork        go on in a copy of this conversation
/rewind      forget the last question and its answer; /rewind 3, the last three
/quit        leave (so does Ctrl-D)
Enter sends, Alt-Enter begins another line. Ctrl-C interrupts an answer; what was said of it stays in the conversation:
the server has rolled the turn back, and gets its tokens again with the next question."""

ENDS = {"length": " · cut off by the token limit", "abort": " · interrupted"}
SHOWN = ("id", "phase", "turns", "tokens", "kv_tokens", "own_pages", "shared_pages", "tokens_max")
"""Of a session, what `/stats` shows."""
PATIENCE_S = 5.0
"""How long a turn is sent again while the server is at a limit, or is gone."""


def run_chat(
    base_url: str,
    tokenizer: Tokenizer,
    *,
    stdin: TextIO,
    stdout: TextIO,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    api_key: str | None = None,
    history: Path | None = None,
) -> int:
    """Talk until the input ends; the exit status: 1 if the server was lost or refused us or, from a pipe, a turn.

    From a terminal Ctrl-C ends an answer, not the conversation. history: a file for what is typed at a terminal. Raises
    StartupError if the model cannot chat.
    """
    console = Console(file=stdout, highlight=False, soft_wrap=True)
    interactive = stdin is sys.stdin and stdin.isatty()
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    try:
        with (
            Client(base_url, api_key, patience_s=PATIENCE_S) as client,
            Conversations(client, tokenizer) as conversations,
        ):
            chat = _Chat(conversations, sampling, console, interactive=interactive)
            refused = False
            with chat.interruptible():
                for line in typed_lines(console, history) if interactive else piped_lines(stdin, console):
                    if line in ("/quit", "/exit"):
                        break
                    refused |= not chat.take(line)
            return int(refused and not interactive)
    except Unauthenticated:
        _say(console, f"sessile: the server wants a valid key: put one into the variable {API_KEY_VARIABLE}", "red")
    except UserError as error:  # the server is gone, or has no session for us
        _say(console, f"sessile: {error.message}", "red")
    return 1


class _Chat:
    """Takes lines, one turn or command each, and shows what comes of them."""

    def __init__(
        self, conversations: Conversations, sampling: SamplingParams, console: Console, *, interactive: bool
    ) -> None:
        self._conversations = conversations
        self._sampling = sampling
        self._console = console
        self._interactive = interactive
        self._was_interrupted = False
        self._commands: dict[str, Callable[[int | None], None]] = {
            "/help": lambda number: _say(console, HELP),
            "/stats": lambda number: self._show_state(),
            "/sessions": self._sessions,
            "/new": lambda number: self._begin(),
            "/fork": lambda number: self._fork(),
            "/rewind": self._rewind,
        }
        if interactive:
            _say(console, "Type a message, or /help. Ctrl-D leaves.", "dim")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """From a terminal Ctrl-C ends answers, within, not the program."""
        if not self._interactive:
            yield
            return
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def take(self, line: str) -> bool:
        """Carry out one line; False if it was refused. Raises NotReady if the server is gone."""
        self._was_interrupted = False
        name, _, argument = line.partition(" ")
        try:
            if name in self._commands and "\n" not in line:
                self._commands[name](_number(argument))
            elif line.startswith("/") and self._interactive:
                raise InvalidRequest(f"unknown command {name.split()[0]}; /help lists them")
            else:
                self._turn(line)
        except NotReady:
            raise
        except UserError as error:
            _say(self._console, error.message, "red")
            return False
        finally:
            self._was_interrupted = False
        return True

    def _turn(self, text: str) -> None:
        conversation = self._conversations.current
        with self._waiting() as show:
            answer = conversation.ask(text, self._sampling, show)
        said = answer.completion
        self._console.out("" if said.text.endswith("\n") else "\n", end="")
        _say(self._console, f"[{answer.summary}{ENDS.get(said.finish_reason, '')}]\n", "dim")

    def _show_state(self) -> None:
        state = self._conversations.current.state()
        for name in SHOWN:
            _say(self._console, f"{name:16}{getattr(state, name)}")

    def _sessions(self, number: int | None) -> None:
        if number is not None:
            self._conversations.choose(number)
        for index, is_current, conversation in self._conversations.listed():
            title = conversation.title or "(nothing said yet)"
            count = f"{conversation.exchanges} question{'s' if conversation.exchanges != 1 else ''}"
            _say(self._console, f"{'*' if is_current else ' '} {index:<3} {count:<14}{title}")

    def _begin(self) -> None:
        self._conversations.begin()
        _say(self._console, "a new conversation; /sessions lists them", "dim")

    def _fork(self) -> None:
        self._conversations.fork()
        _say(self._console, "a copy of the conversation; /sessions lists them", "dim")

    def _rewind(self, number: int | None) -> None:
        conversation = self._conversations.current
        conversation.rewind(1 if number is None else number)
        last = conversation.exchanges
        _say(self._console, f"back after question {last}" if last else "back at the beginning", "dim")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[Callable[[str], None]]:
        """What shows text as it comes; until the first of it, a terminal shows that something is going on."""
        status = self._console.status("reading", spinner="dots")

        def show(text: str) -> None:
            if text:
                status.stop()
                self._console.out(text, end="", highlight=False)
                self._console.file.flush()

        with status:
            yield show

    def _interrupt(self, number: int, frame: object) -> None:
        """Ctrl-C outside of prompts, which take the key for themselves. It ends the answer that comes, if one does.

        Pressed a moment too late it does nothing. A second one, should the first not do it, ends the program.
        """
        if self._was_interrupted:
            raise KeyboardInterrupt
        self._was_interrupted = True
        with contextlib.suppress(UserError):  # the stream reports a server that is gone
            self._conversations.current.interrupt()


def _number(argument: str) -> int | None:
    """The number behind a command. Raises InvalidRequest for anything else."""
    text = argument.strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"what follows a command is a number; got {text}")
    return int(text)


def _say(console: Console, text: str, style: str = "") -> None:
    """A line that is shown as it is: brackets are no markup."""
    console.print(text, style=style, markup=False, emoji=False)
