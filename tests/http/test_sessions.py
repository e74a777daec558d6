"""Sessions, by SGLang's calls and as a resource."""

import pytest

from sessile.contract.messages import OpenSession
from tests.http.conftest import Running
from tests.http.fake_engine import EOS


def opened(server: Running, **fields: object) -> str:
    reply = server.client.post("/open_session", json={"capacity_of_str_len": 1000, "streaming": True, **fields})
    assert reply.status_code == 200, reply.text
    session: str = reply.json()
    return session


def message_of(reply) -> str:
    body = reply.json()
    assert set(body) == {"error"}
    return body["error"]["message"]


def test_open_session_answers_a_bare_string(server: Running) -> None:
    session = opened(server)
    assert isinstance(session, str)
    assert len(session) == 32


def test_ids_differ_and_can_be_chosen(server: Running) -> None:
    assert opened(server) != opened(server)
    assert opened(server, session_id="chosen-1") == "chosen-1"


def test_an_open_id_is_refused_once_more(server: Running) -> None:
    opened(server, session_id="dup")
    reply = server.client.post(
        "/open_session", json={"capacity_of_str_len": 0, "streaming": True, "session_id": "dup"}
    )
    assert reply.status_code == 400
    assert "dup" in message_of(reply)


@pytest.mark.parametrize(
    ("fields", "branching"), [({}, True), ({"streaming": False}, True), ({"streaming": True}, False)]
)
def test_a_session_that_is_not_streaming_is_branching(server: Running, fields: dict, branching: bool) -> None:
    assert server.client.post("/open_session", json={"capacity_of_str_len": 0, **fields}).status_code == 200
    assert [message.branching for message in server.engine.received if isinstance(message, OpenSession)] == [branching]


def test_the_timeout_is_the_sessions_idle_timeout(server: Running) -> None:
    session = opened(server, timeout=2.5)
    assert server.client.get(f"/v1/sessions/{session}").json()["idle_timeout_s"] == 2.5


def test_a_second_turn_sends_only_what_is_new(server: Running) -> None:
    session = {"id": opened(server)}
    server.generate("hi", session_params=session)
    meta = server.generate("yo", session_params=session).json()["meta_info"]
    assert meta["prompt_tokens"] == 5 + 2
    assert meta["cached_tokens"] == 4
    assert meta["session_tokens"] == 10
    assert len(server.engine.submits()[-1].tokens) == 2 * 4


def test_the_sessions_rid_is_ignored(server: Running) -> None:
    reply = server.generate("hi", session_params={"id": opened(server), "rid": "whatever"})
    assert reply.status_code == 200


def test_an_empty_turn_is_left_to_the_session(server: Running) -> None:
    session = {"id": opened(server)}
    server.generate("hi", session_params=session)
    reply = server.client.post("/generate", json={"input_ids": [], "session_params": session})
    assert reply.json()["output_ids"] == [EOS]


def test_a_turn_of_an_unknown_session_is_400(server: Running) -> None:
    reply = server.generate(session_params={"id": "nobody"})
    assert reply.status_code == 400
    assert "nobody" in message_of(reply)


def test_a_busy_session_is_400_and_its_turn_goes_on(server: Running) -> None:
    session = opened(server)
    server.engine.pause()
    with server.in_background("hi", session_params={"id": session}) as first:
        reply = server.generate("yo", session_params={"id": session})
        assert reply.status_code == 400
        assert "already has an active request" in message_of(reply)
        server.engine.resume()
        assert first.result().json()["text"] == "hi"


def test_a_refused_turn_on_a_stream_is_one_abort_event(server: Running) -> None:
    reply = server.generate(stream=True, session_params={"id": "nobody"})
    assert reply.status_code == 200
    first, last = (line for line in reply.text.split("\n\n") if line)
    assert '"type":"abort"' in first
    assert '"status_code":400' in first
    assert last == "data: [DONE]"


def test_close_session_is_idempotent_and_answers_nothing(server: Running) -> None:
    session = opened(server)
    for _ in range(2):
        reply = server.client.post("/close_session", json={"session_id": session})
        assert (reply.status_code, reply.content) == (200, b"")
    assert server.generate(session_params={"id": session}).status_code == 400


