"""Everything that clients can pile up has a bound: connections, requests, waiting, silence, and what nobody reads."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from sessile.server import connections
from tests.http.conftest import PATIENCE_S, Running, running_server
from tests.http.fake_engine import READY
from tests.http.toy_engine import ToyEngine

ENDLESS = {"ignore_eos": True, "max_new_tokens": 400}


def connected(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE_S)


def whole_reply(client: socket.socket) -> bytes:
    """A reply to its last byte: head and body may come apart."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += client.recv(1000)
    head, _, body = reply.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
    while len(body) < length:
        body += client.recv(1000)
    return head + b"\r\n\r\n" + body


def posted(client: socket.socket, **body: object) -> None:
    content = json.dumps(body).encode()
    client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content))


def test_a_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    with running_server(connections_max=3) as server:
        assert server.client.get("/health").status_code == 200
        held = [connected(server) for _ in range(2)]
        with connected(server) as one_more:
            reply = whole_reply(one_more)
            assert reply.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in reply and b"3 connections" in reply
            assert one_more.recv(1000) == b"", "and closed"
        assert server.client.get("/health").status_code == 200
        held.pop().close()
        server.wait_until(lambda: httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200)


@pytest.fixture
def small() -> Iterator[Running]:
    """A server whose engine says that it runs one request and lets one wait."""
    with running_server() as server:
        server.service.link._ready = msgspec.structs.replace(READY, rows_max=1, queue_max=1)
        yield server


def test_a_request_that_the_engine_could_not_take_is_refused_unread(small: Running) -> None:
    small.engine.pause()
    with small.in_background("one") as first, small.in_background("two") as second:
        with connected(small) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")  # no body yet
            reply = whole_reply(client)
        assert reply.startswith(b"HTTP/1.1 429") and b"retry-after" in reply and b"2 requests" in reply
        assert len(small.engine.submits()) == 2
        small.engine.resume()
        assert [reply.result().status_code for reply in (first, second)] == [200, 200]
    assert small.generate("three").status_code == 200


def test_who_sends_a_body_slowly_takes_nobodys_place_and_is_refused_at_its_end(small: Running) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 13\r\n\r\n"
    with connected(small) as one, connected(small) as two, connected(small) as three:
        for slow in (one, two, three):
            slow.sendall(head + b'{"text":')
        time.sleep(0.1)
        assert small.generate("quick").status_code == 200
        small.engine.pause()
        with small.in_background("first") as first, small.in_background("second") as second:
            one.sendall(b'"hi"}')
            reply = whole_reply(one)
            assert reply.startswith(b"HTTP/1.1 429") and b"retry-after" in reply and b"2 requests" in reply
            small.engine.resume()
            assert [reply.result().status_code for reply in (first, second)] == [200, 200]
        two.sendall(b'"hi"}')
        assert whole_reply(two).startswith(b"HTTP/1.1 200")


def test_a_flood_is_answered_and_leaves_nothing_behind() -> None:
    """2,000 requests against a queue of 64 are `scripts/overload.py`."""
    with running_server(lambda address: ToyEngine(address, rows_max=2, queue_max=6)) as server:

        async def ask(client: httpx.AsyncClient, n: int) -> httpx.Response:
            body = {"text": f"request {n % 5}", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
            return await client.post("/generate", json=body)

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
                return await asyncio.gather(*(ask(client, n) for n in range(150)))

        replies = asyncio.run(flood())
        assert {reply.status_code for reply in replies} == {200, 429}
        assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 429)
        for n, reply in enumerate(replies):
            if reply.status_code == 200:
                alone = server.generate(f"request {n % 5}", sampling_params={"max_new_tokens": 8, "temperature": 0})
                assert reply.json()["text"] == alone.json()["text"]
        assert server.service.link.in_flight == 0 and server.service.keys_by_rid == {}


def test_a_request_that_takes_too_long_ends_with_what_it_has_said() -> None:
    with running_server(request_timeout_s=0.3) as server:
        server.engine.script, server.engine.token_interval_s = [ord("x")] * 400, 0.01
        body = server.generate(sampling_params=ENDLESS).json()
        assert body["meta_info"]["finish_reason"]["type"] == "abort"
        assert "has taken 0.3 s (--request-timeout-s)" in body["meta_info"]["finish_reason"]["message"]
        assert body["text"].startswith("x") and len(body["text"]) < 400


def test_a_request_that_waits_too_long_is_refused_and_one_that_runs_goes_on() -> None:
    with running_server(lambda address: ToyEngine(address, rows_max=1), queue_timeout_s=0.3) as server:
        server.engine.device.step_s = 0.02
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.generate, "a" * 8, sampling_params=ENDLESS | {"max_new_tokens": 60})
            time.sleep(0.1)
            waiting = server.generate("b" * 8)
            assert waiting.status_code == 503 and "retry-after" in waiting.headers
            assert "has waited for 0.3 s (--queue-timeout-s)" in waiting.json()["error"]["message"]
            assert running.result().json()["meta_info"]["completion_tokens"] == 60


def test_a_stream_in_which_nothing_happens_sends_comments() -> None:
    with running_server(stream_keep_alive_s=0.05) as server:
        server.engine.pause()
        body = {"text": "hi", "stream": True}
        with server.client.stream("POST", "/generate", json=body) as reply:
            lines = reply.iter_lines()
            assert [next(lines), next(lines), next(lines)] == [": keep-alive", "", ": keep-alive"]
            server.engine.resume()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and '"text":"hi"' in rest[-2]


def test_a_stream_that_fails_after_a_comment_says_how() -> None:
    with running_server(stream_keep_alive_s=0.05) as server:
        server.engine.pause()
        body = {"model": "default", "prompt": "hi", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert next(lines) == ": keep-alive"
            server.call(server.service.link.fail, "the engine fell over")
            rest = [line for line in lines if line.startswith("data: ")]
        assert "the engine fell over" in rest[0] and rest[-1] == "data: [DONE]"


def test_h53_a_client_that_reads_nothing_loses_its_connection_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "UNREAD_TIMEOUT_S", 0.2)
    with running_server(stream_lag_tokens_max=20) as server, contextlib.ExitStack() as clients:
        server.engine.script = [ord("x")] * 500
        with caplog.at_level(logging.INFO, "sessile.server.calls"):
            # One that is stopped in its last 20 tokens does not lag: answers of other sizes are stopped elsewhere.
            for tops in (2, 3, 4, 5):
                client = clients.enter_context(connected(server))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wish = {"return_logprob": True, "top_logprobs_num": tops, "sampling_params": ENDLESS}
                for _ in range(25):  # all on one connection, none of them read
                    posted(client, text="a", stream=True, **wish)
            told = "reads too slowly"  # the first answers may still have fitted into the buffers on the way
            server.wait_until(lambda: any(told in vars(record).get("error", "") for record in caplog.records))
            server.wait_until(lambda: server.service.link.in_flight == 0 and not server.service.keys_by_rid)
        assert server.generate("hello").json()["text"]
