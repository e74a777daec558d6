"""A reply that was lost: the same turn sent again, by the same rid, says the same and changes nothing (H59)."""

import json
from collections.abc import Iterator
from functools import partial

import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=600), stream_lag_tokens_max=8) as running:
        yield running


@pytest.fixture
def session(toy: Running) -> str:
    return toy.client.post("/v1/sessions", json={}).json()["id"]


def body_of(session: str, ids: list[int], rid: str | None, **fields: object) -> dict:
    named = {"rid": rid} if rid else {}
    sampling = {"max_new_tokens": 20, "temperature": 1, "seed": 5}
    return {"input_ids": ids, "session_params": {"id": session}, "sampling_params": sampling} | named | fields


def whole(toy: Running, body: dict) -> dict:
    """The reply, without what differs from one saying to the next."""
    reply = toy.client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    said = reply.json()
    del said["meta_info"]["e2e_latency"]
    return said


def streamed(toy: Running, body: dict) -> dict:
    """The last event of a stream, likewise."""
    lines = [line for line in toy.client.post("/generate", json=body | {"stream": True}).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    said = json.loads(lines[-2].removeprefix("data: "))
    del said["meta_info"]["e2e_latency"]
    return said


def view(toy: Running, session: str) -> dict:
    return toy.client.get(f"/v1/sessions/{session}").json()


SCORES = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}


@pytest.mark.parametrize("fields", [{}, SCORES], ids=["plain", "logprobs"])
def test_h59_the_same_rid_says_the_same_and_changes_nothing(toy: Running, session: str, fields: dict) -> None:
    body = body_of(session, [1, 2, 3], "first", **fields)
    said, before = whole(toy, body), view(toy, session)
    assert whole(toy, body) == said
    assert whole(toy, body) == said
    assert view(toy, session) == before
    assert before["turns"] == 1


@pytest.mark.parametrize("fields", [{}, SCORES], ids=["plain", "logprobs"])
def test_h59_a_lost_stream_is_said_again_at_once(toy: Running, session: str, fields: dict) -> None:
    body = body_of(session, [1, 2, 3], "first", **fields)
    said, before = whole(toy, body), view(toy, session)
    assert streamed(toy, body) == said, "20 tokens at once are no lag, though 8 is the most that may wait"
    assert view(toy, session) == before


def test_h59_a_retry_is_known_though_the_history_has_grown_by_the_turn_itself(toy: Running, session: str) -> None:
    body = body_of(session, [1, 2, 3], "first", session_params={"id": session, "expect_tokens": 0})
    assert whole(toy, body) == whole(toy, body)
    other = body_of(session, [1, 2, 3], "second", session_params={"id": session, "expect_tokens": 0})
    assert toy.client.post("/generate", json=other).status_code == 409


def test_another_input_under_the_same_rid_is_refused(toy: Running, session: str) -> None:
    whole(toy, body_of(session, [1, 2, 3], "first"))
    before = view(toy, session)
    reply = toy.client.post("/generate", json=body_of(session, [1, 2], "first"))
    assert (reply.status_code, "had another input" in reply.json()["error"]["message"]) == (400, True)
    assert view(toy, session) == before


def test_only_the_last_turn_is_said_again(toy: Running, session: str) -> None:
    whole(toy, body_of(session, [1], "first"))
    whole(toy, body_of(session, [2], "second"))
    whole(toy, body_of(session, [1], "first"))
    assert view(toy, session)["turns"] == 3


def test_turns_without_a_rid_are_never_mistaken_for_a_retry(toy: Running, session: str) -> None:
    for _ in range(2):
        whole(toy, body_of(session, [1], None))
    assert view(toy, session)["turns"] == 2
    assert toy.engine.machine._books.sessions["", session].reply is None, "a reply that nobody can ask for is not kept"


def test_a_turn_that_was_rolled_back_runs_when_it_is_sent_again(toy: Running, session: str) -> None:
    toy.engine.device.step_s = 0.01
    body = body_of(session, [1, 2], "retried", sampling_params={"max_new_tokens": 300})
    try:
        with toy.client.stream("POST", "/generate", json=body | {"stream": True}) as stream:
            next(stream.iter_lines())
    finally:
        toy.engine.device.step_s = 0.0
    toy.wait_until(lambda: view(toy, session)["phase"] == "idle")
    assert view(toy, session)["turns"] == 0
    whole(toy, body_of(session, [1, 2], "retried"))
    assert view(toy, session)["turns"] == 1


def test_replays_are_counted(toy: Running, session: str) -> None:
    def replayed() -> int:
        lines = toy.client.get("/metrics").text.splitlines()
        return int(float(next(line for line in lines if line.startswith("sessile_turns_replayed_total")).split()[-1]))

    before = replayed()
    for _ in range(3):
        whole(toy, body_of(session, [1], "counted"))
    assert replayed() == before + 2
