"""Append, fork, rewind and expect_tokens over HTTP, on the real core: outputs are those of fresh prompts."""

from collections.abc import Iterator
from functools import partial

import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=400)) as running:
        yield running


def turn(toy: Running, session: str, ids: list[int], **params: object) -> dict:
    body = {"input_ids": ids, "session_params": {"id": session, **params}}
    reply = toy.client.post("/generate", json=body | {"sampling_params": {"max_new_tokens": 6, "temperature": 0}})
    return {"status": reply.status_code, **reply.json()}


def fresh(toy: Running, ids: list[int]) -> list[int]:
    """What the model says to these tokens when it sees them for the first time, all at once."""
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 6, "temperature": 0}}
    return toy.client.post("/generate", json=body).json()["output_ids"]


def tokens_of(toy: Running, session: str) -> list[int]:
    return toy.client.get(f"/v1/sessions/{session}/tokens").json()["tokens"]


def opened(toy: Running, name: str, turns: int = 2) -> str:
    """A session of this name with some finished turns."""
    assert toy.client.post("/v1/sessions", json={"id": name}).status_code == 200
    for number in range(turns):
        turn(toy, name, list(range(10 + number, 20)))
    return name


def test_an_append_computes_now_and_says_nothing(toy: Running) -> None:
    name = opened(toy, "append", 1)
    before = len(tokens_of(toy, name))
    reply = toy.client.post(f"/v1/sessions/{name}/append", json={"input_ids": [7, 8, 9]})
    assert reply.status_code == 200
    assert (reply.json()["tokens"], reply.json()["appended_tokens"]) == (before + 3, 3)
    history = tokens_of(toy, name)
    answer = turn(toy, name, [5])
    assert answer["meta_info"]["cached_tokens"] == len(history) - 1
    assert answer["output_ids"] == fresh(toy, [*history, 5])


def test_an_append_is_text_as_well(toy: Running) -> None:
    name = opened(toy, "append-text", 0)
    assert toy.client.post(f"/v1/sessions/{name}/append", json={"text": "héllo"}).json()["tokens"] == 6
    assert bytes(tokens_of(toy, name)).decode() == "héllo"


@pytest.mark.parametrize("place", [{}, {"at_tokens": 13}, {"at_turn": 1}])
def test_a_fork_goes_its_own_way(toy: Running, place: dict) -> None:
    name = opened(toy, f"fork-{place}".replace(" ", "").translate(str.maketrans("{}':", "....")))
    reply = toy.client.post(f"/v1/sessions/{name}/fork", json=place)
    assert reply.status_code == 200
    child, length = reply.json()["id"], reply.json()["tokens"]
    history = tokens_of(toy, name)
    assert tokens_of(toy, child) == history[:length]
    assert turn(toy, child, [99])["output_ids"] == fresh(toy, [*history[:length], 99])
    assert turn(toy, name, [98])["output_ids"] == fresh(toy, [*history, 98])


def test_a_rewound_session_forgets_what_came_after(toy: Running) -> None:
    name = opened(toy, "rewind")
    history = tokens_of(toy, name)
    reply = toy.client.post(f"/v1/sessions/{name}/rewind", json={"to_tokens": 11})
    assert (reply.status_code, reply.json()["tokens"], reply.json()["kv_tokens"]) == (200, 11, 10)
    assert turn(toy, name, [1, 2])["output_ids"] == fresh(toy, [*history[:11], 1, 2])


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("fork", {"at_tokens": 1000}, "at_tokens"),
        ("fork", {"at_turn": 3}, "at_turn"),
        ("fork", {"at_turn": 1, "at_tokens": 1}, "at_turn"),
        ("rewind", {"to_tokens": 1000}, "to_tokens"),
        ("rewind", {}, "to_tokens"),
    ],
)
def test_a_place_that_is_not_there_is_422_and_changes_nothing(
    toy: Running, route: str, body: dict, param: str
) -> None:
    name = f"place-{route}-{'-'.join(body)}-{sum(body.values())}"
    opened(toy, name)
    before = toy.client.get(f"/v1/sessions/{name}").json()
    reply = toy.client.post(f"/v1/sessions/{name}/{route}", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert toy.client.get(f"/v1/sessions/{name}").json() == before


def test_a_history_that_differs_from_what_the_client_expects_is_409_and_says_its_length(toy: Running) -> None:
    name = opened(toy, "expect", 1)
    length = len(tokens_of(toy, name))
    refused = turn(toy, name, [1], expect_tokens=length - 1)
    assert refused["status"] == 409 and f"has {length} tokens, not {length - 1}" in refused["error"]["message"]
    assert len(tokens_of(toy, name)) == length
    assert turn(toy, name, [1], expect_tokens=length)["status"] == 200


def test_a_refused_append_names_the_field_that_was_sent(toy: Running) -> None:
    name = opened(toy, "named", 1)
    bodies = {"text": "x" * 5000, "input_ids": [1] * 5000}
    for field, value in bodies.items():
        reply = toy.client.post(f"/v1/sessions/{name}/append", json={field: value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (413, field)
    reply = toy.client.post(f"/v1/sessions/{name}/append", json={"text": "x", "expect_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (409, "expect_tokens")


def test_a_fork_to_a_name_that_is_taken_is_a_conflict(toy: Running) -> None:
    name = opened(toy, "taken", 1)
    reply = toy.client.post(f"/v1/sessions/{name}/fork", json={"id": name})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "duplicate_session")
