"""Whose a corpus is: a user's are its tenant's own, an administrator's are everybody's, and budgets are each one's."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from sessile.server.corpora.budget import CorpusLimits
from tests.http.conftest import Running, ring_of, running_server
from tests.http.corpora_stage import add, added, jsonl, listed, remove_all, tokens_on_shelf, upload
from tests.http.toy_engine import ToyEngine

RING = replace(
    ring_of(acme="user", umbra="user", ops="admin"),
    corpus_limits={"acme": CorpusLimits(tokens_max=100), "umbra": CorpusLimits(bytes_max=100)},
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running_server(ToyEngine, key_ring=RING, corpora_tokens_max=150) as running:
        yield running


@pytest.fixture
def toy(shared: Running) -> Iterator[Running]:
    yield shared
    remove_all(shared)


@pytest.fixture
def ops(toy: Running) -> Iterator[httpx.Client]:
    with toy.as_tenant("ops") as client:
        yield client


def test_a_users_corpus_is_seen_and_removed_by_its_tenant_alone(
    toy: Running, acme: httpx.Client, umbra: httpx.Client, ops: httpx.Client
) -> None:
    assert added(acme, "mine", "abc")["tenant"] == "acme"
    assert tokens_on_shelf(toy) == {("acme", "mine"): 3}
    for stranger in (umbra, ops):
        assert listed(stranger) == {}
        assert stranger.get("/list_external_corpora").json()["corpus_token_counts"] == {}
        assert stranger.get("/v1/corpora/mine").status_code == 404
        assert stranger.delete("/v1/corpora/mine").status_code == 404
        assert stranger.post("/remove_external_corpus", json={"corpus_id": "mine"}).status_code == 400
    assert acme.delete("/v1/corpora/mine").status_code == 200


def test_an_administrators_corpus_is_everybodys_and_no_user_removes_it(
    toy: Running, acme: httpx.Client, ops: httpx.Client
) -> None:
    assert ops.post("/add_external_corpus", json={"corpus_id": "all", "documents": ["abc"]}).status_code == 200
    assert tokens_on_shelf(toy) == {("", "all"): 3}
    assert listed(acme) == {"all": "ready"}
    for reply in (acme.delete("/v1/corpora/all"), acme.post("/remove_external_corpus", json={"corpus_id": "all"})):
        assert reply.status_code in (400, 403)
        assert "needs a key with the role admin" in reply.text
    assert listed(ops) == {"all": "ready"}
    assert ops.delete("/v1/corpora/all").status_code == 200


def test_an_administrator_may_keep_a_corpus_to_its_tenant_and_a_user_may_not_share_one(
    toy: Running, acme: httpx.Client, ops: httpx.Client
) -> None:
    assert added(ops, "own", "abc", shared=False)["tenant"] == "ops"
    assert listed(acme) == {}
    for refused in (add(acme, "all", shared=True), upload(acme, "all", jsonl("abc"), shared=True)):
        assert refused.status_code == 403
        assert "a corpus for everybody needs a key with the role admin" in refused.json()["error"]["message"]
    assert added(acme, "mine", "abc", shared=False)["tenant"] == "acme"


def test_two_tenants_may_use_one_id_and_each_means_its_own(
    toy: Running, acme: httpx.Client, umbra: httpx.Client, ops: httpx.Client
) -> None:
    for client, text in ((acme, "a"), (umbra, "bb"), (ops, "ccc")):
        added(client, "same", text)
    assert tokens_on_shelf(toy) == {("", "same"): 3, ("acme", "same"): 1, ("umbra", "same"): 2}
    assert acme.get("/v1/corpora/same").json()["tokens"] == 1
    assert acme.get("/list_external_corpora").json()["corpus_token_counts"] == {"same": 1}
    assert acme.delete("/v1/corpora/same").status_code == 200
    assert acme.get("/v1/corpora/same").json()["tokens"] == 3, "everybody's is left"
    assert tokens_on_shelf(toy) == {("", "same"): 3, ("umbra", "same"): 2}


def test_h47_a_tenants_budget_is_its_own_and_what_is_left_is_said(
    toy: Running, acme: httpx.Client, umbra: httpx.Client
) -> None:
    added(acme, "first", "x" * 60)
    refused = add(acme, "second", "x" * 41)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "over_budget")
    assert "room for 40 of 100 tokens" in refused.json()["error"]["message"]
    assert added(acme, "third", "x" * 40)["state"] == "ready"
    assert acme.get("/v1/corpora").json()["budget"]["left"]["tokens"] == 0
    refused = add(umbra, "bytes", "x" * 13)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "over_budget")
    assert "of 100 bytes" in refused.json()["error"]["message"]
    assert added(umbra, "bytes", "x" * 12)["bytes"] == 100


def test_the_budget_of_all_bounds_each(toy: Running, acme: httpx.Client, ops: httpx.Client) -> None:
    added(ops, "all", "x" * 100)
    refused = add(acme, "mine", "x" * 51)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "over_budget")
    assert acme.get("/v1/corpora").json()["budget"]["left"]["tokens"] == 50


def test_replacing_needs_room_for_both_until_the_swap(toy: Running, acme: httpx.Client) -> None:
    added(acme, "mine", "x" * 60)
    assert add(acme, "mine", "y" * 50, replace=True).status_code == 429
    assert tokens_on_shelf(toy) == {("acme", "mine"): 60}
    assert added(acme, "mine", "y" * 40, replace=True)["tokens"] == 40
    assert acme.get("/v1/corpora").json()["budget"]["used"]["tokens"] == 40
