"""The chat client against a served engine: through a pipe, at a terminal, and when things go wrong."""

import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sessile.chat.conversations import Conversations
from sessile.chat.terminal import run_chat
from sessile.client import Client
from sessile.completion import SamplingParams
from sessile.contract.messages import CloseSession, Done, Submit, unpack_tokens
from tests.http.conftest import Running, running_server
from tests.http.fake_engine import EOS, byte_tokenizer
from tests.http.toy_engine import ToyEngine

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "\x1b[?2004h"
"""What a terminal is sent when a line is waited for: to mark what is pasted."""


def chat(server: Running, lines: str, **options: int) -> tuple[int, str]:
    """Pipe lines through the client; its exit status and what it showed."""
    stdout = io.StringIO()
    status = run_chat(server.url, byte_tokenizer(), stdin=io.StringIO(lines), stdout=stdout, **options)
    return status, stdout.getvalue()


def sent(server: Running) -> list[str]:
    return [bytes(unpack_tokens(submit.tokens).tolist()).decode() for submit in server.engine.submits()]


def test_a_pipe_is_answered_line_by_line_with_a_summary_each(server: Running) -> None:
    server.engine.script = [*b"It is Paris.", EOS]
    status, shown = chat(server, "Where?\n\nSure?\n")
    assert status == 0
    assert shown.count("It is Paris.") == 2
    assert "> Where?\nIt is Paris.\n[12 new tokens · 0 reused · first token after " in shown
    # History: 12 of the question, 12 of the answer and its end; all but the last token are there.
    assert "> Sure?\nIt is Paris.\n[13 new tokens · 24 reused · first token after " in shown


def test_each_turn_sends_only_what_is_new(server: Running) -> None:
    server.engine.script = [*b"ok", EOS]
    chat(server, "one\ntwo\n")
    assert sent(server) == ["user:one\n", "\nuser:two\n"]


def test_the_session_is_closed_at_the_end(server: Running) -> None:
    chat(server, "one\n")
    opened = {submit.session for submit in server.engine.submits()}
    closed = {message.session for message in server.engine.received if isinstance(message, CloseSession)}
    assert opened == closed
    assert None not in opened


def test_a_refused_turn_is_told_and_fails_a_pipe_but_not_the_conversation(server: Running) -> None:
    server.engine.refusals.append(Done(key=0, reason="error", status=413, message="beyond the context length"))
    status, shown = chat(server, "long\nshort\n")
    assert status == 1
    assert "beyond the context length" in shown
    assert "user:short" in shown
    assert sent(server)[1] == "user:short\n"


def test_commands_show_the_session_start_afresh_and_leave(server: Running) -> None:
    status, shown = chat(server, "one\n/stats\n/new\ntwo\n/help\n/quit\nnever\n")
    assert status == 0
    assert "turns           1" in shown
    assert sent(server) == ["user:one\n", "user:two\n"]
    assert len({submit.session for submit in server.engine.submits()}) == 2
    assert "/quit" in shown
    assert "never" not in shown


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=600)) as running:
        yield running


def test_a_fork_goes_on_in_a_copy_and_the_first_conversation_can_be_chosen_again(toy: Running) -> None:
    status, shown = chat(toy, "one\n/fork\ntwo\n/sessions 1\nthree\n/sessions\n", max_new_tokens=4)
    assert status == 0
    assert "* 1   1 question    one\n  2   2 questions   one … two\n" in shown
    assert shown.count("· 12 reused") == 2, "both go on behind 9 + 4 tokens"
    assert shown.endswith("* 1   2 questions   one … three\n  2   2 questions   one … two\n")


def test_a_question_that_is_taken_back_is_gone_from_the_session(toy: Running) -> None:
    status, shown = chat(toy, "one\ntwo\nthree\n/rewind 2\n/stats\nfour\n/rewind\n/rewind\n/stats\n", max_new_tokens=4)
    assert status == 0
    assert "back after question 1" in shown and "back at the beginning" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("tokens ")] == ["13", "0"]


def test_commands_that_make_no_sense_are_told_and_change_nothing(toy: Running) -> None:
    status, shown = chat(toy, "/rewind\n/sessions 7\n/rewind x\n/sessions\n")
    assert status == 1
    assert "there is nothing to forget: 0 questions" in shown
    assert "there is no conversation 7" in shown
    assert "what follows a command is a number; got x" in shown
    assert shown.endswith("* 1   0 questions   (nothing said yet)\n")


def test_no_server_is_one_line_and_status_1() -> None:
    stdout = io.StringIO()
    assert run_chat("http://127.0.0.1:9", byte_tokenizer(), stdin=io.StringIO("hi\n"), stdout=stdout) == 1
    assert "cannot be reached" in stdout.getvalue()
    assert "Traceback" not in stdout.getvalue()


def test_a_server_that_dies_during_an_answer_is_told_and_ends_the_chat() -> None:
    with running_server() as server:
        server.engine.script, server.engine.token_interval_s = [*b"x" * 400], 0.01

        def kill() -> None:
            wait_until(lambda: bool(server.engine.running))
            server.engine.fail("out of memory")

        killer = threading.Thread(target=kill)
        killer.start()
        status, shown = chat(server, "hi\nmore\n")
        killer.join()
    assert status == 1
    assert "out of memory" in shown
    assert "more" not in shown


def wait_until(condition: object, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.005)


