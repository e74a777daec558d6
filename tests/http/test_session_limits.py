"""Sessions at their edges, on the real core: closing while busy, timers, caps, reservations, floods, bad input."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx
import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import CONTEXT_TOKENS, ToyEngine

PAGES = 400
PAGE_TOKENS = 4


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=PAGES, sessions_max=40, queue_max=2, rows_max=2)) as running:
        yield running


@pytest.fixture(autouse=True)
def _closed_afterwards(toy: Running) -> Iterator[None]:
    """No session of one test is in the way of another."""
    yield
    toy.engine.device.step_s = 0.0
    for session in toy.client.get("/v1/sessions", params={"limit": 1000}).json()["data"]:
        toy.client.delete(f"/v1/sessions/{session['id']}")


def opened(toy: Running, **fields: object) -> str:
    reply = toy.client.post("/v1/sessions", json=fields)
    assert reply.status_code == 200, reply.text
    name: str = reply.json()["id"]
    return name


def turn(toy: Running, session: str | None, ids: list[int], new_tokens: int = 4, **body: object) -> httpx.Response:
    params = {"session_params": {"id": session}} if session else {}
    sampling = {"max_new_tokens": new_tokens, "temperature": 0}
    return toy.client.post("/generate", json={"input_ids": ids, "sampling_params": sampling} | params | body)


def view(toy: Running, session: str) -> dict:
    return toy.client.get(f"/v1/sessions/{session}").json()


@contextmanager
def busy(toy: Running, session: str | None, rid: str = "busy") -> Iterator["Future[httpx.Response]"]:
    """A turn that runs until the body is left; its reply."""
    toy.engine.device.step_s = 0.01
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(turn, toy, session, [1, 2], 400, rid=rid)
        toy.wait_until(lambda: ("", rid) in toy.service.keys_by_rid)
        if session:
            toy.wait_until(lambda: view(toy, session)["phase"] == "running")
        yield reply
        toy.engine.device.step_s = 0.0


# -- closing --------------------------------------------------------------------------------------------------------


def test_h23_a_busy_session_is_deleted_when_its_turn_ends(toy: Running) -> None:
    session = opened(toy)
    with busy(toy, session) as running:
        deleted = toy.client.delete(f"/v1/sessions/{session}").json()
        assert (deleted["closed"], deleted["deferred"]) == (False, True)
        assert view(toy, session)["phase"] == "closing"
        refused = turn(toy, session, [3])
        assert (refused.status_code, "close was requested" in refused.json()["error"]["message"]) == (400, True)
        for route, body in (("fork", {}), ("rewind", {"to_tokens": 0}), ("append", {"input_ids": [1]})):
            gone = toy.client.post(f"/v1/sessions/{session}/{route}", json=body)
            assert (gone.status_code, gone.json()["error"]["code"]) == (410, "session_closed")
        toy.engine.device.step_s = 0.0
        assert running.result().json()["meta_info"]["finish_reason"]["type"] == "length"
    toy.wait_until(lambda: toy.client.get(f"/v1/sessions/{session}").status_code == 404)


@pytest.mark.parametrize("route", ["fork", "rewind", "append"])
def test_a_busy_session_cannot_be_forked_rewound_or_appended_to(toy: Running, route: str) -> None:
    session = opened(toy)
    body = {"fork": {}, "rewind": {"to_tokens": 0}, "append": {"input_ids": [1]}}[route]
    with busy(toy, session) as running:
        reply = toy.client.post(f"/v1/sessions/{session}/{route}", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "session_busy")
        toy.engine.device.step_s = 0.0
        assert running.result().json()["meta_info"]["session_tokens"] == 402


def test_h27_h33_a_turn_whose_client_leaves_gives_the_session_back_as_it_was(toy: Running) -> None:
    session = opened(toy)
    turn(toy, session, [1, 2])
    before = view(toy, session)
    toy.engine.device.step_s = 0.01
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{toy.url}/generate", timeout=httpx.Timeout(5, read=0.005 if stream else 0.1),
                json={"input_ids": [3], "session_params": {"id": session}, "stream": False,
                      "sampling_params": {"max_new_tokens": 400}},
            )  # fmt: skip
        toy.wait_until(lambda: view(toy, session)["phase"] == "idle")
    toy.engine.device.step_s = 0.0
    after = view(toy, session)
    assert (after["tokens"], after["turns"]) == (before["tokens"], before["turns"])
    assert turn(toy, session, [3]).status_code == 200


def test_h33_a_queued_turn_that_is_aborted_gives_the_session_back(toy: Running) -> None:
    session = opened(toy)
    with busy(toy, None, "a"), busy(toy, None, "b"), ThreadPoolExecutor(1) as pool:  # both rows
        waiting = pool.submit(turn, toy, session, [1], rid="waits")
        toy.wait_until(lambda: view(toy, session)["phase"] == "queued")
        toy.client.post("/abort_request", json={"rid": "waits"})
        assert waiting.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert (view(toy, session)["phase"], view(toy, session)["turns"]) == ("idle", 0)
        toy.client.post("/abort_request", json={"abort_all": True})
    assert turn(toy, session, [1]).status_code == 200


# -- timers ---------------------------------------------------------------------------------------------------------


def test_an_idle_session_expires(toy: Running) -> None:
    session = opened(toy, idle_timeout_s=0.1)
    toy.wait_until(lambda: toy.client.get(f"/v1/sessions/{session}").status_code == 404)
    assert turn(toy, session, [1]).status_code == 400


def test_h40_what_is_refused_changes_nothing_and_is_no_use(toy: Running) -> None:
    session = opened(toy, idle_timeout_s=600)
    turn(toy, session, [1, 2])
    before = view(toy, session)
    attempts = [
        ("/generate", {"input_ids": [1], "session_params": {"id": session, "expect_tokens": 1}}, 409),
        ("/generate", {"input_ids": [1], "session_params": {"id": session, "offset": 3}}, 400),
        ("/generate", {"input_ids": [1] * CONTEXT_TOKENS, "session_params": {"id": session}}, 400),
        (f"/v1/sessions/{session}/rewind", {"to_tokens": 1000}, 422),
        (f"/v1/sessions/{session}/fork", {"at_turn": 9}, 422),
        (f"/v1/sessions/{session}/append", {"input_ids": [1] * CONTEXT_TOKENS}, 413),
    ]
    for path, body, status in attempts:
        assert toy.client.post(path, json=body).status_code == status
        assert view(toy, session) == before


def test_h40_what_is_refused_does_not_keep_a_session_alive(toy: Running) -> None:
    session = opened(toy, idle_timeout_s=0.5)
    turn(toy, session, [1, 2])
    deadline_s = time.monotonic() + 5
    while toy.client.get(f"/v1/sessions/{session}").status_code == 200:
        assert time.monotonic() < deadline_s, "refused turns kept it alive"
        assert turn(toy, session, [1], session_params={"id": session, "expect_tokens": 1}).status_code in (400, 409)


def test_h41_a_turn_longer_than_the_idle_timeout_ends_and_the_timer_starts_then(toy: Running) -> None:
    session = opened(toy, idle_timeout_s=0.3)
    toy.engine.device.step_s = 0.01
    reply = turn(toy, session, [1, 2], 60)
    toy.engine.device.step_s = 0.0
    assert reply.json()["meta_info"]["e2e_latency"] > 0.3
    assert view(toy, session)["turns"] == 1
    toy.wait_until(lambda: toy.client.get(f"/v1/sessions/{session}").status_code == 404)


# -- lengths --------------------------------------------------------------------------------------------------------


def test_h36_h39_a_session_grows_to_its_cap_and_not_beyond(toy: Running) -> None:
    session = opened(toy, max_tokens=20)
    first = turn(toy, session, [1] * 10, 100).json()["meta_info"]
    assert (first["finish_reason"], first["session_tokens"]) == ({"type": "length", "length": 10}, 20)
    before = view(toy, session)
    refused = turn(toy, session, [])
    assert (refused.status_code, "context length" in refused.json()["error"]["message"]) == (400, True)
    assert view(toy, session) == before
    toy.client.post(f"/v1/sessions/{session}/rewind", json={"to_tokens": 10})
    assert turn(toy, session, [5] * 9, 100).json()["meta_info"]["session_tokens"] == 20
    toy.client.post(f"/v1/sessions/{session}/rewind", json={"to_tokens": 10})
    assert turn(toy, session, [5] * 10).status_code == 400, "one token over"


def test_h39_a_turn_may_be_empty_and_may_say_nothing(toy: Running) -> None:
    session = opened(toy)
    assert turn(toy, session, []).status_code == 400, "without history there is nothing to go on from"
    assert turn(toy, session, [1, 2], 0).json()["meta_info"]["session_tokens"] == 2
    said = turn(toy, session, []).json()
    assert said["output_ids"] == turn(toy, None, [1, 2]).json()["output_ids"]
    assert turn(toy, session, [], 0).json()["meta_info"]["session_tokens"] == 6


def test_a_turn_may_leave_its_input_out(toy: Running) -> None:
    session = opened(toy)
    body = {"session_params": {"id": session}, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    refused = toy.client.post("/generate", json=body)
    assert (refused.status_code, refused.json()) == (400, turn(toy, session, []).json())
    turn(toy, session, [1, 2], 0)
    said = toy.client.post("/generate", json=body).json()
    assert said["output_ids"] == turn(toy, None, [1, 2]).json()["output_ids"]
    assert said["meta_info"]["session_tokens"] == 6


@pytest.mark.parametrize("max_tokens", [1, CONTEXT_TOKENS + 1, 1 << 31])
def test_a_cap_that_no_session_can_have_is_422(toy: Running, max_tokens: int) -> None:
    reply = toy.client.post("/v1/sessions", json={"max_tokens": max_tokens})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "max_tokens")


# -- floods ---------------------------------------------------------------------------------------------------------


def test_h43_a_flood_of_opens_is_refused_with_429_and_leaves_room_for_others_work(toy: Running) -> None:
    replies = [toy.client.post("/v1/sessions", json={}) for _ in range(100)]
    refused = [reply for reply in replies if reply.status_code != 200]
    assert len(refused) == 60
    for reply in refused:
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert "40 sessions and branches are open, which is the limit" in reply.json()["error"]["message"]
    assert turn(toy, None, [1, 2]).status_code == 200


def test_h43_turns_of_a_branching_session_count_as_well(toy: Running) -> None:
    tree = toy.client.post("/open_session", json={"capacity_of_str_len": 0}).json()
    statuses = [turn(toy, tree, [1], 1).status_code for _ in range(50)]
    assert statuses == [200] * 39 + [429] * 11


def test_a_full_queue_is_429_with_a_time_to_come_back(toy: Running) -> None:
    toy.engine.device.step_s = 0.01
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda each: turn(toy, None, [each], 50), range(12)))
    refused = [reply for reply in replies if reply.status_code != 200]
    assert {reply.status_code for reply in refused} == {429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    # The engine says so of its line; who comes while all that it could take is on its way is not even read.
    said = {reply.json()["error"]["message"].partition(" requests are ")[2] for reply in refused}
    assert said <= {f"{state}, which is the limit: try again later" for state in ("waiting", "running or waiting")}


# -- reservations ---------------------------------------------------------------------------------------------------


def test_a_reservation_is_shown_and_given_back(toy: Running) -> None:
    session = opened(toy, reserve_tokens=100)
    assert view(toy, session)["reserved_tokens"] == 100
    metrics = toy.client.get("/metrics").text
    assert 'sessile_reserved_pages{model_name="toy"} 25.0' in metrics
    toy.client.delete(f"/v1/sessions/{session}")
    assert 'sessile_reserved_pages{model_name="toy"} 0.0' in toy.client.get("/metrics").text


def test_a_reserved_session_keeps_its_kv_through_whatever_others_do(toy: Running) -> None:
    kept, other = opened(toy, reserve_tokens=200), opened(toy)
    for session in (kept, other):
        turn(toy, session, [7] * 90)
    for base in range(12):
        turn(toy, None, [base, *range(200)] * 2)
    assert view(toy, kept)["kv_tokens"] == 93
    assert turn(toy, kept, [8]).json()["meta_info"]["cached_tokens"] == 93
    assert turn(toy, other, [8]).json()["meta_info"]["cached_tokens"] < 93


def test_h68_reservations_leave_room_for_the_longest_request(toy: Running) -> None:
    room = (PAGES - 1) * PAGE_TOKENS - CONTEXT_TOKENS
    left = room - 8 - 2 * CONTEXT_TOKENS
    sessions = [opened(toy, reserve_tokens=tokens) for tokens in (CONTEXT_TOKENS, CONTEXT_TOKENS, left)]
    reply = toy.client.post("/v1/sessions", json={"reserve_tokens": 100})
    assert reply.status_code == 429
    assert "tokens cannot be reserved" in reply.json()["error"]["message"]
    assert turn(toy, None, [1] * (CONTEXT_TOKENS - 10), 10).status_code == 200
    toy.client.delete(f"/v1/sessions/{sessions[0]}")
    assert opened(toy, reserve_tokens=100)


def test_no_more_is_reserved_than_the_session_can_have(toy: Running) -> None:
    for body, most in (({}, CONTEXT_TOKENS), ({"max_tokens": 100}, 100)):
        reply = toy.client.post("/v1/sessions", json={"reserve_tokens": most + 1, **body})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (422, "reserve_tokens")
        assert error["message"] == f"reserve_tokens must be at most {most}, the most tokens that this session can have"


def test_a_branching_session_reserves_nothing(toy: Running) -> None:
    reply = toy.client.post("/v1/sessions", json={"reserve_tokens": 10, "branching": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "reserve_tokens")


# -- figures --------------------------------------------------------------------------------------------------------


def test_metrics_show_sessions_by_phase_and_why_tokens_were_computed_again(toy: Running) -> None:
    session = opened(toy)
    turn(toy, session, [1, 2, 3])
    toy.client.post("/flush_cache")
    turn(toy, session, [4])
    with busy(toy, session):
        text = toy.client.get("/metrics").text
        toy.client.post("/abort_request", json={"rid": "busy"})
    assert 'sessile_sessions{model_name="toy",phase="running"} 1.0' in text
    assert 'sessile_sessions{model_name="toy",phase="idle"} 0.0' in text
    again = next(line for line in text.splitlines() if 'cause="reclaimed"' in line)
    assert float(again.split()[-1]) >= 6
