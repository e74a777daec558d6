"""`sessile chat`: a conversation in a terminal, or read from a pipe, over one streaming session of a server.

Each turn sends only what the server does not have yet. After the answer a line says how many prompt tokens were new,
how many were reused from the session, how long the first token took, and the speed of the rest.
"""

import contextlib
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TextIO

import httpx
import orjson
from rich.console import Console

from sessile.config import API_KEY_VARIABLE
from sessile.errors import InvalidRequest, NotReady, StartupError, UserError
from sessile.text.template import Message
from sessile.text.tokenizer import Tokenizer

HELP = """\
/stats  what the session holds on the server
/new    forget the conversation and start another
/quit   leave (so does Ctrl-D)
Ctrl-C interrupts an answer; what was said of it stays in the conversation."""

_SHOWN = ("id", "phase", "turns", "tokens", "kv_tokens", "own_pages", "shared_pages", "tokens_max")
"""Of a session, what `/stats` shows."""

_PLACEHOLDER = "\ue000answer\ue000"
"""Stands for an answer where only what the template writes after it matters; private use, so nobody types it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished turn as the client saw it; times in seconds since the question was sent.

    finish: the server's finish_reason: stop, length, or abort after an interruption.
    """

    text: str
    tokens: Sequence[int]
    finish: Mapping[str, Any]
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    total_s: float

    @property
    def summary(self) -> str:
        """The turn in one line."""
        line = f"{self.prompt_tokens - self.cached_tokens} new tokens · {self.cached_tokens} reused"
        if self.tokens:
            line += f" · first token after {self.first_token_s * 1e3:.0f} ms"
        if len(self.tokens) > 1:
            speed = (len(self.tokens) - 1) / max(self.total_s - self.first_token_s, 1e-9)
            line += f" · {len(self.tokens)} tokens at {speed:.1f} tokens/s"
        return line


class Transcript:
    """What was said so far, and which tokens of it the server still lacks.

    Raises StartupError if the model's chat template cannot be continued turn by turn. A model without a template gets
    the lines as they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._messages: list[Message] = []
        self._unsent: list[int] = []
        self._end_marker = ""
        if tokenizer.template is not None:
            probe = [Message(role="user", content="a"), Message(role="assistant", content=_PLACEHOLDER)]
            try:
                continued = tokenizer.render_chat([*probe, Message(role="user", content="b")])
            except InvalidRequest as error:
                raise StartupError(f"cannot chat with this model: {error.message}. Use /generate.") from error
            if _PLACEHOLDER not in continued:
                raise StartupError("cannot chat with this model: its template drops earlier answers. Use /generate.")

    def question(self, text: str) -> list[int]:
        """The tokens to send for the user's next message; nothing is kept of it until `answered`."""
        if self._tokenizer.template is None:
            return [*self._unsent, *self._tokenizer.encode(text, add_special_tokens=not self._messages)]
        user = Message(role="user", content=text)
        if not self._messages:
            return self._tokenizer.encode_chat([user])
        placeholder = Message(role="assistant", content=_PLACEHOLDER)
        prompt = self._tokenizer.render_chat([*self._messages[:-1], placeholder, user])
        fresh = prompt.rpartition(_PLACEHOLDER)[2].removeprefix(self._end_marker)
        return [*self._unsent, *self._tokenizer.encode(fresh, add_special_tokens=False)]

    def answered(self, text: str, sent: Sequence[int], answer: Answer) -> None:
        """Keep a turn: the user's message, the tokens sent for it, and the answer.

        An interrupted turn was rolled back on the server, so its tokens are sent again with the next question.
        """
        self._messages += [Message(role="user", content=text), Message(role="assistant", content=answer.text)]
        self._unsent = [*sent, *answer.tokens] if answer.finish["type"] == "abort" else []
        ended_by = answer.finish.get("matched") if answer.finish["type"] == "stop" else None
        self._end_marker = self._tokenizer.decode([ended_by], skip_special_tokens=False) if ended_by is not None else ""


