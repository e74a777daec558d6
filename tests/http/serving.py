"""A whole deployment in processes of its own: `sessile.server.run.serve` with the fake engine as its child.

Run as `python -m tests.http.serving ENGINE_MODE OPTIONS` for the server, options as JSON.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from sessile.server.config import ServerOptions
from sessile.server.run import serve
from tests.http.fake_engine import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
"""How long processes may take to start, answer and end; a loaded machine is slow, and a failure need not be quick."""


@dataclass
class Deployment:
    """A server process, where it answers, and what it said."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, f"one engine expected, found {children}"
        return int(children[0])

    def said(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def deployed(
    folder: Path,
    *,
    mode: str = "echo",
    drain_s: float = PATIENCE_S,
    start_timeout_s: float = PATIENCE_S,
    wait: bool = True,
    **options: object,
) -> Iterator[Deployment]:
    """Start a deployment with these ServerOptions, wait until it is healthy, and see to it that it goes afterwards."""
    port = free_port()
    options |= {"port": port, "drain_timeout_s": drain_s, "engine_start_timeout_s": start_timeout_s}
    log = folder / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.http.serving", mode, json.dumps(options)],
            stderr=sink, cwd=ROOT, text=True,
        )  # fmt: skip
    deployment = Deployment(process, f"http://127.0.0.1:{port}", log)
    try:
        if wait:
            wait_until_healthy(deployment)
        yield deployment
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(deployment: Deployment) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        assert deployment.process.poll() is None, deployment.said()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{deployment.url}/health").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError(f"the server is not healthy: {deployment.said()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def server_main(mode: str, options: str) -> int:
    """The server process."""
    engine = [sys.executable, "-m", "tests.http.engine_child"]
    builder = [sys.executable, "-m", "tests.http.builder_child"]
    given = ServerOptions(**json.loads(options))
    return serve(given, byte_tokenizer, engine, json.dumps({"mode": mode}), builder_argv=builder)


if __name__ == "__main__":
    sys.exit(server_main(*sys.argv[1:]))
