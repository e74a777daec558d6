"""Stop, kill and terminate engine and server under load, fill the disk of the log, move the clock.

    python scripts/faults.py                       # libfaketime (Debian's package of that name) moves the clock
    python scripts/faults.py --only "engine SIGKILL" --times 3

Each fault is set up --times times while clients stream and take turns in sessions. What must hold each time: every
stream ends with `data: [DONE]`, its last event saying why if it failed; nobody waits longer than the watchdog and a
start take; health is 503 while nothing works and 200 soon after; sessions say afterwards what they held before. Only
where the server itself is killed may connections break; then the engine has to go with it. Exit status 1 otherwise.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.unit.tiny_folder import write_tiny_model  # noqa: E402  (found by the line above)

SETTINGS = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "1M", "rows-max": 8, "threads": 1,
    "stall-timeout-s": 2, "health-timeout-s": 1, "engine-restarts-max": 1000, "drain-timeout-s": 20,
    "log-format": "json",
}  # fmt: skip
CLIENTS = 8
TOKENS = 120
WAIT_S_MAX = 60.0
"""For one answer: the watchdog's two seconds, a pause before the restart, the start of an engine, a loaded machine."""
START_S_MAX = 600.0
"""For a server that starts: the first one may have to compile kernels."""
SETTLE_S = 0.4
"""How long clients run before a fault."""
LIBFAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
JUMPS_S = (86_400, -86_400, 3_600, 0)
"""Where the wall clock stands one after the other, against the right time."""
JUMP_S = 0.5
"""How long it stands there."""


