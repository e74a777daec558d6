"""Random and mutated requests to every route of a live server: `python scripts/fuzz_http.py --requests 100000`.

Each is one that some route takes, with its body, its line or its headers changed by chance, HTTP or not; each goes over
a connection of its own, with the length of its body. Every one must be answered, none with a status of 5xx or an error
of the server's in a stream; server and engine are there at the end, and hold little more than after the second tenth;
the audit of every step finds nothing, and no page, row or request is left behind. Exit status 1 if any of this does not
hold; what a finding was sent is kept in build/fuzz/http.
"""

import argparse
import asyncio
import contextlib
import hashlib
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httptools
import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from scripts.fuzzing.requests import SESSION, has_server_error, mutated_request, requests_of  # noqa: E402  (found by the line above)
from scripts.overload import deployed, wait_ready  # noqa: E402
from tests.unit.tiny_folder import write_tiny_model  # noqa: E402

SETTINGS: dict[str, object] = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "1M", "rows-max": 16, "threads": 1,
    "audit-level": 2, "speculate": "on", "retract-every": 97, "sessions-max": 200, "log-level": "error",
    "responses-max": 64, "responses-bytes-max": 1 << 20,
}  # fmt: skip
CONNECTIONS = 16
REQUEST_BYTES_MAX = 8 << 20
"""Larger ones are refused unread, and whoever goes on sending them may be cut off before the answer is read."""
MUTATED_SHARE = 0.95
"""Of the requests; the others are sent as they are described."""
ANSWER_S_MAX = 60.0
CLEARED_S_MAX = 60.0
PARTS = 10
"""After each, what was left behind is closed and memory looked at."""
GROWTH_MAX, GROWTH_BYTES_MIN = 0.1, 16 << 20
FINDINGS_MAX = 20


@dataclass
class Answer:
    """What came back for one request, as the parser sees it."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    is_whole: bool = False
    has_body: bool = True

    def on_headers_complete(self) -> None:
        """To a HEAD there is nothing more."""
        self.is_whole = not self.has_body

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        self.body += piece

    def on_message_complete(self) -> None:
        """The body is there."""
        self.is_whole = True


@dataclass
class Findings:
    """What was not as it should be, and how often each status was."""

    folder: Path
    statuses: Counter[int] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)

    def keep(self, what: str, raw: bytes) -> None:
        """Write a request down, and say what it did."""
        path = self.folder / hashlib.blake2b(raw, digest_size=8).hexdigest()
        path.write_bytes(raw)
        self.kept.append(what)
        print(f"finding: {what}\n  {path}", flush=True)


def wire_of(raw: bytes) -> bytes:
    """A request in text, as it goes over a socket."""
    head, _, body = raw.partition(b"\n\n")
    line, *headers = head.split(b"\n")
    own = [header for header in headers if not header.lower().startswith((b"content-length", b"transfer-encoding"))]
    lines = [line + b" HTTP/1.1", b"host: localhost", *own, b"content-length: %d" % len(body), b"connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def answered(port: int, raw: bytes) -> Answer:
    """Send a request on a connection of its own and read what comes. Raises OSError, HttpParserError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = Answer(has_body=not raw.startswith(b"HEAD "))
    parser = httptools.HttpResponseParser(answer)
    try:
        # One who refuses early closes early: what is not taken any more is no finding if there is an answer.
        with contextlib.suppress(ConnectionError):
            writer.write(wire_of(raw))
            await writer.drain()
        with contextlib.suppress(ConnectionResetError):
            while not answer.is_whole and (piece := await reader.read(1 << 16)):
                parser.feed_data(piece)
        with contextlib.suppress(httptools.HttpParserError):
            answer.status = parser.get_status_code()
    finally:
        writer.close()
    return answer


async def send_some(port: int, seeds: list[bytes], rng: Random, count: int, findings: Findings) -> None:
    """So many requests, one after the other."""
    for _ in range(count):
        if len(findings.kept) >= FINDINGS_MAX:
            return
        raw = rng.choice(seeds)
        if rng.random() < MUTATED_SHARE:
            changed = mutated_request(raw, rng)
            raw = changed if len(changed) <= REQUEST_BYTES_MAX else raw
        await send_one(port, raw, findings)


async def send_one(port: int, raw: bytes, findings: Findings) -> None:
    """One request, and what is to be said of its answer."""
    try:
        answer = await asyncio.wait_for(answered(port, raw), ANSWER_S_MAX)
    except (TimeoutError, OSError, httptools.HttpParserError) as error:
        findings.keep(f"{type(error).__name__}: {error}", raw)
        return
    findings.statuses[answer.status] += 1
    if not answer.is_whole or not 200 <= answer.status < 500 or has_server_error(answer.body):
        findings.keep(f"status {answer.status}, whole: {answer.is_whole}: {bytes(answer.body[-300:])!r}", raw)