def test_an_interrupted_answer_keeps_what_was_said(server: Running) -> None:
    server.engine.script, server.engine.token_interval_s = [*b"x" * 400], 0.005
    shown: list[str] = []
    with Client(server.url) as client, Conversations(client, byte_tokenizer()) as conversations:
        talk = conversations.current
        stopper = threading.Thread(target=lambda: (wait_until(lambda: "".join(shown)), talk.interrupt()))
        stopper.start()
        said = talk.ask("hi", SamplingParams(max_new_tokens=400), shown.append).completion
        stopper.join()
        assert said.finish_reason == "abort"
        assert 0 < len(said.tokens) < 400
        assert said.text == "x" * len(said.tokens) == "".join(shown)
        server.engine.script, server.engine.token_interval_s = [*b"ok", EOS], 0.0
        talk.ask("and", SamplingParams(), shown.append)
        assert sent(server)[1] == f"user:hi\n{said.text}\nuser:and\n"


class Terminal:
    """A child process with a terminal of its own."""

    def __init__(self, code: str) -> None:
        self._ours, theirs = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, preexec_fn=take_terminal
        )
        os.close(theirs)
        self.shown = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._ours, 4096)
            except OSError:  # the child's end is closed
                return
            self.shown += chunk.decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.shown, 90)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(60)
        os.close(self._ours)


@pytest.fixture
def terminal(server: Running, tmp_path: Path) -> Iterator[Terminal]:
    code = (
        "import sys; from pathlib import Path; from sessile.chat.terminal import run_chat;"
        "from tests.http.fake_engine import byte_tokenizer;"
        f"sys.exit(run_chat({server.url!r}, byte_tokenizer(), stdin=sys.stdin, stdout=sys.stdout,"
        f"history=Path({str(tmp_path / 'typed')!r})))"
    )
    child = Terminal(code)
    yield child
    child.close()


def test_at_a_terminal_control_c_ends_the_answer_and_control_d_the_chat(server: Running, terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    server.engine.script, server.engine.token_interval_s = [*b"zebra " * 80], 0.005
    terminal.type("stripes\r")
    terminal.wait_for("zebra zebra")
    terminal.type("\x03")
    terminal.wait_for("interrupted")
    server.engine.script, server.engine.token_interval_s = [*b"done", EOS], 0.0
    terminal.type("again\r")
    terminal.wait_for("done")
    # Before the prompt is back the terminal would take the key for itself.
    wait_until(lambda: PROMPT in terminal.shown.rpartition("done")[2], 30)
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    turns = [message for message in server.engine.received if isinstance(message, Submit)]
    assert len(turns) == 2
    assert sent(server)[1].startswith("user:stripes\nzebra zebra")
    assert sent(server)[1].endswith("\nuser:again\n")


def test_at_a_terminal_several_lines_are_one_message_and_what_was_typed_comes_back(
    server: Running, terminal: Terminal, tmp_path: Path
) -> None:
    server.engine.script = [*b"done", EOS]
    terminal.wait_for(PROMPT)
    terminal.type("first\x1b\rsecond\r")
    terminal.wait_for("done")
    wait_until(lambda: PROMPT in terminal.shown.rpartition("done")[2], 30)
    terminal.type("\x1b[200~pasted\nlines\x1b[201~\r")
    wait_until(lambda: len(sent(server)) == 2, 30)
    assert sent(server) == ["user:first\nsecond\n", "\nuser:pasted\nlines\n"]
    wait_until(lambda: terminal.shown.count("done") == 2 and PROMPT in terminal.shown.rpartition("done")[2], 30)
    terminal.type("\x1b[A")
    wait_until(lambda: "lines" in terminal.shown.rpartition("done")[2], 30)
    terminal.type("\r")
    wait_until(lambda: len(sent(server)) == 3, 30)
    assert sent(server)[2] == "\nuser:pasted\nlines\n"
    terminal.type("/nonsense\r")  # perhaps before the prompt is back
    terminal.wait_for("unknown command /nonsense; /help lists them")
    terminal.type("half\x03")  # likewise
    terminal.type("/quit\r")
    assert terminal.process.wait(60) == 0
    assert "+second" in (tmp_path / "typed").read_text()


class TypedAt(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def chat_typed(server: Running, lines: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """As at a terminal, where these lines are typed; control is back here between them."""
    monkeypatch.setattr(sys, "stdin", TypedAt())
    monkeypatch.setattr("sessile.chat.terminal.typed_lines", lambda console, history: lines)
    stdout = io.StringIO()
    return run_chat(server.url, byte_tokenizer(), stdin=sys.stdin, stdout=stdout), stdout.getvalue()


def test_control_c_a_moment_behind_an_answer_does_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def typed() -> Iterator[str]:
        for line in ("one", "/stats", "two"):
            signal.raise_signal(signal.SIGINT)
            yield line
        signal.raise_signal(signal.SIGINT)

    status, shown = chat_typed(server, typed(), monkeypatch)
    assert status == 0
    assert "interrupted" not in shown
    assert sent(server) == ["user:one\n", "\nuser:two\n"]
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_twice_outside_of_an_answer_ends_the_chat_and_its_session(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed() -> Iterator[str]:
        yield "one"
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield "never"

    with pytest.raises(KeyboardInterrupt):
        chat_typed(server, typed(), monkeypatch)
    assert sent(server) == ["user:one\n"]
    assert any(isinstance(message, CloseSession) for message in server.engine.received)
