"""Keys: what is asked of every route, and who may do what."""

import io
import socket
from collections.abc import Iterator

import openai
import pytest

from sessile.chat.terminal import run_chat
from sessile.contract.messages import Submit
from sessile.server.app import create_app
from sessile.server.auth import ADMIN_ROUTES, OPEN_ROUTES
from sessile.server.config import ServerOptions
from tests.http.conftest import Running, bearer, ring_of, running_server
from tests.http.fake_engine import byte_tokenizer

ROUTES = [
    (method.upper(), path)
    for path, methods in create_app(NotImplemented, NotImplemented, ServerOptions()).openapi()["paths"].items()
    for method in methods
]
CLOSED = [(method, path) for method, path in ROUTES if path not in OPEN_ROUTES]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with running_server(key_ring=ring_of(acme="user", ops="admin")) as running:
        yield running


def place(path: str) -> str:
    return path.replace("{session}", "x").replace("{model}", "x")


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_route_but_health_needs_a_key(server: Running, method: str, path: str) -> None:
    reply = server.client.request(method, place(path), content=b"not even JSON")
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer KEY" in reply.json()["error"]["message"]
    assert server.engine.received == []


def test_the_routes_that_auth_names_exist() -> None:
    assert {path for _, path in ROUTES} >= OPEN_ROUTES | ADMIN_ROUTES


def test_health_needs_no_key(server: Running) -> None:
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "header", ["", "acme-key", "Bearer", "Bearer acme-ke", "Bearer acme-keyx", "Basic acme-key",
               "Bearer acme-key ops-key", "Bearer ACME-KEY", "Bearer \xe9", "Bearer " + "x" * 8000],
)  # fmt: skip
def test_what_is_not_a_valid_key_is_401(server: Running, header: str) -> None:
    reply = server.client.post("/generate", json={"text": "a"}, headers=[(b"authorization", header.encode("latin-1"))])
    assert reply.status_code == 401
    assert server.engine.submits() == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_valid_key_is_whom_it_stands_for(server: Running, scheme: str) -> None:
    reply = server.client.post("/generate", json={"text": "a"}, headers={"authorization": f"{scheme} acme-key"})
    assert reply.status_code == 200
    assert [submit.tenant for submit in server.engine.submits()] == ["acme"]


def test_a_refusal_never_shows_a_key(server: Running) -> None:
    reply = server.client.get("/v1/models", headers={"authorization": "Bearer secret-key"})
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    ("path", "host"),
    [("//generate", "x"), ("/health/../generate", "x"), ("/health%2F..%2Fgenerate", "x"), ("/generate", "x/health"),
     ("/generate?/health", "x"), ("/generate#/health", "x"), ("/generate;/health", "x"), ("/HEALTH", "x")],
)  # fmt: skip
def test_no_way_of_writing_a_path_goes_around_the_key(server: Running, path: str, host: str) -> None:
    content = b'{"text": "a"}'
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as client:
        client.sendall(head.encode() + content)
        status = client.recv(100).split()[1]
    assert status in (b"400", b"401", b"404", b"405")
    assert server.engine.submits() == []


@pytest.mark.parametrize("path", sorted(ADMIN_ROUTES))
def test_a_user_may_not_do_what_concerns_all(server: Running, path: str) -> None:
    method = "POST" if path == "/flush_cache" else "GET"
    reply = server.client.request(method, path, headers=bearer("acme"))
    assert reply.status_code == 403
    assert f"{method} {path} needs a key with the role admin" in reply.json()["error"]["message"]
    assert server.client.request(method, path, headers=bearer("ops")).status_code == 200


def test_only_an_admin_aborts_everything(server: Running) -> None:
    body = {"abort_all": True}
    assert server.client.post("/abort_request", json=body, headers=bearer("acme")).status_code == 403
    assert server.engine.received == []
    assert server.client.post("/abort_request", json=body, headers=bearer("ops")).status_code == 200
    assert [type(message).__name__ for message in server.engine.received] == ["CancelAll"]


def test_an_openai_client_sends_its_key_and_knows_the_refusal(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="acme-key", max_retries=0) as client:
        assert client.completions.create(model="default", prompt="hello").choices[0].text == "hello"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refusal:
        stranger.models.list()
    assert refusal.value.code == "invalid_api_key"


def test_chat_sends_its_key_and_says_in_one_line_that_it_has_none(server: Running) -> None:
    for key, status, says in (("acme-key", 0, "hello"), (None, 1, "SESSILE_API_KEY"), ("wrong", 1, "SESSILE_API_KEY")):
        shown = io.StringIO()
        pipe = io.StringIO("hello\n")
        assert run_chat(server.url, byte_tokenizer(), stdin=pipe, stdout=shown, api_key=key) == status
        assert says in shown.getvalue()


def test_server_settings_show_no_key_nor_its_hash(server: Running) -> None:
    text = server.client.get("/get_server_info", headers=bearer("ops")).text
    assert all(key.digest.hex() not in text for key in ring_of(acme="user", ops="admin").keys)
    assert repr(ring_of(acme="user")).count("digest") == 0


def test_without_a_keys_file_a_key_that_comes_along_means_nothing() -> None:
    with running_server() as running:
        reply = running.client.post("/generate", json={"text": "a"}, headers={"authorization": "Bearer whatever"})
        assert reply.status_code == 200
        assert [submit.tenant for submit in running.engine.submits()] == [""]
        assert running.client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_request_has_the_priority_that_it_asks_for(server: Running, path: str, body: dict) -> None:
    for fields in ({}, {"priority": None}, {"priority": -100}, {"priority": 100}):
        assert server.client.post(path, json=body | fields, headers=bearer("acme")).status_code == 200
    submits = [message for message in server.engine.received if isinstance(message, Submit)]
    assert [(submit.tenant, submit.priority) for submit in submits] == [
        ("acme", 0), ("acme", 0), ("acme", -100), ("acme", 100)
    ]  # fmt: skip
    refused = server.client.post(path, json=body | {"priority": 101}, headers=bearer("acme"))
    assert (refused.status_code, "priority" in refused.json()["error"]["message"]) == (400, True)
