"""Server and engine are two processes: how they start, end, and notice each other's death."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from sessile.errors import StartupError
from sessile.server.config import ServerOptions
from sessile.server.listening import bind
from sessile.server.run import private_folder
from tests.http.serving import PATIENCE_S, ROOT, Deployment, deployed

SLOW = {"text": "a", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}


def gone(pid: int) -> bool:
    """Whether a process is no more (or only a zombie that nobody has reaped)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pid: int, limit_s: float = PATIENCE_S) -> bool:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if gone(pid):
            return True
        time.sleep(0.01)
    return False


class Streaming(threading.Thread):
    """A client that streams a long answer in the background."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.started = threading.Event()
        self._url = deployment.url
        self.start()
        assert self.started.wait(PATIENCE_S), "no first token"

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/generate", json={**SLOW, "stream": True}, timeout=PATIENCE_S) as reply:
            for line in reply.iter_lines():
                if line:
                    self.lines.append(line)
                    self.started.set()


def test_sigterm_lets_running_requests_end_and_refuses_new_ones(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        client = Streaming(deployment)
        engine = deployment.engine_pid()
        deployment.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = httpx.post(f"{deployment.url}/generate", json=SLOW, timeout=PATIENCE_S)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert deployment.process.wait(PATIENCE_S) == 0
        client.join(PATIENCE_S)
        assert client.lines[-1] == "data: [DONE]"
        assert '"completion_tokens":300' in client.lines[-2]
        assert gone(engine)


def test_before_it_refuses_anybody_the_server_says_that_it_will(tmp_path: Path) -> None:
    with deployed(tmp_path, drain_notice_s=60) as deployment:
        deployment.process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + PATIENCE_S
        while httpx.get(f"{deployment.url}/health/ready", timeout=PATIENCE_S).status_code != 503:
            assert time.monotonic() < deadline_s, "it still says that it is ready"
        taken = httpx.post(f"{deployment.url}/generate", json={"text": "a"}, timeout=PATIENCE_S)
        assert taken.status_code == 200
        deployment.process.send_signal(signal.SIGTERM)  # a second one does not wait
        assert deployment.process.wait(PATIENCE_S) == 0


def test_requests_over_the_drain_time_end_as_aborts(tmp_path: Path) -> None:
    with deployed(tmp_path, drain_s=0.1) as deployment:
        client = Streaming(deployment)
        deployment.process.send_signal(signal.SIGINT)
        assert deployment.process.wait(PATIENCE_S) == 0
        client.join(PATIENCE_S)
        assert client.lines[-1] == "data: [DONE]"
        assert '"type":"abort"' in client.lines[-2]


def test_killing_the_engine_gives_clients_an_error_at_once_and_ends_the_server(tmp_path: Path) -> None:
    with deployed(tmp_path, engine_restarts_max=0) as deployment:
        client = Streaming(deployment)
        os.kill(deployment.engine_pid(), signal.SIGKILL)
        killed_s = time.monotonic()
        client.join(PATIENCE_S)
        assert time.monotonic() - killed_s < 5, "at once, where a loaded machine is allowed for"
        assert "killed by signal 9 (SIGKILL)" in client.lines[-2]
        assert deployment.process.wait(PATIENCE_S) == 1
        assert "the engine process was killed by signal 9 (SIGKILL)" in deployment.said()


def test_killing_the_server_ends_the_engine(tmp_path: Path) -> None:
    with deployed(tmp_path) as deployment:
        engine = deployment.engine_pid()
        deployment.process.kill()
        assert wait_gone(engine)


@pytest.mark.parametrize(("mode", "status", "remedy"), [("fails", 1, "lower --kv-mem"), ("refuses", 2, "int8")])
def test_an_engine_that_cannot_start_is_one_line_and_status_2_if_no_other_could(
    tmp_path: Path, mode: str, status: int, remedy: str
) -> None:
    with deployed(tmp_path, mode=mode, wait=False) as deployment:
        assert deployment.process.wait(PATIENCE_S) == status
        assert deployment.said().count(remedy) == 1
        assert "Traceback" not in deployment.said()


def test_an_engine_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    with deployed(tmp_path, mode="silent", start_timeout_s=1, wait=False) as deployment:
        assert deployment.process.wait(PATIENCE_S) == 1
        assert "not ready after 1 s" in deployment.said()


def test_until_the_engine_is_ready_requests_get_503_and_a_signal_ends_both(tmp_path: Path) -> None:
    with deployed(tmp_path, mode="silent", wait=False) as deployment:
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport, base_url=deployment.url) as client:
            reply = client.get("/health")
        assert reply.status_code == 503
        assert "still loading" in reply.json()["error"]["message"]
        engine = deployment.engine_pid()
        deployment.process.terminate()
        assert deployment.process.wait(PATIENCE_S) == 0
        assert gone(engine)


def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} of 127.0.0.1 is in use.*--port"):
            bind(ServerOptions(port=port))


def test_without_a_folder_for_the_socket_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(StartupError, match="Set TMPDIR"), private_folder():
        raise AssertionError("there was a folder")


def test_other_than_loopback_addresses_must_be_asked_for() -> None:
    with pytest.raises(StartupError, match="--allow-remote on"):
        bind(ServerOptions(host="0.0.0.0", port=0))
    with bind(ServerOptions(host="0.0.0.0", port=0, allow_remote="on")) as listener:
        assert listener.getsockname()[1] > 0


def test_a_host_that_is_none_of_ours_is_one_line() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on|not an address"):
        bind(ServerOptions(host="203.0.113.7", port=0, allow_remote="on"))


def test_the_server_imports_no_torch() -> None:
    code = "import sys, sessile.server.run, sessile.server.host; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_engine_is_started_before_what_takes_long_is_imported() -> None:
    heavy = "{'fastapi', 'pydantic', 'uvicorn', 'tokenizers', 'numpy', 'zmq'}"
    code = f"import sys, sessile.cli, sessile.server.run; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with deployed(tmp_path, drain_s=60) as deployment:
        client = Streaming(deployment)
        deployment.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert deployment.process.poll() is None
        deployment.process.send_signal(signal.SIGINT)
        client.join(PATIENCE_S)
        assert '"type":"abort"' in client.lines[-2]
        assert deployment.process.wait(PATIENCE_S) == 0
