"""A flood, and a reader that does not read: `python scripts/overload.py`, on a machine that does nothing else.

1. --requests at once against a queue of 64: each is answered with 200 or 429 within its time-out, those with 200 are
   right, memory stays bounded, and 2 s later a request is served as before.
2. 50 streams, with and without one client among them that reads nothing: its request ends, and the time between two
   tokens of the others changes by less than 5 %.

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
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.unit.tiny_folder import write_tiny_model  # noqa: E402  (found by the line above)

SETTINGS = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "16M", "rows-max": 64,
    "queue-max": 64, "threads": 1, "log-level": "warning", "stream-lag-tokens-max": 64,
}  # fmt: skip
ANSWER_S_MAX, RECOVERY_S_MAX = 120.0, 2.0
MEMORY_BYTES_MAX = 256 << 20
"""What the flood may add to the server while it lasts."""
STREAMS, TOKENS = 50, 300
CHANGE_MAX = 0.05
ROUNDS = 5
"""Measurements with and without the one that does not read, in turn."""
PROMPTS = 7


@contextlib.contextmanager
def deployed(port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server with a tiny random model; it is gone on leaving."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"port": port, "model": write_tiny_model(Path(folder))}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", *flags]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
        try:
            yield process
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
    sampling = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
    return {"text": f"request number {n % PROMPTS}", "sampling_params": sampling}


async def flood(http: httpx.AsyncClient, server: psutil.Process, requests: int) -> list[str]:
    """Send all at once; what did not hold."""
    failures = []
    alone = [(await http.post("/generate", json=body(n))).json()["text"] for n in range(PROMPTS)]
    before_bytes = server.memory_info().rss
    started_s = time.monotonic()
    replies = await asyncio.gather(*(http.post("/generate", json=body(n)) for n in range(requests)))
    took_s = time.monotonic() - started_s
    added_bytes = server.memory_info().rss - before_bytes
    started_s = time.monotonic()
    after = await http.post("/generate", json=body(0))
    recovered_s = time.monotonic() - started_s
    statuses = Counter(reply.status_code for reply in replies)
    print(
        f"flood: {dict(statuses)} in {took_s:.1f} s, {added_bytes / 2**20:.1f} MiB more, the next request took"
        f" {recovered_s:.2f} s"
    )
    if set(statuses) - {200, 429} or not statuses[200]:
        failures.append(f"statuses {dict(statuses)}")
    wrong = sum(r.status_code == 200 and r.json()["text"] != alone[n % PROMPTS] for n, r in enumerate(replies))
    if wrong:
        failures.append(f"{wrong} accepted requests say something else than alone")
    if any("retry-after" not in reply.headers for reply in replies if reply.status_code == 429):
        failures.append("a 429 without Retry-After")
    if added_bytes > MEMORY_BYTES_MAX:
        failures.append(f"{added_bytes} bytes more")
    if after.status_code != 200 or recovered_s > RECOVERY_S_MAX:
        failures.append(f"{after.status_code} {recovered_s:.2f} s after the flood")
    return failures


async def gaps(http: httpx.AsyncClient) -> list[float]:
    """Seconds between two events of 49 streams that are read."""
    found: list[float] = []

    async def read(n: int) -> None:
        sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
        sent = body(n) | {"stream": True, "stream_output": "delta", "sampling_params": sampling}
        before_s = 0.0
        async with http.stream("POST", "/generate", json=sent) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.perf_counter()
                    if before_s:
                        found.append(now_s - before_s)
                    before_s = now_s

    await asyncio.gather(*(read(n) for n in range(STREAMS - 1)))
    return found


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
    """Compare the others' gaps with and without one that does not read; what did not hold."""
    medians: dict[bool, list[float]] = {True: [], False: []}
    await gaps(http)
    for _ in range(ROUNDS):
        for reads in (True, False):
            async with one_more(port, reads=reads):
                medians[reads].append(statistics.median(await gaps(http)))
    change = statistics.median(medians[False]) / statistics.median(medians[True]) - 1
    print(f"slow reader: the others' median gap is {statistics.median(medians[False]) * 1e3:.2f} ms, {change:+.1%}")
    in_flight = [line for line in (await http.get("/metrics")).text.splitlines() if "requests_in_flight{" in line]
    failures = [] if float(in_flight[0].split()[-1]) == 0 else ["the request that nobody reads goes on"]
    return failures + ([f"the others' gaps changed by {change:+.1%}"] if change > CHANGE_MAX else [])


async def run(process: "subprocess.Popen[bytes]", port: int, requests: int) -> list[str]:
    """Both parts."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S_MAX, trust_env=False, limits=limits
    ) as http:
        await wait_ready(http)
        return await flood(http, psutil.Process(process.pid), requests) + await slow_reader(http, port)


def main() -> int:
    """0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--port", type=int, default=31640)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    with deployed(arguments.port) as process:
        failures = asyncio.run(run(process, arguments.port, arguments.requests))
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
