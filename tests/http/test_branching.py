"""Branching sessions as SGLang has them, on the real core: each answer is that of a fresh prompt of the same tokens."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine

ROOT_INPUT = list(range(20, 40))


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=600)) as running:
        yield running


@pytest.fixture
def tree(toy: Running) -> Iterator[str]:
    """A branching session; fast again and closed afterwards."""
    session: str = toy.client.post("/open_session", json={"capacity_of_str_len": 0}).json()
    yield session
    toy.engine.device.step_s = 0.0
    assert toy.client.post("/close_session", json={"session_id": session}).status_code == 200


def turn(toy: Running, session: str, ids: list[int], *, own: str | None = None, **params: object) -> dict:
    body = {
        "input_ids": ids,
        "session_params": {"id": session, **params},
        "sampling_params": {"max_new_tokens": 6, "temperature": 0},
    }
    reply = toy.client.post("/generate", json=body | ({"rid": own} if own else {}))
    return {"status": reply.status_code, **reply.json()}


def fresh(toy: Running, ids: list[int]) -> list[int]:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 6, "temperature": 0}}
    return toy.client.post("/generate", json=body).json()["output_ids"]


def message_of(reply: dict) -> str:
    assert reply["status"] == 400, reply
    return reply["error"]["message"]


def test_a_turn_without_a_name_gets_one_that_its_reply_shows(toy: Running, tree: str) -> None:
    first = turn(toy, tree, ROOT_INPUT)
    rid = first["meta_info"]["id"]
    second = turn(toy, tree, [7], rid=rid)
    assert second["output_ids"] == fresh(toy, [*ROOT_INPUT, *first["output_ids"], 7])
    assert second["meta_info"]["prompt_tokens"] == len(ROOT_INPUT) + 6 + 1


def test_any_finished_turn_may_be_gone_on_from(toy: Running, tree: str) -> None:
    root = turn(toy, tree, ROOT_INPUT, own="root")
    history = [*ROOT_INPUT, *root["output_ids"]]
    left = turn(toy, tree, [1, 2], own="left", rid="root")
    right = turn(toy, tree, [3], own="right", rid="root")
    assert left["output_ids"] == fresh(toy, [*history, 1, 2])
    assert right["output_ids"] == fresh(toy, [*history, 3])
    deeper = turn(toy, tree, [4], rid="left")
    assert deeper["output_ids"] == fresh(toy, [*history, 1, 2, *left["output_ids"], 4])
    assert deeper["meta_info"]["cached_tokens"] > 0


@pytest.mark.parametrize("parent", [{}, {"rid": None}, {"rid": ""}])
def test_a_turn_without_a_parent_is_a_new_root(toy: Running, tree: str, parent: dict) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    assert turn(toy, tree, [9, 8], **parent)["output_ids"] == fresh(toy, [9, 8])


@pytest.mark.parametrize("offset", [5, -5, 26, -26 + 1])
def test_an_offset_keeps_the_first_tokens_of_the_parents_context(toy: Running, tree: str, offset: int) -> None:
    root = turn(toy, tree, ROOT_INPUT, own="root")
    history = [*ROOT_INPUT, *root["output_ids"]]
    assert turn(toy, tree, [1], rid="root", offset=offset)["output_ids"] == fresh(toy, [*history[:offset], 1])


def test_the_parents_output_can_be_left_out(toy: Running, tree: str) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    answer = turn(toy, tree, [1], rid="root", drop_previous_output=True)
    assert answer["output_ids"] == fresh(toy, [*ROOT_INPUT, 1])


def test_replace_drops_what_else_descends_from_the_parent(toy: Running, tree: str) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    turn(toy, tree, [1], own="old", rid="root")
    assert turn(toy, tree, [2], own="new", rid="root", replace=True)["status"] == 200
    assert "no turn 'old'" in message_of(turn(toy, tree, [3], rid="old"))
    assert turn(toy, tree, [3], rid="new")["status"] == 200


def test_a_parent_that_runs_is_waited_for_or_replaced(toy: Running, tree: str) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    toy.engine.device.step_s = 0.01
    long = {"max_new_tokens": 300, "temperature": 0}
    body = {"rid": "long", "input_ids": [1], "session_params": {"id": tree, "rid": "root"}, "sampling_params": long}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(toy.client.post, "/generate", json=body)
        toy.wait_until(lambda: ("", "long") in toy.service.keys_by_rid)
        refused = message_of(turn(toy, tree, [2], rid="long"))
        assert "has not finished: wait for it, or send replace" in refused
        assert turn(toy, tree, [2], rid="root")["status"] == 200, "a finished turn is gone on from meanwhile"
        assert turn(toy, tree, [2], rid="long", replace=True)["status"] == 200
        ended = running.result().json()["meta_info"]["finish_reason"]
    assert (ended["type"], ended["message"]) == ("abort", "replaced by another turn")


def test_turns_on_a_finished_parent_run_side_by_side(toy: Running, tree: str) -> None:
    root = turn(toy, tree, ROOT_INPUT, own="root")
    history = [*ROOT_INPUT, *root["output_ids"]]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda each: turn(toy, tree, [each], rid="root"), range(6)))
    assert [answer["output_ids"] for answer in answers] == [fresh(toy, [*history, each]) for each in range(6)]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"rid": "nobody"}, "no turn 'nobody': it did not finish, or was replaced"),
        ({"rid": "root", "offset": 27}, "offset must be from -26 to 26, the tokens of turn 'root'"),
        ({"rid": "root", "offset": -27}, "offset must be from -26 to 26"),
        ({"offset": 1}, "offset and drop_previous_output need the rid of a turn"),
        ({"drop_previous_output": True}, "need the rid of a turn"),
    ],
)
def test_a_place_that_is_not_there_is_400_and_changes_nothing(
    toy: Running, tree: str, params: dict, says: str
) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    before = toy.client.get(f"/v1/sessions/{tree}").json()
    assert says in message_of(turn(toy, tree, [1], **params))
    assert toy.client.get(f"/v1/sessions/{tree}").json() == before


def test_a_name_is_given_once(toy: Running, tree: str) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    assert "had another input" in message_of(turn(toy, tree, [1], own="root"))
    turn(toy, tree, [1], own="child", rid="root")
    again = turn(toy, tree, [1], own="child", rid="root")
    assert again["status"] == 200, "the same turn once more is a lost reply, said again"


def test_expect_tokens_is_the_context_that_a_turn_goes_on_from(toy: Running, tree: str) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    refused = turn(toy, tree, [1], rid="root", expect_tokens=25)
    assert refused["status"] == 409 and "has 26 tokens, not 25" in refused["error"]["message"]
    assert turn(toy, tree, [1], rid="root", expect_tokens=26)["status"] == 200


def test_a_turn_that_was_aborted_cannot_be_gone_on_from(toy: Running, tree: str) -> None:
    toy.engine.device.step_s = 0.01
    body = {
        "rid": "gone", "input_ids": [1], "session_params": {"id": tree}, "sampling_params": {"max_new_tokens": 300}
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(toy.client.post, "/generate", json=body)
        toy.wait_until(lambda: ("", "gone") in toy.service.keys_by_rid)
        toy.client.post("/abort_request", json={"rid": "gone"})
        assert running.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert "no turn 'gone'" in message_of(turn(toy, tree, [2], rid="gone"))


@pytest.mark.parametrize(
    ("route", "body"), [("append", {"input_ids": [1]}), ("fork", {}), ("rewind", {"to_tokens": 0}), ("tokens", None)]
)
def test_what_needs_one_line_of_turns_is_refused_and_says_why(
    toy: Running, tree: str, route: str, body: dict | None
) -> None:
    turn(toy, tree, ROOT_INPUT, own="root")
    before = toy.client.get(f"/v1/sessions/{tree}").json()
    reply = toy.client.request("GET" if body is None else "POST", f"/v1/sessions/{tree}/{route}", json=body)
    assert (reply.status_code, "is branching" in reply.json()["error"]["message"]) == (422, True)
    assert toy.client.get(f"/v1/sessions/{tree}").json() == before


def test_a_branching_session_can_be_opened_as_a_resource(toy: Running) -> None:
    view = toy.client.post("/v1/sessions", json={"branching": True}).json()
    assert (view["branching"], view["phase"]) == (True, "idle")
    turn(toy, view["id"], [1], own="a")
    turn(toy, view["id"], [2], own="b")
    assert toy.client.get(f"/v1/sessions/{view['id']}").json()["turns"] == 2
    assert toy.client.delete(f"/v1/sessions/{view['id']}").json()["closed"] is True


@pytest.mark.parametrize("fields", [{"replace": True}, {"drop_previous_output": True}, {"offset": 3}, {"offset": -1}])
def test_what_a_streaming_session_cannot_do_is_refused_and_changes_nothing(toy: Running, fields: dict) -> None:
    session = toy.client.post("/v1/sessions", json={}).json()["id"]
    turn(toy, session, ROOT_INPUT)
    before = toy.client.get(f"/v1/sessions/{session}").json()
    message = message_of(turn(toy, session, [1], **fields))
    assert message.startswith(next(iter(fields))) and "is a streaming session" in message
    assert toy.client.get(f"/v1/sessions/{session}").json() == before
    assert turn(toy, session, [1], rid="whatever", offset=0, replace=False)["status"] == 200
