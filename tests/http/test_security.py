"""What an attacker on the wire may try, against a whole deployment: docs/SECURITY.md names these tests."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from sessile.server.connections import HEAD_BYTES_MAX
from sessile.server.run import private_folder
from tests.http.conftest import Running
from tests.http.serving import PATIENCE_S, Deployment, deployed

GROWTH_BYTES = 60 << 20
"""What the server may grow by while it is sent several times as much that it must not keep."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment")) as running:
        yield running


@contextlib.contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    where = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_connection(where, timeout=PATIENCE_S) as client:
        yield client


def send_until_refused(client: socket.socket, piece: bytes, bytes_max: int) -> tuple[int, bytes]:
    """Send a piece again and again until the server ends the connection; the bytes taken, and what it said."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < bytes_max:
            client.sendall(piece)
            sent += len(piece)
    said = b""
    with contextlib.suppress(ConnectionError):
        while received := client.recv(4096):
            said += received
    return sent, said


MANY = b"".join(b"a%d: b\r\n" % number for number in range(5000))
HEADS = {
    "headers without end": (b"POST /generate HTTP/1.1\r\nhost: x\r\n", MANY),
    "one header without end": (b"POST /generate HTTP/1.1\r\nhost: x\r\nx: ", b"x" * 65_536),
    "a path without end": (b"GET /", b"x" * 65_536),
    "a chunk's extension without end": (
        b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;x=", b"y" * 65_536
    ),
    "trailers without end": (
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        MANY,
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_what_surrounds_a_body_is_refused_before_it_fills_the_memory(deployment: Deployment, name: str) -> None:
    start, piece = HEADS[name]
    before = psutil.Process(deployment.process.pid).memory_info().rss
    with connection(deployment.url) as client:
        client.sendall(start)
        sent, _ = send_until_refused(client, piece, 200 << 20)
    assert sent < 50 << 20, "what the sockets' buffers hold, not what the client would have sent"
    assert psutil.Process(deployment.process.pid).memory_info().rss - before < GROWTH_BYTES
    assert httpx.get(f"{deployment.url}/health").status_code == 200


def test_headers_over_the_limit_are_431_and_below_it_fine(deployment: Deployment) -> None:
    with connection(deployment.url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"x" * (HEAD_BYTES_MAX + 1))
        assert client.recv(4096).startswith(b"HTTP/1.1 431 ")
        assert client.recv(4096) == b""
    room = HEAD_BYTES_MAX - 300
    assert httpx.get(f"{deployment.url}/health", headers={"x": "x" * room}).status_code == 200


def test_a_body_in_many_chunks_is_taken_however_much_their_frames_come_to(deployment: Deployment) -> None:
    body = b'{"prompt": "' + b"a" * 20_000 + b'"}'
    with httpx.Client(timeout=PATIENCE_S) as client:
        chunks = (body[place : place + 1] for place in range(len(body)))
        reply = client.post(f"{deployment.url}/tokenize", content=chunks)
    assert (reply.status_code, reply.json()["count"]) == (200, 20_000)


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /he", b"GET /health HTTP/1.1\r\nhost: x\r\n",
     b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\n",
     b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{"],
)  # fmt: skip
def test_a_request_that_does_not_come_to_its_end_ends_its_connection(
    server: Running, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr("sessile.server.connections.HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr("sessile.server.connections.BODY_TIMEOUT_S", 0.3)
    with connection(server.url) as client:
        client.sendall(start)
        _, said = send_until_refused(client, b"", 0)
    assert said.count(b"HTTP/1.1 200") == start.count(b"\r\n\r\nGET")
    assert server.engine.submits() == []
    assert server.client.get("/health").status_code == 200


def test_the_start_of_a_next_request_does_not_end_the_reply_to_the_last_one(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessile.server.connections.HEAD_TIMEOUT_S", 0.1)
    server.engine.token_interval_s = 0.2
    content = b'{"text": "hello", "stream": true}'
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
    with connection(server.url) as client:
        client.sendall(head + content + b"GET /health HTT")
        _, said = send_until_refused(client, b"", 0)
    assert b"data: [DONE]" in said


def test_no_process_listens_but_the_server_on_its_loopback_port(deployment: Deployment) -> None:
    port = int(deployment.url.rpartition(":")[2])
    server = psutil.Process(deployment.process.pid)
    listening = [
        (process.pid, place.laddr.ip, place.laddr.port)
        for process in (server, *server.children(recursive=True))
        for place in process.net_connections("inet")
        if place.status == psutil.CONN_LISTEN or place.type == socket.SOCK_DGRAM
    ]
    assert listening == [(server.pid, "127.0.0.1", port)]


def test_the_socket_to_the_engine_lies_where_only_its_user_may_enter() -> None:
    with private_folder() as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
def test_a_page_of_another_site_can_neither_send_nor_read(server: Running, origin: str) -> None:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    preflight = server.client.options("/generate", headers=asked)
    plain = {"origin": origin, "content-type": "text/plain"}
    replies = [server.client.post("/generate", content=b'{"text": "a"}', headers=plain),
               server.client.get("/v1/sessions", headers={"origin": origin})]  # fmt: skip
    assert [preflight.status_code, *(reply.status_code for reply in replies)] == [405, 403, 403]
    for each in (preflight, *replies):
        assert not [name for name in each.headers if name.startswith("access-control-")]
    assert server.engine.received == []


def test_pages_of_the_server_itself_and_programs_may_send(server: Running) -> None:
    for origin in (server.url, "chrome-extension://abc"):
        assert server.client.post("/generate", json={"text": "a"}, headers={"origin": origin}).status_code == 200


def test_ids_that_are_drawn_cannot_be_guessed(server: Running) -> None:
    drawn = [server.client.post("/v1/sessions", json={}).json()["id"] for _ in range(50)]
    assert len(set(drawn)) == 50
    assert all(len(bytes.fromhex(each)) == 16 for each in drawn)
    # Of 16 random bytes, each bit is set in about half of all ids.
    ones = [sum(int(each, 16) >> bit & 1 for each in drawn) for bit in range(128)]
    assert all(5 < count < 45 for count in ones)
