"""Commands as a user runs them: real processes, and what happens when one of them dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from sessile.commands import free_port
from tests.unit.tiny_folder import write_tiny_model

ROOT = Path(__file__).parents[2]
SMALL = ("--context-tokens=512", "--kv-memory=64M")
WAIT_S = 200


def start(*arguments: str, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sessile", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def refused(*arguments: str) -> str:
    """Standard error of a command that is refused: one line, status 2."""
    process = start(*arguments)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def await_(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.05)


def is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


class Server:
    """A running `sessile serve`, ready to answer."""

    def __init__(self, model: Path) -> None:
        port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        self.process = start("serve", f"--port={port}", f"--model={model}", "--load-format=dummy")
        await_(lambda: is_healthy(self.url))
        (self.engine_pid,) = children_of(self.process.pid)

    def generate(self, max_new_tokens: int) -> httpx.Response:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"text": "Once", "sampling_params": sampling}
        return httpx.post(f"{self.url}/generate", json=body, timeout=WAIT_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(write_tiny_model(tmp_path))
    yield server
    server.process.kill()
    server.process.communicate()
    await_(lambda: not is_running(server.engine_pid))


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "is in use" in refused("serve", f"--port={taken.getsockname()[1]}")


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_model_that_is_not_there_is_one_line(command: str) -> None:
    assert "nowhere" in refused(command, "--model=nowhere", f"--port={free_port('127.0.0.1')}")


def test_sigterm_ends_server_and_engine_with_status_0(server: Server) -> None:
    assert len(server.generate(max_new_tokens=4).json()["output_ids"]) == 4
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0
    assert not is_running(server.engine_pid)


def test_a_killed_engine_is_told_to_the_client_and_replaced(server: Server) -> None:
    killer = threading.Timer(0.3, os.kill, (server.engine_pid, signal.SIGKILL))
    killer.start()
    response = server.generate(max_new_tokens=50_000)
    assert response.status_code == 503
    assert "killed by signal 9" in response.json()["error"]["message"]
    await_(lambda: is_healthy(server.url))
    assert children_of(server.process.pid) != [server.engine_pid]
    assert server.generate(max_new_tokens=1).status_code == 200


def test_a_killed_server_takes_its_engine_along(server: Server) -> None:
    server.process.kill()
    await_(lambda: not is_running(server.engine_pid))
    assert server.process.wait(WAIT_S) == -signal.SIGKILL


def test_chat_answers_a_pipe_and_leaves_nothing_behind() -> None:
    chat = start("chat", *SMALL, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    output, _ = chat.communicate("What is the capital of France?\nAnd of Italy?\n", timeout=WAIT_S)
    assert chat.returncode == 0
    assert "Paris" in output and "Rome" in output
    reused = [line for line in output.splitlines() if "reused" in line]
    assert "· 0 reused" in reused[0] and "· 0 reused" not in reused[1]


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_sigterm_while_the_model_loads_leaves_nothing_behind(seconds: float, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = start("serve", f"--port={free_port('127.0.0.1')}", *SMALL, env=environment)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in error and "ERROR" not in error
    assert list(tmp_path.iterdir()) == []
