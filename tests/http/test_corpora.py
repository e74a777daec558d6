"""Corpora over HTTP, on the real core and with a real builder: what is added is on the shelf, or it is said why not."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sessile.draft.corpus_index import CorpusIndex
from sessile.server.corpora import store as store_module
from tests.http.conftest import PATIENCE_S, Running, running_server
from tests.http.corpora_stage import (
    LINES,
    add,
    added,
    builder_pid,
    client_of,
    figures,
    files_of,
    jsonl,
    listed,
    listing_of,
    received,
    remove_all,
    shelf,
    stopped_builder,
    tokens_on_shelf,
    tree_of,
    upload,
    when_settled,
)
from tests.http.toy_engine import ToyEngine

TEXT = "to be or not to be, that is the question"


@pytest.fixture(scope="module")
def operators_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree_of(
        tmp_path_factory.mktemp("corpora"),
        **{"one.txt": TEXT, "many.jsonl": '"one"\n{"text": "two", "n": 1}\n\n'},
        **{"deep__a.py": "a = 1\n", "deep__b.py": ""},
    )


@pytest.fixture(scope="module")
def shared(operators_folder: Path) -> Iterator[Running]:
    with running_server(ToyEngine, corpora_dir=str(operators_folder)) as running:
        added(running.client, "first")  # the builder is there from now on
        yield running


@pytest.fixture
def toy(shared: Running) -> Iterator[Running]:
    remove_all(shared)
    yield shared
    remove_all(shared)
    assert files_of(shared) == {"indexes": [], "uploads": []}


def test_h47_a_corpus_is_on_the_shelf_when_it_is_said_to_be_ready(toy: Running) -> None:
    corpus = added(toy.client, "plays", TEXT, "x" * 10)
    assert (corpus["state"], corpus["tokens"], corpus["documents"]) == ("ready", len(TEXT) + 10, 2)
    (entry,) = shelf(toy)
    assert (entry.tenant, entry.corpus_id, entry.index.tokens) == ("", "plays", len(TEXT) + 10)
    assert entry.index.resident_bytes == corpus["bytes"]
    assert (corpus["drafts_offered"], corpus["drafts_accepted"], corpus["accepted_by_length"]) == (0, 0, [])


def test_what_is_on_the_shelf_is_an_index_of_the_text(toy: Running) -> None:
    added(toy.client, "plays", TEXT, "and on")
    (entry,) = shelf(toy)
    made = CorpusIndex.build([np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in (TEXT, "and on")])
    assert np.array_equal(entry.index.flat, made.flat) and np.array_equal(entry.index.positions, made.positions)


def test_without_an_id_one_is_made_up(toy: Running) -> None:
    reply = toy.client.post("/v1/corpora", json={"documents": [TEXT]}).json()
    assert when_settled(toy.client, reply["id"])["state"] == "ready"


def test_an_upload_is_lines_of_documents(toy: Running) -> None:
    reply = upload(toy.client, "lines", jsonl("one", {"text": "two", "source": "x"}) + b"\n" + b'"three"')
    assert reply.status_code in (200, 202), reply.text
    corpus = when_settled(toy.client, "lines")
    assert (corpus["tokens"], corpus["documents"]) == (11, 3)


@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/jsonl; charset=utf-8", "Application/JSONL"])
def test_an_upload_is_known_by_its_content_type(toy: Running, kind: str) -> None:
    reply = toy.client.post("/v1/corpora?id=lines", content=jsonl("one"), headers={"content-type": kind})
    assert reply.status_code in (200, 202), reply.text
    assert when_settled(toy.client, "lines")["tokens"] == 3


def test_an_upload_shows_how_far_it_is_and_is_not_held_in_memory(toy: Running) -> None:
    seen = threading.Event()

    def lines() -> Iterator[bytes]:
        yield jsonl("a" * 50_000)
        assert seen.wait(PATIENCE_S)
        yield jsonl("b")

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(toy.client.post, "/v1/corpora?id=slow", content=lines(), headers=LINES)
        with client_of(toy) as other:
            toy.wait_until(lambda: received(other, "slow") > 50_000)
            corpus = other.get("/v1/corpora/slow").json()
            assert (corpus["state"], corpus["progress"]["stage"]) == ("loading", "receiving")
        seen.set()
        assert reply.result().status_code in (200, 202)
    assert when_settled(toy.client, "slow")["tokens"] == 50_001


@pytest.mark.parametrize(
    ("path", "tokens", "documents"),
    [("one.txt", len(TEXT), 1), ("many.jsonl", 6, 2), ("deep", 6, 1), ("deep/a.py", 6, 1), (".", len(TEXT) + 12, 4)],
)
def test_a_path_below_the_operators_folder_is_a_file_or_all_files_of_a_folder(
    toy: Running, path: str, tokens: int, documents: int
) -> None:
    assert toy.client.post("/v1/corpora", json={"id": "files", "path": path}).status_code in (200, 202)
    corpus = when_settled(toy.client, "files")
    assert (corpus["state"], corpus["tokens"], corpus["documents"]) == ("ready", tokens, documents)


def test_an_absolute_path_may_lead_into_the_folder(toy: Running, operators_folder: Path) -> None:
    body = {"corpus_id": "files", "file_path": str(operators_folder / "one.txt")}
    assert toy.client.post("/add_external_corpus", json=body).json()["loaded_token_count"] == len(TEXT)


def test_the_native_routes_answer_as_sglang_does(toy: Running) -> None:
    made = toy.client.post("/add_external_corpus", json={"corpus_id": "plays", "documents": [TEXT]})
    assert made.status_code == 200
    assert made.json() == {
        "success": True, "corpus_id": "plays", "message": "corpus 'plays' is loaded", "loaded_token_count": len(TEXT)
    }  # fmt: skip
    shown = toy.client.get("/list_external_corpora").json()
    assert shown == {"success": True, "corpus_token_counts": {"plays": len(TEXT)}, "message": "1 corpora"}
    gone = toy.client.post("/remove_external_corpus", json={"corpus_id": "plays"})
    assert (gone.status_code, gone.json()) == (200, {"success": True, "message": "corpus 'plays' is removed"})
    assert shelf(toy) == ()


def test_replacing_must_be_asked_for_and_swaps_in_one_step(toy: Running) -> None:
    added(toy.client, "plays", TEXT)
    before = shelf(toy)[0].index
    refused = add(toy.client, "plays", "other")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "duplicate_corpus")
    assert "replace" in refused.json()["error"]["message"]
    assert shelf(toy)[0].index is before
    assert added(toy.client, "plays", "other", replace=True)["tokens"] == 5
    assert tokens_on_shelf(toy) == {("", "plays"): 5}
    assert before.flat[1:6].tolist() == list(TEXT.encode()[:5]), "who still reads the old one reads it to the end"


def test_h44_what_was_there_is_ready_until_its_replacement_is(toy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "COUNT_WAIT_S", 0.05)
    added(toy.client, "plays", TEXT)
    with stopped_builder(toy):
        reply = add(toy.client, "plays", "other", replace=True)
        assert (reply.status_code, reply.json()["state"]) == (202, "ready")
        corpus = toy.client.get("/v1/corpora/plays").json()
        assert (corpus["tokens"], corpus["progress"]["stage"]) == (len(TEXT), "waiting")
        assert tokens_on_shelf(toy) == {("", "plays"): len(TEXT)}
        again = add(toy.client, "plays", "third", replace=True)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "corpus_busy")
    assert when_settled(toy.client, "plays")["tokens"] == 5


def test_h44_a_load_that_fails_half_way_changes_nothing(toy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "COUNT_WAIT_S", 0.05)
    added(toy.client, "plays", TEXT)
    with stopped_builder(toy) as pid:
        assert add(toy.client, "plays", "other", replace=True).status_code == 202
        assert add(toy.client, "new").status_code == 202
        os.kill(pid, signal.SIGKILL)
        plays, new = when_settled(toy.client, "plays"), when_settled(toy.client, "new")
    assert (plays["state"], plays["tokens"]) == ("ready", len(TEXT))
    assert new["state"] == "failed"
    for corpus in (plays, new):
        assert "killed by signal 9 (SIGKILL); add the corpus again" in corpus["reason"]
    assert tokens_on_shelf(toy) == {("", "plays"): len(TEXT)}
    assert len(files_of(toy)["indexes"]) == 1 and files_of(toy)["uploads"] == []


def test_a_dead_builder_fails_its_builds_alone_and_the_next_add_starts_another(toy: Running) -> None:
    added(toy.client, "plays", TEXT)
    with stopped_builder(toy) as pid, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(add, toy.client, "new")
        toy.wait_until(lambda: "new" in listing_of(toy))
        os.kill(pid, signal.SIGKILL)
        assert reply.result().status_code == 500
    assert listed(toy.client) == {"plays": "ready"}, "who asked was told; nothing else is left of it"
    assert added(toy.client, "new")["state"] == "ready"
    assert builder_pid(toy) != pid
    assert toy.generate(sampling_params={"max_new_tokens": 3}).status_code == 200


def test_removing_a_loading_corpus_cancels_it(toy: Running) -> None:
    with ThreadPoolExecutor(2) as pool:
        with stopped_builder(toy):
            reply = pool.submit(add, toy.client, "plays", TEXT)
            toy.wait_until(lambda: "plays" in listing_of(toy))
            with client_of(toy) as other:
                removal = pool.submit(other.delete, "/v1/corpora/plays")
                toy.wait_until(lambda: listing_of(toy).get("plays") == "removing")
                busy = client_of(toy).delete("/v1/corpora/plays")
                os.kill(builder_pid(toy), signal.SIGCONT)
                assert removal.result().json() == {"id": "plays", "object": "corpus", "deleted": True}
        refused = reply.result()
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "corpus_busy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cancelled")
    assert toy.client.get("/v1/corpora/plays").status_code == 404
    assert shelf(toy) == ()


def test_an_upload_that_breaks_off_leaves_nothing(toy: Running) -> None:
    class LostConnection(Exception):
        pass

    def lines() -> Iterator[bytes]:
        yield jsonl("a" * 1000)
        raise LostConnection

    with pytest.raises(LostConnection):
        client_of(toy).post("/v1/corpora?id=cut", content=lines(), headers=LINES)
    toy.wait_until(lambda: listed(toy.client) == {})
    assert files_of(toy)["uploads"] == []


def test_a_removed_upload_is_refused_where_it_goes_on(toy: Running) -> None:
    removed = threading.Event()

    def lines() -> Iterator[bytes]:
        yield jsonl("a" * 1000)
        assert removed.wait(PATIENCE_S)
        for _ in range(100):
            yield jsonl("b" * 1000)

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client_of(toy).post, "/v1/corpora?id=gone", content=lines(), headers=LINES)
        toy.wait_until(lambda: received(toy.client, "gone") > 0)
        assert toy.client.delete("/v1/corpora/gone").status_code == 200
        removed.set()
        assert (reply.result().status_code, reply.result().json()["error"]["code"]) == (409, "cancelled")


def test_metrics_count_corpora_by_state_and_failed_loads(toy: Running) -> None:
    before = figures(toy)
    added(toy.client, "plays", TEXT)
    assert add(toy.client, "bad", "").status_code == 422
    after = figures(toy)
    assert (after["ready"], after["loading"], after["failed"]) == (1, 0, 0)
    assert (after["tokens"], after["bytes"]) == (len(TEXT), 4 * (2 * len(TEXT) + 1))
    assert after["loads_failed_total"] == before["loads_failed_total"], "refused is not failed"
