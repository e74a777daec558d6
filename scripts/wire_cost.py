"""What each token of a stream costs a server and a client: CPU time of both, with an engine that costs nothing.

`python scripts/wire_cost.py --surface chat --streams 256` starts a server whose engine is a stub that makes one token a
stream and step, and reads its streams with a client: one that only counts, that of the benches (lean), or AsyncClient
(library). It prints the CPU time of the server's process and of the client's for each token; each is a process of its
own, so that a busy machine changes little, but for this: steps that wait are taken together, and a server that falls
behind has fewer events to send. With `--profile FILE` the server runs under cProfile, two to three times as slow.
"""

import argparse
import asyncio
import cProfile
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import orjson
import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from sessile.bench.lean_client import LeanClient  # noqa: E402  (found by the line above)
from sessile.client.async_client import AsyncClient  # noqa: E402
from sessile.server.config import ServerOptions  # noqa: E402
from sessile.server.run import serve  # noqa: E402
from tests.http.fake_engine import FakeEngine, byte_tokenizer  # noqa: E402

SCRIPT = list(b"the quick brown fox jumps over the lazy dog. ") * 12
READ_BYTES = 1 << 16
START_TIMEOUT_S = 300.0
CLIENTS = {"lean": LeanClient, "library": AsyncClient}


def main(options: argparse.Namespace) -> int:
    """Start the server, let all streams run at once, print what a token cost."""
    server = started(options)
    process = psutil.Process(server.pid)
    try:
        uvloop.run(streams(options, min(8, options.streams), 4))  # what is made once
        requests_us, _, _, _ = measured(process, options, 1)
        server_us, client_us, events, took_s = measured(process, options, options.tokens)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    tokens = options.streams * options.tokens
    print(
        f"{options.surface}, client {options.client}: {options.streams} streams of {options.tokens} tokens, a step "
        f"every {options.interval_ms:g} ms; {events} events in {took_s:.2f} s\n"
        f"server: {server_us / tokens:.1f} µs a token, {(server_us - requests_us) / tokens:.1f} µs without the "
        f"requests themselves, {requests_us / options.streams:.0f} µs each; "
        f"{(server_us - requests_us) / events:.1f} µs an event\nclient: {client_us / tokens:.1f} µs a token"
    )
    return 0


def given_options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--surface", choices=("generate", "cumulative", "chat", "completions"), default="generate")
    parser.add_argument("--client", choices=("count", *CLIENTS), default="count", help="but for count: of /generate")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream, at most 400")
    parser.add_argument("--interval-ms", type=float, default=10.0, help="pause of the engine between two steps")
    parser.add_argument("--port", type=int, default=31300)
    parser.add_argument("--profile", help="file for the server's profile")
    parser.add_argument("--role", choices=tuple(ROLES), default="main", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(process: psutil.Process, options: argparse.Namespace, tokens: int) -> tuple[float, float, int, float]:
    """CPU microseconds of server and client, events, seconds."""
    before, own_s, started_s = process.cpu_times(), time.process_time(), time.perf_counter()
    events = uvloop.run(streams(options, options.streams, tokens))
    took_s, own_s, after = time.perf_counter() - started_s, time.process_time() - own_s, process.cpu_times()
    return (after.user + after.system - before.user - before.system) * 1e6, own_s * 1e6, events, took_s


async def streams(options: argparse.Namespace, count: int, tokens: int) -> int:
    """The events of so many streams at once."""
    if options.client == "count":
        return sum(await asyncio.gather(*(counted(options, index, tokens) for index in range(count))))
    async with CLIENTS[options.client](f"http://127.0.0.1:{options.port}") as client:

        async def pieces(index: int) -> int:
            generation = client.generate(
                list(f"{index:016d}".encode()), max_new_tokens=tokens, temperature=0, ignore_eos=True
            )
            return len([piece async for piece in generation])

        return sum(await asyncio.gather(*map(pieces, range(count))))


async def counted(options: argparse.Namespace, index: int, tokens: int) -> int:
    """The events of one stream, which are not even looked at."""
    reader, writer = await asyncio.open_connection("127.0.0.1", options.port)
    path, content = request_of(options, index, tokens)
    head = f"POST {path} HTTP/1.1\r\nhost: stub\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    events, tail = -1, b""  # but for the last one, which says that it is
    while b"[DONE]" not in tail:
        received = await reader.read(READ_BYTES)
        assert received, f"the stream broke off behind {tail!r}"
        events += (tail[-5:] + received).count(b"data: ")
        tail = tail[-32:] + received
    writer.close()
    return events


def request_of(options: argparse.Namespace, index: int, tokens: int) -> tuple[str, bytes]:
    """Path and body."""
    prompt = f"{index:016d}"
    if options.surface in ("generate", "cumulative"):
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(prompt.encode()), "sampling_params": sampling, "stream": True}
        body |= {"stream_output": "delta"} if options.surface == "generate" else {}
        return "/generate", orjson.dumps(body)
    common = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    if options.surface == "completions":
        return "/v1/completions", orjson.dumps({"prompt": prompt, **common})
    return "/v1/chat/completions", orjson.dumps({"messages": [{"role": "user", "content": prompt}], **common})


def started(options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """A server that is ready."""
    server = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--role=server"], cwd=ROOT)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the server did not start"
        try:
            if httpx.get(f"http://127.0.0.1:{options.port}/health").status_code == httpx.codes.OK:
                return server
        except httpx.TransportError:
            pass  # not yet
        time.sleep(0.05)
    server.kill()
    raise AssertionError(f"the server was not ready in {START_TIMEOUT_S:g} s")


def serve_here(options: argparse.Namespace) -> int:
    """Be the server."""
    engine = [sys.executable, __file__, f"--interval-ms={options.interval_ms}", "--role=engine"]
    profile = cProfile.Profile(builtins=False)
    if options.profile:
        profile.enable()
    settings = ServerOptions(port=options.port, log_level="error")
    status = serve(settings, byte_tokenizer, engine, "{}", builder_argv=engine)
    if options.profile:
        profile.disable()
        profile.dump_stats(options.profile)
    return status


def run_engine(options: argparse.Namespace) -> int:
    """Be the engine, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = FakeEngine(options.address)
    engine.script, engine.token_interval_s = SCRIPT, options.interval_ms / 1e3

    def exit_with_stdin() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(0)

    threading.Thread(target=exit_with_stdin, daemon=True).start()
    engine.start()
    engine.join()
    return 0


ROLES = {"main": main, "server": serve_here, "engine": run_engine}

if __name__ == "__main__":
    asked = given_options()
    sys.exit(ROLES[asked.role](asked))
