"""The engine as a child process: what it says first and last, and when it ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import zmq

from sessile.contract.messages import EngineFailed, EngineReady, FromEngine, GetStats, Shutdown, Stats, ToEngine
from sessile.contract.watching import EXIT_CANNOT_START, STACKS_SIGNAL, TELL_EVENTS, stacks_file
from sessile.engine.process import EXIT_FAILED, EXIT_ORPHANED

WAIT_S = 90
ROOT = Path(__file__).parents[2]


@dataclass
class Child:
    """A running engine and the server's end of its link."""

    process: "subprocess.Popen[bytes]"
    socket: "zmq.Socket[bytes]"

    def receive(self) -> FromEngine:
        assert self.socket.poll(WAIT_S * 1000), "the engine says nothing"
        message: FromEngine = msgspec.msgpack.decode(self.socket.recv(), type=FromEngine)
        return message

    def send(self, message: ToEngine) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def wait(self) -> int:
        return self.process.wait(WAIT_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    context = zmq.Context()
    children: list[Child] = []

    def start_child(mode: str) -> Child:
        address = f"ipc://{tmp_path}/{len(children)}"
        socket = context.socket(zmq.PAIR)
        socket.bind(address)
        command = [sys.executable, "-m", "tests.unit.engine_child", address, mode]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        children.append(Child(process, socket))
        return children[-1]

    yield start_child
    for child in children:
        child.process.kill()
        child.process.communicate()
        child.socket.close(linger=0)
    context.term()


def test_the_first_message_says_what_is_served(start: Callable[[str], Child]) -> None:
    message = start("idle").receive()
    assert isinstance(message, EngineReady) and message.model_name == "scripted"


def test_a_question_for_stats_is_answered_while_idle(start: Callable[[str], Child]) -> None:
    child = start("idle")
    child.receive()
    child.send(GetStats(op=3))
    batch = child.receive()
    (reply,) = batch.replies  # type: ignore[union-attr]
    assert reply.op == 3 and isinstance(reply.value, Stats)


def test_a_shutdown_message_ends_the_process_with_status_0(start: Callable[[str], Child]) -> None:
    child = start("idle")
    child.receive()
    child.send(Shutdown())
    assert child.wait() == 0


def test_sigterm_ends_an_idle_engine_with_status_0(start: Callable[[str], Child]) -> None:
    child = start("idle")
    child.receive()
    child.process.send_signal(signal.SIGTERM)
    assert child.wait() == 0


def test_sigint_is_left_to_the_parent(start: Callable[[str], Child]) -> None:
    child = start("idle")
    child.receive()
    child.process.send_signal(signal.SIGINT)
    child.send(GetStats(op=1))
    assert child.receive() is not None
    child.send(Shutdown())
    assert child.wait() == 0


@pytest.mark.parametrize("mode", ["idle", "busy", "mute"])
def test_the_engine_dies_when_its_standard_input_ends(start: Callable[[str], Child], mode: str) -> None:
    child = start(mode)
    child.receive()
    assert child.process.stdin is not None
    child.process.stdin.close()
    child.process.stdin = None
    assert child.wait() == EXIT_ORPHANED


def test_a_failing_device_is_reported_in_one_line_with_the_traceback_in_the_log(start: Callable[[str], Child]) -> None:
    child = start("fails")
    child.receive()
    assert child.receive() == EngineFailed("the engine failed: MemoryError: out of memory")
    assert child.wait() == EXIT_FAILED
    _, log = child.process.communicate()
    assert b"Traceback" in log and b"and more lines" in log
    assert b"the last events before the failure" in log


def test_an_engine_that_cannot_start_says_why_without_a_traceback(start: Callable[[str], Child]) -> None:
    child = start("refuses")
    assert child.receive() == EngineFailed("no model at nowhere")
    assert child.wait() == EXIT_CANNOT_START
    _, log = child.process.communicate()
    assert b"Traceback" not in log


def test_an_engine_with_too_little_memory_may_be_started_again(start: Callable[[str], Child]) -> None:
    child = start("starves")
    assert child.receive() == EngineFailed("too little memory")
    assert child.wait() == EXIT_FAILED


def test_an_engine_that_hangs_says_where_when_it_is_asked(start: Callable[[str], Child], tmp_path: Path) -> None:
    child = start("hangs")
    child.receive()
    stacks = stacks_file(f"ipc://{tmp_path}/0")
    deadline_s = time.monotonic() + WAIT_S
    while "ticket_that_never_comes" not in stacks.read_text() and time.monotonic() < deadline_s:
        child.process.send_signal(STACKS_SIGNAL)
        time.sleep(0.05)
    assert "ticket_that_never_comes" in stacks.read_text()
    assert child.process.poll() is None, "it was asked, not ended"


def test_an_engine_that_hangs_still_tells_its_last_events(start: Callable[[str], Child]) -> None:
    child = start("hangs")
    child.receive()
    assert child.process.stdin is not None
    child.process.stdin.write(TELL_EVENTS)
    child.process.stdin.close()
    child.process.stdin = None
    assert child.wait() == EXIT_ORPHANED
    assert child.process.stderr is not None
    assert b"the last events" in child.process.stderr.read()