@dataclass
class Findings:
    """What went wrong, and how much was tried."""

    failures: list[str] = field(default_factory=list)
    streams: int = 0
    failed_streams: int = 0
    """Streams that ended with an error event: they are told, so this is no failure of ours."""
    longest_s: float = 0.0

    def expect(self, holds: bool, what: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(what)


class Server:
    """One server at a time, at one port. log: where its standard error goes. faketime: the library that moves its clock
    and its engine's, if it is to be moved.
    """

    def __init__(self, folder: Path, port: int, log: Path, faketime: Path | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._environment = dict(os.environ)
        self._clock = folder / "clock"
        if faketime:
            self.set_clock(0)
            self._environment |= {
                "LD_PRELOAD": str(faketime), "FAKETIME_TIMESTAMP_FILE": str(self._clock), "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in (SETTINGS | {"port": port}).items()]
        self._command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", *flags]
        self._command.append(f"--model={write_tiny_model(folder)}")
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as sink:
            return subprocess.Popen(self._command, stdin=subprocess.PIPE, stderr=sink, cwd=ROOT, env=self._environment)

    def set_clock(self, ahead_s: int) -> None:
        """Have the wall clock stand so far from the right time, at once."""
        written = self._clock.with_suffix(".new")
        written.write_text(f"{ahead_s:+d}\n")
        written.replace(self._clock)

    @property
    def engine(self) -> psutil.Process:
        """The engine process of now."""
        return psutil.Process(self.process.pid).children()[0]

    def restart(self) -> None:
        """After the server itself has ended."""
        self.process.wait(WAIT_S_MAX)
        self.process = self._start()

    def stop(self) -> bool:
        """End it for good; whether its engines have ended with it."""
        engines: list[psutil.Process] = []
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            engines = psutil.Process(self.process.pid).children()
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        return not psutil.wait_procs(engines, WAIT_S_MAX)[1]

    async def wait_ready(self, http: httpx.AsyncClient) -> float:
        """Until it takes requests; how long that took. Raises TimeoutError."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < START_S_MAX:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/health/ready", timeout=5)).status_code == 200:
                    return time.monotonic() - started_s
            await asyncio.sleep(0.05)
        raise TimeoutError("the server is not ready again")


class Client:
    """Streams one answer after the other, every second one as a turn of its session."""

    def __init__(self, number: int, http: httpx.AsyncClient, findings: Findings) -> None:
        self._session = f"client-{number}"
        self._http = http
        self._findings = findings
        self.may_break = False
        """Whether a connection may end in mid-air just now: the server itself is being killed."""
        self.history: list[int] | None = None
        """Of the session, as the last committed turn left it; None while it is not open."""

    async def run(self, ending: asyncio.Event) -> None:
        """Until told to end."""
        turn = 0
        while not ending.is_set():
            turn += 1
            try:
                if turn % 2:
                    await self._stream({"text": "Once upon a time"})
                else:
                    await self._take_turn()
            except httpx.TransportError as error:
                self._findings.expect(self.may_break, f"a connection broke: {type(error).__name__} {error}")
                await asyncio.sleep(0.05)

    async def _take_turn(self) -> None:
        if self.history is None:
            opened = {"capacity_of_str_len": 1, "streaming": True, "session_id": self._session}
            if (await self._http.post("/open_session", json=opened)).status_code != 200:
                await asyncio.sleep(0.05)
                return
            self.history = []
        if len(self.history) > 200:
            await self._http.post(f"/v1/sessions/{self._session}/rewind", json={"to_tokens": 0})
            self.history = None
            await self._http.post("/close_session", json={"session_id": self._session})
            return
        await self._stream({"text": " and then", "session_params": {"id": self._session}})

    async def _stream(self, body: dict[str, object]) -> None:
        findings, started_s = self._findings, time.monotonic()
        sampling = {"max_new_tokens": TOKENS if "session_params" not in body else 20, "ignore_eos": True}
        lines: list[str] = []
        sent = body | {"stream": True, "stream_output": "delta", "sampling_params": sampling}
        async with self._http.stream("POST", "/generate", json=sent) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line)
            status = reply.status_code
        took_s = time.monotonic() - started_s
        findings.longest_s = max(findings.longest_s, took_s)
        findings.expect(took_s < WAIT_S_MAX, f"an answer took {took_s:.1f} s")
        if status != 200:
            findings.expect(status == 503, f"status {status}")
            await asyncio.sleep(0.05)
            return
        findings.streams += 1
        findings.expect(bool(lines) and lines[-1] == "data: [DONE]", f"a stream ended with {lines[-1:]}")
        told = len(lines) > 1 and '"finish_reason":{"type"' in lines[-2]
        findings.expect(told, f"a stream did not say how it ended: {lines[-2:]}")
        if '"type":"abort"' in "".join(lines[-2:]):
            findings.failed_streams += 1
        elif "session_params" in body:
            reply_tokens = await self._http.get(f"/v1/sessions/{self._session}/tokens")
            if reply_tokens.status_code == 200:
                self.history = reply_tokens.json()["tokens"]

    async def check_session(self) -> None:
        """The session has what the last committed turn left, or one turn more whose reply was lost with the engine."""
        if self.history is None:
            return
        reply = await self._http.get(f"/v1/sessions/{self._session}/tokens")
        if reply.status_code == 200:
            held = reply.json()["tokens"][: len(self.history)]
            self._findings.expect(held == self.history, f"{self._session} says something else than before")
        else:
            self._findings.expect(False, f"{self._session} is gone: {reply.status_code} {reply.text}")


@contextlib.asynccontextmanager
async def under_load(server: Server, findings: Findings, *, may_break: bool = False) -> AsyncIterator[list[Client]]:
    """Clients that run meanwhile; on leaving they end, and every stream has come to its end."""
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=2 * WAIT_S_MAX, trust_env=False, limits=limits) as http:
        await server.wait_ready(http)
        ending = asyncio.Event()
        clients = [Client(number, http, findings) for number in range(CLIENTS)]
        for client in clients:
            client.may_break = may_break
        running = [asyncio.create_task(client.run(ending)) for client in clients]
        await asyncio.sleep(SETTLE_S)
        try:
            yield clients
        finally:
            ending.set()
            _, late = await asyncio.wait(running, timeout=2 * WAIT_S_MAX)
            findings.expect(not late, f"{len(late)} clients hang")
            for task in running:
                task.cancel()
            for outcome in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(outcome, Exception):
                    findings.failures.append(f"a client failed: {outcome!r}")
        if not may_break:
            for client in clients:
                await client.check_session()
                await http.post("/close_session", json={"session_id": client._session})


async def fault_engine(server: Server, findings: Findings, number: signal.Signals) -> None:
    """Send the engine a signal; the server stays, and another engine takes over."""
    async with under_load(server, findings), httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        engine = server.engine
        engine.send_signal(number)
        if number is not signal.SIGTERM:  # that one lets it finish first
            await asyncio.sleep(0.1)
            status = (await http.get("/health/ready", timeout=10)).status_code
            findings.expect(status == 503, f"ready says {status} without an engine")
            findings.expect((await http.get("/health/live", timeout=10)).status_code in (200, 503), "live is silent")
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)
        await server.wait_ready(http)
        findings.expect(server.process.poll() is None, "the server went with its engine")


async def fault_server(server: Server, findings: Findings, number: signal.Signals) -> None:
    """Send the server a signal. Stopped, it goes on as if nothing had been; ended, its engine ends with it."""
    async with under_load(server, findings, may_break=number is not signal.SIGSTOP):
        engine = server.engine
        server.process.send_signal(number)
        if number is signal.SIGSTOP:
            await asyncio.sleep(4)
            server.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(1)
            findings.expect(server.engine.pid == engine.pid, "the engine was blamed for a stop of the server")
            return
        status = await asyncio.to_thread(server.process.wait, WAIT_S_MAX)
        if number is signal.SIGTERM:
            findings.expect(status == 0, f"the server ended with status {status} after SIGTERM")
        with contextlib.suppress(psutil.NoSuchProcess):
            await asyncio.to_thread(engine.wait, WAIT_S_MAX)
        findings.expect(not engine.is_running(), "the engine outlived its server")
        server.restart()


async def fault_log(server: Server, findings: Findings, number: signal.Signals | None) -> None:
    """Nothing that is logged can be written: nobody notices."""
    async with under_load(server, findings):
        await asyncio.sleep(1)
    findings.expect(findings.failed_streams == 0, "streams failed for want of a log")


async def fault_clock(server: Server, findings: Findings, number: signal.Signals | None) -> None:
    """The wall clock jumps ahead and back: nobody notices, as whatever is waited for goes by another clock."""
    async with under_load(server, findings), httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        engine = server.engine
        for ahead_s in JUMPS_S:
            server.set_clock(ahead_s)
            await asyncio.sleep(JUMP_S)
            asked = {"model": "default", "prompt": "Once", "max_tokens": 1}
            created_s = (await http.post("/v1/completions", json=asked, timeout=WAIT_S_MAX)).json()["created"]
            moved_s = created_s - time.time()
            findings.expect(abs(moved_s - ahead_s) < 60, f"the clock was to move by {ahead_s} s, not by {moved_s:.0f}")
            findings.expect((await http.get("/health/ready", timeout=10)).status_code == 200, "not ready after a jump")
        findings.expect(server.engine.pid == engine.pid, "the engine was replaced after a jump")
    findings.expect(findings.failed_streams == 0, "streams failed after a jump")


FAULTS = {
    "engine SIGSTOP": (fault_engine, signal.SIGSTOP), "engine SIGKILL": (fault_engine, signal.SIGKILL),
    "engine SIGTERM": (fault_engine, signal.SIGTERM), "server SIGSTOP": (fault_server, signal.SIGSTOP),
    "server SIGKILL": (fault_server, signal.SIGKILL), "server SIGTERM": (fault_server, signal.SIGTERM),
    "log disk full": (fault_log, None), "clock jumps": (fault_clock, None),
}  # fmt: skip


async def torment(name: str, times: int, port: int, faketime: Path) -> Findings:
    """Set one fault up so many times, on a server of its own."""
    fault, number = FAULTS[name]
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        log = Path("/dev/full") if fault is fault_log else Path(folder) / "server.log"
        server = Server(Path(folder), port, log, faketime if fault is fault_clock else None)
        try:
            for _ in range(times):
                await fault(server, findings, number)
        except (TimeoutError, OSError) as error:
            findings.failures.append(f"{type(error).__name__}: {error}")
        finally:
            findings.expect(server.stop(), "an engine outlived its server")
        if findings.failures and log.is_file():
            print("\n".join(log.read_text().splitlines()[-20:]), file=sys.stderr)
    return findings


def main() -> int:
    """Every fault, or those that are named; 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often each fault is set up")
    parser.add_argument("--port", type=int, default=31600)
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="this fault; may be given again")
    parser.add_argument("--faketime", type=Path, default=LIBFAKETIME, help="libfaketime.so.1, which moves the clock")
    arguments = parser.parse_args()
    if "clock jumps" in (arguments.only or FAULTS) and not arguments.faketime.is_file():
        parser.error(f"there is no {arguments.faketime}: install libfaketime, or leave `clock jumps` out by --only")
    os.environ["PYTHONPATH"] = str(ROOT)
    failures = 0
    for name in arguments.only or FAULTS:
        findings = asyncio.run(torment(name, arguments.times, arguments.port, arguments.faketime))
        failures += len(findings.failures)
        print(
            f"{name:15} {arguments.times} times: {findings.streams:6} streams, {findings.failed_streams:4} ended with a"
            f" reason, longest answer {findings.longest_s:5.1f} s, {len(findings.failures)} failures", flush=True,
        )  # fmt: skip
        for failure in findings.failures[:20]:
            print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