async def clear(http: httpx.AsyncClient) -> list[str]:
    """Close what was left behind; what does not close within the time."""
    deadline_s = time.monotonic() + CLEARED_S_MAX
    await http.post("/abort_request", json={"abort_all": True})
    for place in ("/v1/sessions", "/v1/corpora"):
        while listed := (await http.get(place)).json()["data"]:
            if time.monotonic() > deadline_s:
                return [f"{place} that do not close: {[each['id'] for each in listed]}"]
            for each in listed:
                await http.delete(f"{place}/{each['id']}")
    while (reply := await http.post("/flush_cache")).status_code != 200:
        if time.monotonic() > deadline_s:
            return [f"requests that do not end: {reply.text}"]
        await asyncio.sleep(0.1)
    return []


async def what_is_left(http: httpx.AsyncClient) -> list[str]:
    """Everything that should not be there once all is closed."""
    pool = (await http.get("/v1/pool")).json()
    pages = pool["pages"]
    metrics = (await http.get("/metrics")).text.splitlines()
    figures = {line.partition("{")[0]: float(line.split()[-1]) for line in metrics if line.startswith("sessile_")}
    expected = {
        "pages": pages["free"] == pages["total"] - pages["scratch"],
        "rows": pool["rows"]["held"] == 0,
        "requests": not any(pool["requests"].values()),
        "differences found by the audit": figures["sessile_audit_failures_total"] == 0,
        "an audit that ran": figures["sessile_audit_checks_total"] > 0,
        "requests that the server believes in": figures["sessile_http_requests_in_flight"] == 0,
    }
    return [name for name, holds in expected.items() if not holds]


async def fuzz(port: int, server: psutil.Process, requests: int, seed: int, findings: Findings) -> list[str]:
    """Send them all; what did not hold, beside findings."""
    sizes: list[dict[str, int]] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        await wait_ready(http)
        seeds = requests_of((await http.get("/openapi.json")).json())
        engine = next(child for child in server.children() if "engine" in child.cmdline())
        processes = {"server": server, "engine": engine}
        begun_s = time.monotonic()
        for part in range(PARTS):
            await http.post("/open_session", json={"capacity_of_str_len": 1, "session_id": SESSION, "streaming": True})
            rngs = [Random(f"{seed} {part} {number}") for number in range(CONNECTIONS)]
            share = -(-requests // (PARTS * CONNECTIONS))
            await asyncio.gather(*(send_some(port, seeds, rng, share, findings) for rng in rngs))
            if wrong := await clear(http):
                return wrong
            gone = [name for name, process in processes.items() if not process.is_running()]
            if gone:
                return [f"the {name} is gone" for name in gone]
            sizes.append({name: process.memory_info().rss for name, process in processes.items()})
            shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes[-1].items())
            sent = findings.statuses.total()
            print(f"{sent:7d} requests in {time.monotonic() - begun_s:.0f} s; {shown}", flush=True)
        wrong = [f"left behind: {what}" for what in await what_is_left(http)]
    for name in processes:
        first, last = sizes[1][name], sizes[-1][name]
        if last - first > max(GROWTH_MAX * first, GROWTH_BYTES_MIN):
            wrong.append(f"the {name} has grown from {first >> 20} to {last >> 20} MiB")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Start a server with a tiny random model, and send it everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=1, help="of what is changed by chance")
    asked = parser.parse_args(arguments)
    place = ROOT / "build" / "fuzz" / "http"
    place.mkdir(parents=True, exist_ok=True)
    findings, started_s = Findings(place), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpora").mkdir()
        (folder / "corpora" / "a.txt").write_text("some text")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        settings: dict[str, Any] = {"model": write_tiny_model(folder), "corpora-dir": folder / "corpora"}
        with deployed(port, SETTINGS | settings) as server:
            wrong = asyncio.run(fuzz(port, server, asked.requests, asked.seed, findings))
    for what in wrong:
        print(f"NOT GOOD: {what}")
    statuses = ", ".join(f"{count} × {status}" for status, count in sorted(findings.statuses.items()))
    print(f"{findings.statuses.total()} requests in {time.monotonic() - started_s:.0f} s: {statuses}")
    print(f"{len(findings.kept)} findings")
    return 1 if wrong or findings.kept else 0


if __name__ == "__main__":
    sys.exit(main())
