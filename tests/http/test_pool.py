"""/v1/pool over the real core: every page and row has an owner, at any moment, and they add up."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine

PAGES = 400


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(lambda address: ToyEngine(address, pages=PAGES)) as running:
        yield running


def pool_of(server: Running, **query: Any) -> dict[str, Any]:
    reply = server.client.get("/v1/pool", params=query)
    assert reply.status_code == 200, reply.text
    pool: dict[str, Any] = reply.json()
    pages = pool["pages"]
    assert pages["total"] == PAGES == sum(count for owner, count in pages.items() if owner != "total")
    assert pages["tree"] == sum(pool["tree"].values())
    assert pages["limbo"] == sum(each["pages"] for each in pool["limbo"])
    named = sum(holder["own_pages"] for holder in pool["holders"])
    assert pages["requests"] + pages["sessions"] == named + pool["rest"]["own_pages"]
    assert pool["rows"]["held"] == pool["requests"]["running"] + pool["requests"]["draining"] <= pool["rows"]["total"]
    return pool


def turn(server: Running, session: str, text: str) -> None:
    body = {"text": text, "session_params": {"id": session}, "sampling_params": {"max_new_tokens": 5}}
    reply = server.client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text


def test_a_parked_session_and_the_pages_it_shares_are_shown(server: Running) -> None:
    assert server.client.post("/v1/sessions", json={"id": "kept"}).status_code < 300
    turn(server, "kept", "hello there, pool")
    turn(server, "kept", "and once more, please")
    pool = pool_of(server)
    (holder,) = pool["holders"]
    view = server.client.get("/v1/sessions/kept").json()
    assert (holder["kind"], holder["session"], holder["phase"], holder["row"]) == ("session", "kept", "idle", None)
    assert (holder["own_pages"], holder["shared_pages"]) == (view["own_pages"], view["shared_pages"])
    assert pool["tree"]["parked"] == holder["shared_pages"] > 0
    server.client.delete("/v1/sessions/kept")
    assert pool_of(server)["holders"] == []


def test_holders_beyond_the_number_asked_for_are_summed_up(server: Running) -> None:
    names = [f"many-{index}" for index in range(5)]
    for index, name in enumerate(names):
        server.client.post("/v1/sessions", json={"id": name})
        turn(server, name, "first " + "word " * index)
        turn(server, name, "second " * (index + 1))
    whole, part, none = pool_of(server), pool_of(server, holders=2), pool_of(server, holders=0)
    own = [holder["own_pages"] for holder in whole["holders"]]
    assert own == sorted(own, reverse=True) and len(own) == 5
    assert part["holders"] == whole["holders"][:2]
    assert part["rest"] == {"requests": 0, "sessions": 3, "own_pages": sum(own[2:])}
    assert (none["holders"], none["rest"]["own_pages"]) == ([], sum(own))
    assert none["pages"] == whole["pages"] and whole["pages"]["sessions"] == sum(own)
    for name in names:
        server.client.delete(f"/v1/sessions/{name}")


@pytest.mark.parametrize("holders", ["-1", "1001", "many"])
def test_a_number_of_holders_out_of_range_is_refused(server: Running, holders: str) -> None:
    reply = server.client.get("/v1/pool", params={"holders": holders})
    assert reply.status_code in (400, 422)
    assert "holders" in reply.json()["error"]["message"]


def test_a_running_request_is_shown_with_its_row(server: Running) -> None:
    shown: list[dict[str, Any]] = []
    body = {"text": "running", "rid": "runs", "stream": True, "sampling_params": {"max_new_tokens": 400}}
    with server.client.stream("POST", "/generate", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and not shown:
                shown = [holder for holder in pool_of(server)["holders"] if holder["kind"] == "request"]
                server.client.post("/abort_request", json={"rid": "runs"})
    (holder,) = shown
    assert (holder["rid"], holder["phase"], holder["session"]) == ("runs", "running", None)
    assert holder["own_pages"] + holder["shared_pages"] > 1
    assert 0 <= holder["row"] < 8
