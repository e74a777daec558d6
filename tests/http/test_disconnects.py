"""Clients that leave, lag or abort, and an engine that dies: each request ends once, and for everyone."""

import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sessile.contract.messages import Done
from tests.http.conftest import PATIENCE_S, Running, running_server

LONG = b'{"text": "a", "sampling_params": {"ignore_eos": true, "max_new_tokens": null}, "stream": %s}'


@pytest.fixture
def own_server() -> Iterator[Running]:
    with running_server(stream_lag_tokens_max=200) as running:
        yield running


def connect(server: Running, *, stream: bool) -> socket.socket:
    """A client that has sent a long request; returns once the engine has it."""
    before = len(server.engine.submits())
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE_S)
    content = LONG % (b"true" if stream else b"false")
    client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content))
    server.wait_until(lambda: len(server.engine.submits()) > before)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_h27_a_client_that_leaves_ends_its_request(server: Running, stream: bool) -> None:
    server.engine.token_interval_s = 0.005
    client = connect(server, stream=stream)
    key = server.engine.submits()[-1].key
    client.close()
    server.wait_until(lambda: server.engine.running == 0)
    assert [cancel.key for cancel in server.engine.cancels()] == [key]
    server.wait_until(lambda: not server.service.keys_by_rid)  # what the engine says has to come back


def test_the_log_says_what_a_client_that_left_had_got(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    server.engine.token_interval_s = 0.005
    with caplog.at_level(logging.INFO, "sessile.server.calls"):
        with connect(server, stream=True) as client:
            received = b""
            while b'"completion_tokens":1' not in received:
                received += client.recv(4096)
        server.wait_until(lambda: bool(caplog.records))
    line = vars(caplog.records[0])
    assert (line["reason"], line["status"]) == ("disconnect", 499)
    assert line["completion_tokens"] >= 1


def test_h34_a_client_that_leaves_before_its_request_ran_ends_it_too(server: Running) -> None:
    server.engine.pause()
    connect(server, stream=True).close()
    server.wait_until(lambda: server.service.link.in_flight == server.engine.running == 0)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_server(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="sessile")
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)
    client.sendall(b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{"text": ')
    client.close()
    server.wait_until(lambda: "disconnected" in caplog.messages)
    assert server.client.get("/health").status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_turn_whose_client_left_leaves_the_session_as_it_was(server: Running) -> None:
    server.client.post("/v1/sessions", json={"id": "left"})
    server.generate("hi", session_params={"id": "left"})
    server.engine.pause()
    turn = server.in_background("yo", session_params={"id": "left"}, timeout_s=0.2)
    with pytest.raises(httpx.ReadTimeout), turn as reply:
        reply.result()
    server.wait_until(lambda: server.engine.running == 0)
    assert server.client.get("/v1/sessions/left").json()["tokens"] == 5
    server.engine.resume()
    assert server.generate("yo", session_params={"id": "left"}).status_code == 200


def test_abort_request_ends_one_request_with_its_text_so_far(server: Running) -> None:
    server.engine.pause()
    with server.in_background("first", rid="one") as first, server.in_background("second", rid="two") as second:
        assert server.client.post("/abort_request", json={"rid": "one"}).status_code == 200
        body = first.result().json()
        assert body["meta_info"]["finish_reason"]["type"] == "abort"
        server.engine.resume()
        assert second.result().json()["text"] == "second"


def test_an_aborted_stream_ends_with_an_abort(server: Running) -> None:
    server.engine.pause()
    with server.in_background(rid="streamed", stream=True) as reply:
        server.client.post("/abort_request", json={"rid": "streamed"})
        first, last = (line for line in reply.result().text.split("\n\n") if line)
        assert '"type":"abort"' in first
        assert last == "data: [DONE]"


def test_rids_are_matched_exactly_and_unknown_ones_are_no_error(server: Running) -> None:
    server.engine.pause()
    with server.in_background(rid="abc") as reply:
        assert server.client.post("/abort_request", json={"rid": "ab"}).status_code == 200
        server.engine.resume()
        assert reply.result().json()["text"] == "hello"


def test_abort_all_ends_everything(server: Running) -> None:
    server.engine.pause()
    with server.in_background("first") as first, server.in_background("second") as second:
        assert server.client.post("/abort_request", json={"abort_all": True}).status_code == 200
        reasons = {reply.result().json()["meta_info"]["finish_reason"]["type"] for reply in (first, second)}
    assert reasons == {"abort"}


def test_h53_a_stream_that_is_not_read_is_ended_before_its_buffer_grows(own_server: Running) -> None:
    own_server.engine.script = [ord("x")] * 100_000
    client = connect(own_server, stream=True)
    # Cumulative text fills the socket's buffers soon; from then on tokens wait in the server.
    own_server.wait_until(lambda: bool(own_server.engine.cancels()))
    assert own_server.engine.cancels()[0].message.startswith("the client reads too slowly: over 200 tokens")
    client.close()


def test_the_engines_death_is_an_error_for_everyone_at_once(own_server: Running) -> None:
    own_server.engine.pause()
    with own_server.in_background("whole") as whole, own_server.in_background("streamed", stream=True) as streamed:
        own_server.engine.fail("out of memory")
        assert whole.result().status_code == 503
        assert "out of memory" in whole.result().json()["error"]["message"]
        assert '"status_code":503' in streamed.result().text
    for path in ("/generate", "/open_session"):
        body = {"text": "a"} if path == "/generate" else {"capacity_of_str_len": 1, "streaming": True}
        reply = own_server.client.post(path, json=body)
        assert reply.status_code == 503
        assert "out of memory" in reply.json()["error"]["message"]
    assert own_server.client.get("/health").status_code == 503
    assert "sessile_engine_up{" in own_server.client.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "ab", "sampling_params": {"n": 3}}),
        ("/v1/completions", {"prompt": "ab", "n": 3}),
        ("/v1/completions", {"prompt": "ab", "n": 3, "stream": True}),
    ],
)
def test_answers_that_are_given_up_because_another_one_failed_are_no_disconnects(
    server: Running, path: str, body: dict[str, Any]
) -> None:
    before = dict(server.service.metrics.ended)
    server.engine.refusals.append(Done(key=0, reason="error", status=429, code="limit_reached", message="too much"))
    server.engine.token_interval_s = 0.02
    server.client.post(path, json=body)
    server.wait_until(lambda: server.service.link.in_flight == server.engine.running == 0)
    ended = server.service.metrics.ended
    fresh = {reason: count - before.get(reason, 0) for reason, count in ended.items() if count > before.get(reason, 0)}
    assert fresh == {"error": 1, "abort": 2}
    assert {cancel.message for cancel in server.engine.cancels()} <= {"another answer to the same prompt failed"}


def test_answers_that_are_not_even_sent_because_one_cannot_be_are_no_disconnects(server: Running) -> None:
    before = dict(server.service.metrics.ended)
    server.engine.pause()
    with server.in_background(rid="name-1", sampling_params={"max_new_tokens": 4, "ignore_eos": True}):
        server.wait_until(lambda: server.service.link.in_flight == 1)
        refused = server.generate(rid="name", sampling_params={"n": 2})
        assert refused.status_code == 400
        server.engine.resume()
    assert server.service.metrics.ended.get("disconnect", 0) == before.get("disconnect", 0)
