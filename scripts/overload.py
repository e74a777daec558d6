"""A flood, and a reader that does not read: `python scripts/overload.py`, on a machine that does nothing else.

1. --requests at once, on as many connections, against a queue of 64, of a server with a tiny random model: each is
   answered with 200 or 429 within its time-out, those with 200 are right, memory stays bounded, and 2 s later a request
   is served as before.
2. 50 streams of the embedded model, with and without one client among them that reads nothing: its request ends with a
   reason, and the time between two tokens of the others changes by less than 5 %.

Exit status 1 if any of this does not hold.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.unit.tiny_folder import write_tiny_model  # noqa: E402  (found by the line above)

TINY: dict[str, object] = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "16M", "rows-max": 64,
    "queue-max": 64, "threads": 1, "log-level": "warning",
}  # fmt: skip
EMBEDDED: dict[str, object] = {
    "model": "default", "context-tokens": 1024, "rows-max": 64, "log-level": "warning", "stream-lag-tokens-max": 64,
}  # fmt: skip
ANSWER_S_MAX, RECOVERY_S_MAX = 120.0, 2.0
ANSWER_TOKENS = 100
"""Of an answer in the flood: enough for the queue to fill while requests are read."""
MEMORY_BYTES_MAX = 256 << 20
"""What the flood may add to the server while it lasts."""
STREAMS, TOKENS = 50, 200
CHANGE_MAX = 0.05
ROUNDS = 5
"""Measurements with and without the one that does not read, in turn."""
PROMPTS = 7


@contextlib.contextmanager
def deployed(port: int, settings: dict[str, object]) -> Iterator[psutil.Process]:
    """A server; it is gone on leaving."""
    flags = [f"--{name}={value}" for name, value in (settings | {"port": port}).items()]
    command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


async def wait_ready(http: httpx.AsyncClient) -> None:
    """Until the server takes requests."""
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/health/ready")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


def body(n: int) -> dict[str, object]:
    """One of a few requests, so that each answer can be compared with that of the same request alone."""
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"text": f"request number {n % PROMPTS}", "sampling_params": sampling}


@dataclass(frozen=True)
class Answer:
    """What came back on a connection of its own."""

    status: int
    headers: str
    text: str | None


def posted(sent: dict[str, object]) -> bytes:
    """A request as it is written, on a connection that ends with the answer."""
    content = json.dumps(sent).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def answer_of(reader: asyncio.StreamReader) -> Answer:
    """Read an answer to its end. Raises TimeoutError."""
    head, _, content = (await asyncio.wait_for(reader.read(-1), ANSWER_S_MAX)).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    return Answer(status, head.decode().lower(), json.loads(content)["text"] if status == 200 else None)


async def flood(http: httpx.AsyncClient, server: psutil.Process, port: int, requests: int) -> list[str]:
    """Open as many connections, write to all of them at once, and read; what did not hold."""
    failures = []
    alone = [(await http.post("/generate", json=body(n))).json()["text"] for n in range(PROMPTS)]
    before_bytes = server.memory_info().rss
    ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(requests)]
    started_s = time.monotonic()
    for n, (_, writer) in enumerate(ends):
        writer.write(posted(body(n)))
    sent_s = time.monotonic() - started_s
    answers = await asyncio.gather(*(answer_of(reader) for reader, _ in ends))
    took_s = time.monotonic() - started_s
    for _, writer in ends:
        writer.close()
    added_bytes = server.memory_info().rss - before_bytes
    started_s = time.monotonic()
    after = await http.post("/generate", json=body(0))
    recovered_s = time.monotonic() - started_s
    statuses = Counter(answer.status for answer in answers)
    print(
        f"flood: {requests} requests sent in {sent_s:.2f} s, answered with {dict(statuses)} after {took_s:.1f} s,"
        f" {added_bytes / 2**20:.1f} MiB more, the next request took {recovered_s:.2f} s", flush=True,
    )  # fmt: skip
    if set(statuses) != {200, 429}:
        failures.append(f"statuses {dict(statuses)}: some are to be accepted and some refused, and none fails")
    wrong = sum(each.status == 200 and each.text != alone[n % PROMPTS] for n, each in enumerate(answers))
    if wrong:
        failures.append(f"{wrong} accepted requests say something else than alone")
    if any("retry-after:" not in answer.headers for answer in answers if answer.status == 429):
        failures.append("a 429 without Retry-After")
    if added_bytes > MEMORY_BYTES_MAX:
        failures.append(f"{added_bytes} bytes more")
    if after.status_code != 200 or recovered_s > RECOVERY_S_MAX:
        failures.append(f"{after.status_code} {recovered_s:.2f} s after the flood")
    return failures


async def token_gap_s(http: httpx.AsyncClient) -> float:
    """Seconds between two tokens of 49 streams that are read: the mean of each, of which the median."""

    async def read(n: int) -> float:
        sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
        sent = body(n) | {"stream": True, "stream_output": "delta", "sampling_params": sampling}
        first_s = last_s = 0.0
        async with http.stream("POST", "/generate", json=sent) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
        return (last_s - first_s) / (TOKENS - 1)

    return statistics.median(await asyncio.gather(*(read(n) for n in range(STREAMS - 1))))


@contextlib.asynccontextmanager
async def one_more(port: int, *, reads: bool) -> AsyncIterator[None]:
    """A fiftieth client with cumulative logprobs, which are large; what it is sent it reads, or never looks at."""
    sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
    asked = {"stream": True, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 20}
    content = json.dumps(body(0) | asked).encode()
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content))
    reading = asyncio.create_task(asyncio.to_thread(_read_all, client)) if reads else None
    try:
        yield
    finally:
        client.shutdown(socket.SHUT_RDWR)
        if reading is not None:
            await reading
        client.close()


def _read_all(client: socket.socket) -> None:
    while client.recv(1 << 16):
        pass


async def slow_reader(http: httpx.AsyncClient, port: int) -> list[str]:
    """Compare the others' tokens with and without one that does not read; what did not hold."""
    found: dict[bool, list[float]] = {True: [], False: []}
    going_on = 0
    await token_gap_s(http)
    for number in range(ROUNDS):
        for reads in (True, False) if number % 2 else (False, True):
            async with one_more(port, reads=reads):
                found[reads].append(await token_gap_s(http))
                going_on += not reads and await in_flight(http)
    pairs = [without / with_all - 1 for without, with_all in zip(found[False], found[True], strict=True)]
    change, gap_ms = statistics.median(pairs), statistics.median(found[False]) * 1e3
    each = ", ".join(f"{pair:+.1%}" for pair in pairs)
    print(f"slow reader: a token of the others each {gap_ms:.1f} ms, {change:+.1%} ({each})")
    failures = [f"{going_on} requests that nobody reads were going on"] if going_on else []
    return failures + ([f"the others' gaps changed by {change:+.1%}"] if abs(change) > CHANGE_MAX else [])


async def in_flight(http: httpx.AsyncClient) -> int:
    """Requests that have not ended, as the server counts them."""
    lines = (await http.get("/metrics")).text.splitlines()
    return int(float(next(line for line in lines if "requests_in_flight{" in line).split()[-1]))


@contextlib.asynccontextmanager
async def client_of(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that takes requests by now."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S_MAX, trust_env=False, limits=limits
    ) as http:
        await wait_ready(http)
        yield http


async def run(port: int, requests: int) -> list[str]:
    """Both parts, each with a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = TINY | {"model": write_tiny_model(Path(folder))}
        with deployed(port, tiny) as server:
            async with client_of(port) as http:
                failures = await flood(http, server, port, requests)
    with deployed(port, EMBEDDED):
        async with client_of(port) as http:
            return failures + await slow_reader(http, port)


def main() -> int:
    """0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--port", type=int, default=31640)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    failures = asyncio.run(run(arguments.port, arguments.requests))
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