def test_a_session_is_a_resource(server: Running) -> None:
    created = server.client.post(
        "/v1/sessions", json={"id": "r1", "idle_timeout_s": 60, "max_tokens": 100, "metadata": {"user": "7"}}
    ).json()
    assert created["object"] == "session"
    assert (created["id"], created["phase"], created["tokens"]) == ("r1", "idle", 0)
    assert (created["idle_timeout_s"], created["tokens_max"], created["metadata"]) == (60, 100, {"user": "7"})
    server.generate("hi", session_params={"id": "r1"})
    assert server.client.get("/v1/sessions/r1").json()["kv_tokens"] == 4
    assert server.client.get("/v1/sessions/r1/tokens").json() == {"id": "r1", "tokens": [*b"hi", *b"hi", EOS]}
    deleted = server.client.delete("/v1/sessions/r1").json()
    assert (deleted["closed"], deleted["deferred"]) == (True, False)
    assert server.client.get("/v1/sessions/r1").status_code == 404


def test_the_list_of_sessions_comes_in_pages(server: Running) -> None:
    for name in ("page-1", "page-2", "page-3"):
        opened(server, session_id=name)
    first = server.client.get("/v1/sessions", params={"after": "page-0", "limit": 2}).json()
    assert [session["id"] for session in first["data"]] == ["page-1", "page-2"]
    assert first["has_more"] is True
    second = server.client.get("/v1/sessions", params={"after": "page-2", "limit": 1}).json()
    assert [session["id"] for session in second["data"]] == ["page-3"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/v1/sessions/nobody", None, 404, "not_found", None),
        ("GET", "/v1/sessions/nobody/tokens", None, 404, "not_found", None),
        ("DELETE", "/v1/sessions/nobody", None, 404, "not_found", None),
        ("POST", "/v1/sessions", {"id": "a/b"}, 422, "invalid_request", "id"),
        ("POST", "/v1/sessions", {"idle_timeout_s": 0}, 422, "invalid_request", "idle_timeout_s"),
        ("POST", "/v1/sessions", {"max_tokens": -1}, 422, "invalid_request", "max_tokens"),
        ("POST", "/v1/sessions", {"metadata": {"a": 1}}, 422, "invalid_request", "metadata.a"),
        ("POST", "/v1/sessions", {"reserve_tokens": -1}, 422, "invalid_request", "reserve_tokens"),
        ("POST", "/v1/sessions", {"branching": 1}, 422, "invalid_request", "branching"),
        ("POST", "/v1/sessions", {"id": "x" * 10_000}, 422, "invalid_request", "id"),
        ("GET", f"/v1/sessions/{'x' * 10_000}", None, 422, "invalid_request", "session"),
        ("DELETE", "/v1/sessions/a%2Fb", None, 404, "not_found", None),
        ("GET", "/v1/sessions/a/b", None, 404, "not_found", None),
        ("POST", "/v1/sessions", {"colour": "red"}, 422, "invalid_request", "colour"),
        ("GET", "/v1/sessions?limit=0", None, 422, "invalid_request", "limit"),
        ("POST", "/v1/sessions/x/append", {}, 422, "invalid_request", "text"),
        ("POST", "/v1/sessions/x/append", {"text": "a", "input_ids": [1]}, 422, "invalid_request", "text"),
        ("POST", "/v1/sessions/x/append", {"text": "a"}, 404, "not_found", None),
        ("POST", "/v1/sessions/x/fork", {}, 404, "not_found", None),
        ("POST", "/v1/sessions/x/fork", {"at_tokens": -1}, 422, "invalid_request", "at_tokens"),
        ("POST", "/v1/sessions/x/rewind", {"to_turn": "first"}, 422, "invalid_request", "to_turn"),
    ],
)
def test_errors_of_resources_have_one_shape(
    server: Running, method: str, path: str, body: dict | None, status: int, code: str, param: str | None
) -> None:
    reply = server.client.request(method, path, json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert (error["code"], error["param"]) == (code, param)


def test_a_duplicate_resource_is_a_conflict(server: Running) -> None:
    server.client.post("/v1/sessions", json={"id": "once"})
    reply = server.client.post("/v1/sessions", json={"id": "once"})
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "duplicate_session"
    assert reply.json()["error"]["param"] == "id"