class ChatSession:
    """A streaming session on a server, over its native API. A context manager: leaving it closes the session.

    Raises NotReady if the server cannot be reached, UserError for what it refuses.
    """

    def __init__(
        self, base_url: str, *, max_new_tokens: int, temperature: float, api_key: str | None = None
    ) -> None:
        self._base_url = base_url
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        # Only the connection has a time limit: a long prompt may take minutes to its first token.
        self._client = httpx.Client(
            base_url=base_url, headers=self._headers, timeout=httpx.Timeout(None, connect=10), trust_env=False
        )
        self._id = ""

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(NotReady):  # a server that is gone has closed the session in its way
            self._close()
        self._client.close()

    def restart(self) -> None:
        """Close the session and open an empty one."""
        self._close()
        self._open()

    def view(self) -> Mapping[str, Any]:
        """What the server says of the session."""
        with _server_errors():
            reply = self._client.get(f"/v1/sessions/{self._id}")
            return dict(_checked(reply.status_code, reply.content))

    def ask(self, tokens: Sequence[int], show: Callable[[str], None], *, rid: str) -> Answer:
        """Append tokens to the session and generate; `show` gets the text as it comes."""
        body = {
            "rid": rid,
            "input_ids": list(tokens),
            "sampling_params": self._sampling,
            "session_params": {"id": self._id},
            "stream": True,
            "stream_output": "delta",
        }
        texts: list[str] = []
        output: list[int] = []
        meta: Mapping[str, Any] = {}
        started_s = time.perf_counter()
        first_token_s = 0.0
        for event in self._events(body):
            if event["output_ids"] and not output:
                first_token_s = time.perf_counter() - started_s
            texts.append(event["text"])
            output += event["output_ids"]
            meta = event["meta_info"]
            show(event["text"])
        finish = meta.get("finish_reason") or {}
        if not finish or finish.get("status_code") is not None:
            raise _refusal(finish.get("status_code") or 503, finish.get("message") or "the answer broke off")
        return Answer(
            text="".join(texts),
            tokens=output,
            finish=finish,
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            first_token_s=first_token_s,
            total_s=time.perf_counter() - started_s,
        )

    def interrupt(self, rid: str) -> None:
        """Ask the server to end a request; its stream then ends by itself. Safe in a signal handler."""
        # On a connection of its own: the client's may be locked by the very code that was interrupted.
        with contextlib.suppress(httpx.TransportError):  # the stream reports a server that is gone
            httpx.post(
                f"{self._base_url}/abort_request",
                json={"rid": rid},
                headers=self._headers,
                timeout=5,
                trust_env=False,
            )

    def _open(self) -> None:
        self._id = self._post("/open_session", {"capacity_of_str_len": 1_000_000, "streaming": True})

    def _close(self) -> None:
        self._post("/close_session", {"session_id": self._id})

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        with _server_errors():
            reply = self._client.post(path, json=body)
            return _checked(reply.status_code, reply.content)

    def _events(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with _server_errors(), self._client.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                _checked(reply.status_code, reply.read())
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield orjson.loads(line.removeprefix("data: "))


def run_chat(
    base_url: str,
    tokenizer: Tokenizer,
    *,
    stdin: TextIO,
    stdout: TextIO,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    api_key: str | None = None,
) -> int:
    """Talk until the input ends; the exit status: 1 if the server was lost or refused us or, from a pipe, a turn.

    From a terminal Ctrl-C ends an answer, not the conversation. Raises StartupError if the model cannot chat.
    """
    console = Console(file=stdout, highlight=False, soft_wrap=True)
    interactive = stdin is sys.stdin and stdin.isatty()
    transcript = Transcript(tokenizer)
    try:
        with ChatSession(
            base_url, max_new_tokens=max_new_tokens, temperature=temperature, api_key=api_key
        ) as session:
            conversation = _Conversation(session, transcript, tokenizer, console, interactive=interactive)
            refused = False
            for line in _typed_lines(console) if interactive else _piped_lines(stdin, console):
                if line in ("/quit", "/exit"):
                    break
                refused |= not conversation.take(line)
            return int(refused and not interactive)
    except UserError as error:  # the server is gone, or has no session for us
        _say(console, f"sessile: {error.message}", "red")
        return 1


class _Conversation:
    """Takes lines, one turn or command each, and shows what comes of them."""

    def __init__(
        self,
        session: ChatSession,
        transcript: Transcript,
        tokenizer: Tokenizer,
        console: Console,
        *,
        interactive: bool,
    ) -> None:
        self._session = session
        self._transcript = transcript
        self._tokenizer = tokenizer
        self._console = console
        self._interactive = interactive
        if interactive:
            _say(console, "Type a message, or /help. Ctrl-D leaves.", "dim")

    def take(self, line: str) -> bool:
        """Carry out one line; False if the server refused it. Raises NotReady if the server is gone."""
        try:
            if line == "/help":
                _say(self._console, HELP)
            elif line == "/stats":
                self._show_view()
            elif line == "/new":
                self._session.restart()
                self._transcript = Transcript(self._tokenizer)
            elif line.startswith("/") and self._interactive:
                _say(self._console, f"unknown command {line.split()[0]}; /help lists them", "red")
            else:
                self._turn(line)
        except NotReady:
            raise
        except UserError as error:
            _say(self._console, error.message, "red")
            return False
        return True

    def _turn(self, text: str) -> None:
        tokens = self._transcript.question(text)
        rid = uuid.uuid4().hex
        with self._waiting() as show, self._interruptible(rid):
            answer = self._session.ask(tokens, show, rid=rid)
        self._transcript.answered(text, tokens, answer)
        self._console.out("" if answer.text.endswith("\n") else "\n", end="")
        ends = {"length": " · cut off by the token limit", "abort": " · interrupted"}
        _say(self._console, f"[{answer.summary}{ends.get(answer.finish['type'], '')}]\n", "dim")

    def _show_view(self) -> None:
        view = self._session.view()
        for name in _SHOWN:
            _say(self._console, f"{name:16}{view[name]}")

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

    @contextlib.contextmanager
    def _interruptible(self, rid: str) -> Iterator[None]:
        """From a terminal the first Ctrl-C ends the answer; a second one, should the first not do it, the program."""
        if not self._interactive or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def interrupt(number: int, frame: object) -> None:
            signal.signal(signal.SIGINT, previous)
            self._session.interrupt(rid)

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _typed_lines(console: Console) -> Iterator[str]:
    """Lines typed at a terminal, with editing and history; ends with Ctrl-D. Ctrl-C drops the line."""
    import readline

    readline.set_history_length(1000)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if line:
            yield line


def _piped_lines(stdin: TextIO, console: Console) -> Iterator[str]:
    """Lines of a pipe or file, each shown as if it had been typed."""
    for line in map(str.strip, stdin):
        if line:
            _say(console, f"> {line}")
            yield line


def _say(console: Console, text: str, style: str = "") -> None:
    """A line that is shown as it is: brackets are no markup."""
    console.print(text, style=style, markup=False, emoji=False)


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise NotReady(f"the server cannot be reached or is gone ({error})") from error


def _checked(status: int, content: bytes) -> Any:
    """The JSON of a good reply, None if it is empty; raises UserError with the server's message for any other."""
    try:
        parsed = orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        parsed = None
    if status == httpx.codes.OK:
        return parsed
    if status == httpx.codes.UNAUTHORIZED:
        raise InvalidRequest(f"the server wants a valid key: put one into the environment variable {API_KEY_VARIABLE}")
    error = parsed.get("error") if isinstance(parsed, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise _refusal(status, message or f"the server answered {status}")


def _refusal(status: int, message: str) -> UserError:
    return NotReady(message) if status >= 500 else InvalidRequest(message)
