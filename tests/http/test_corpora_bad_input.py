"""What is wrong with a corpus is a clear 4xx, and what was loaded before is untouched."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sessile.draft.corpus_index import CorpusIndex
from sessile.server.corpora.budget import INDEX_BYTES_A_TOKEN
from tests.http.conftest import Running, running_server
from tests.http.corpora_stage import LINES, add, added, files_of, jsonl, listed, tokens_on_shelf, tree_of, upload
from tests.http.fake_engine import byte_tokenizer
from tests.http.toy_engine import ToyEngine

TOKENS_MAX = 2000
KEPT = {("", "kept"): 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outside = tree_of(tmp_path_factory.mktemp("outside"), **{"secret.txt": "secret", "deep__more.txt": "more"})
    folder = tree_of(
        tmp_path_factory.mktemp("corpora"),
        **{"good.txt": "good", "bad.jsonl": '"one"\n{"text": 2}\n', "half.jsonl": '"one"\n"two', "empty.txt": "",
           "void.jsonl": "\n\n", "index.corpus.txt": "no index", "linked__ok.txt": "ok"},
    )  # fmt: skip
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "linked" / "away").symlink_to(outside / "deep")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "nothing").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    os.mkfifo(folder / "pipe")
    write_indexes(folder)
    return folder


def write_indexes(folder: Path) -> None:
    """One that is whole, and what may have happened to it."""
    index = CorpusIndex.build([np.arange(100, dtype=np.int32)])
    label = bytes.fromhex(byte_tokenizer().fingerprint())
    index.save(folder / "whole.corpus", label=label)
    index.save(folder / "foreign.corpus", label=b"another tokenizer")
    whole = (folder / "whole.corpus").read_bytes()
    (folder / "cut.corpus").write_bytes(whole[:-40])
    (folder / "stub.corpus").write_bytes(whole[:50])
    (folder / "damaged.corpus").write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    (folder / "text.corpus").write_text("this is no index at all, whatever its name says " * 10)
    tree_of(folder, both__a="a")
    index.save(folder / "both" / "b.corpus", label=label)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Running]:
    limits = {"corpora_tokens_max": TOKENS_MAX, "corpora_bytes_max": TOKENS_MAX * INDEX_BYTES_A_TOKEN, "corpora_max": 4}
    with running_server(ToyEngine, corpora_dir=str(folder), **limits) as running:
        added(running.client, "kept", "what is here")
        yield running


@pytest.fixture
def toy(shared: Running) -> Iterator[Running]:
    yield shared
    assert listed(shared.client) == {"kept": "ready"}
    assert tokens_on_shelf(shared) == KEPT
    files = files_of(shared)
    assert (len(files["indexes"]), files["uploads"]) == (1, [])
    left = shared.client.get("/v1/corpora").json()["budget"]["left"]
    assert left["tokens"] == TOKENS_MAX - 12, "what was claimed is given back"


BAD_BODIES = [
    (b"{", "not valid JSON"),
    (b"[]", "the body must be"),
    (b'"text"', "the body must be"),
    (b"{}", "documents: give documents or path"),
    (b'{"documents": null}', "documents: give documents or path"),
    (b'{"documents": ["a"], "path": "good.txt"}', "not both"),
    (b'{"documents": []}', "documents: there are none"),
    (b'{"documents": ["a", ""]}', "documents.1: the document is empty"),
    (b'{"documents": "text"}', "documents: must be"),
    (b'{"documents": ["a", 1]}', "documents.1: must be"),
    (b'{"documents": ["\\ud800"]}', "not valid JSON"),
    (b'{"documents": ["a"], "id": ""}', "id: must be 1 to 128"),
    (b'{"documents": ["a"], "id": "a/b"}', "id: must be 1 to 128"),
    (b'{"documents": ["a"], "id": 7}', "id: must be 1 to 128"),
    (b'{"documents": ["a"], "replace": "yes"}', "replace: must be"),
    (b'{"documents": ["a"], "color": "red"}', "color: unknown field"),
    (b'{"path": ""}', "path: must"),
    (b'{"path": 1}', "path: must"),
]


@pytest.mark.parametrize(("body", "says"), BAD_BODIES)
def test_a_malformed_body_is_422_and_names_what_is_wrong(toy: Running, body: bytes, says: str) -> None:
    reply = toy.client.post("/v1/corpora", content=body)
    assert reply.status_code == 422
    assert says in reply.json()["error"]["message"]


NATIVE_BODIES = [
    (b"{", "not valid JSON"),
    (b"[]", "the body must be"),
    (b"{}", "documents: give documents or file_path"),
    (b'{"documents": ["a"], "file_path": "good.txt"}', "not both"),
    (b'{"documents": []}', "there are none"),
    (b'{"documents": [""]}', "documents.0: the document is empty"),
    (b'{"corpus_id": "kept", "documents": ["a"]}', "corpus 'kept' is there already"),
    (b'{"file_path": "../x"}', "must not contain '..'"),
    (b'{"file_path": "cut.corpus"}', "its header tells of"),
    (b'{"file_path": "bad.jsonl"}', "bad.jsonl line 2"),
]


@pytest.mark.parametrize(("body", "says"), NATIVE_BODIES)
def test_a_native_add_that_fails_is_400_with_the_fields_of_a_success(toy: Running, body: bytes, says: str) -> None:
    reply = toy.client.post("/add_external_corpus", content=body)
    assert reply.status_code == 400
    content = reply.json()
    assert (content["success"], content["loaded_token_count"]) == (False, 0)
    assert set(content) == {"success", "corpus_id", "message", "loaded_token_count"}
    assert says in content["message"]


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"corpus_id": 1}', b'{"corpus_id": "none"}'])
def test_h47_a_native_removal_of_what_is_not_there_is_400(toy: Running, body: bytes) -> None:
    reply = toy.client.post("/remove_external_corpus", content=body)
    assert reply.status_code == 400
    assert reply.json()["success"] is False and reply.json()["message"]


def test_h47_an_unknown_id_is_404_by_every_method(toy: Running) -> None:
    for method in ("GET", "DELETE"):
        reply = toy.client.request(method, "/v1/corpora/none")
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "id")
        assert "corpus 'none' does not exist" in reply.json()["error"]["message"]


BAD_LINES: list[tuple[bytes, str]] = [
    (b"", "no documents"),
    (b"\n\n", "no documents"),
    (b'"one"\n{"text": 2}\n', "line 2: must be a string"),
    (b'"one"\n{"body": "x"}\n', "line 2: must be a string"),
    (b'"one"\n["x"]\n', "line 2: must be a string"),
    (b'"one"\n\n"two', "line 3: not valid JSON"),
    (b'"one"\n""\n', "line 2: the document is empty"),
    (b'"caf\xe9"\n', "line 1: not valid JSON"),
]


@pytest.mark.parametrize(("lines", "says"), BAD_LINES)
@pytest.mark.parametrize("pieces", [1, 5])
def test_a_bad_line_of_an_upload_is_422_with_its_number(toy: Running, lines: bytes, says: str, pieces: int) -> None:
    size = max(1, len(lines) // pieces)
    chunks = [lines[start : start + size] for start in range(0, len(lines), size)]
    reply = upload(toy.client, "bad", iter(chunks))
    assert reply.status_code == 422
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "headers", "says"),
    [("id=a/b", {}, "id"), ("replace=perhaps", {}, "replace"), ("color=red", {}, "color: unknown field"),
     ("id=a", {"content-encoding": "gzip"}, "content-encoding")],
)  # fmt: skip
def test_an_upload_is_asked_for_as_strictly(toy: Running, query: str, headers: dict[str, str], says: str) -> None:
    reply = toy.client.post(f"/v1/corpora?{query}", content=jsonl("one"), headers=LINES | headers)
    assert reply.status_code == 422
    assert says in reply.json()["error"]["message"]


def test_a_query_does_not_decide_over_a_json_body(toy: Running) -> None:
    reply = toy.client.post("/v1/corpora?replace=true", json={"id": "kept", "documents": ["a"]})
    assert reply.status_code == 422


BAD_PATHS = [
    ("../outside", "must not contain '..'"),
    ("linked/../../x", "must not contain '..'"),
    ("a\0b", "zero byte"),
    ("/etc/passwd", "not below the corpora directory"),
    ("link.txt", "a link leads out of it"),
    ("linked", "a link leads out of it"),
    ("linked/away/more.txt", "a link leads out of it"),
    ("none.txt", "there is no 'none.txt'"),
    ("nothing", "no files in 'nothing'"),
    ("pipe", "'pipe' is no file"),
    (".sessile", "not below the corpora directory"),
    (".sessile/catalogue.json", "not below the corpora directory"),
    ("x" * 300, "File name too long"),
    ("both", "is a corpus by itself"),
    ("foreign", "'foreign' has a file whose name is not UTF-8"),
]


@pytest.mark.parametrize(("path", "says"), BAD_PATHS)
def test_h56_a_path_that_leads_nowhere_or_out_is_422(toy: Running, path: str, says: str) -> None:
    reply = toy.client.post("/v1/corpora", json={"path": path})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "path")
    assert says in reply.json()["error"]["message"]


def test_what_lies_outside_looks_like_what_is_not_there(toy: Running, folder: Path) -> None:
    inside = str(folder.parent)
    replies = [
        toy.client.post("/v1/corpora", json={"path": f"{inside}/{name}"}).json()["error"]["message"]
        for name in (".", "no-such-thing")
    ]
    assert all("not below the corpora directory" in message for message in replies)


BAD_FILES = [
    ("bad.jsonl", "bad.jsonl line 2: must be a string"),
    ("half.jsonl", "half.jsonl line 2: not valid JSON"),
    ("latin.txt", "latin.txt: not UTF-8 near byte"),
    ("empty.txt", "the documents are empty"),
    ("void.jsonl", "the documents are empty"),
    ("cut.corpus", "its header tells of"),
    ("stub.corpus", "does not begin with a header"),
    ("damaged.corpus", "its checksum is another"),
    ("text.corpus", "does not begin with a header"),
    ("foreign.corpus", "built with another tokenizer"),
]


@pytest.mark.parametrize(("path", "says"), BAD_FILES)
def test_a_file_that_is_not_what_its_name_says_is_422(toy: Running, path: str, says: str) -> None:
    reply = toy.client.post("/v1/corpora", json={"path": path})
    assert reply.status_code == 422, reply.text
    assert says in reply.json()["error"]["message"]


def test_a_truncated_index_in_place_of_a_good_one_leaves_the_good_one(toy: Running) -> None:
    reply = toy.client.post("/v1/corpora", json={"id": "kept", "path": "cut.corpus", "replace": True})
    assert reply.status_code == 422
    kept = toy.client.get("/v1/corpora/kept").json()
    assert (kept["state"], kept["tokens"], kept["reason"]) == ("ready", 12, None)


def test_a_whole_index_is_taken_as_it_is(toy: Running) -> None:
    assert toy.client.post("/v1/corpora", json={"id": "w", "path": "whole.corpus"}).status_code in (200, 202)
    toy.wait_until(lambda: listed(toy.client)["w"] == "ready")
    assert tokens_on_shelf(toy)[("", "w")] == 100
    assert toy.client.delete("/v1/corpora/w").status_code == 200


def test_h47_over_budget_is_refused_whole_with_what_is_left(toy: Running) -> None:
    for send in (
        lambda text: add(toy.client, "big", text),
        lambda text: upload(toy.client, "big", jsonl(text)),
    ):
        reply = send("x" * (TOKENS_MAX - 11))
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "over_budget"), "not beside what is there"
        assert f"room for {TOKENS_MAX - 12}" in reply.json()["error"]["message"]
        reply = send("x" * (TOKENS_MAX + 1))
        assert reply.status_code in (413, 429) and reply.json()["error"]["code"] == "over_budget"
        assert toy.client.get("/v1/corpora/big").status_code == 404


def test_h47_a_text_that_could_never_fit_is_refused_before_it_is_read(toy: Running) -> None:
    reply = upload(toy.client, "big", (jsonl("x" * 9_997) for _ in range(1000)))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "over_budget")
    native = toy.client.post("/add_external_corpus", json={"documents": ["x" * 100_000]})
    assert native.status_code == 400 and "there is room for" in native.json()["message"]


def test_more_corpora_than_may_be_are_429(toy: Running) -> None:
    for number in range(3):
        added(toy.client, f"n{number}", "a")
    reply = add(toy.client, "n4", "a")
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "limit_reached")
    assert "there are 4 corpora" in reply.json()["error"]["message"]
    for number in range(3):
        assert toy.client.delete(f"/v1/corpora/n{number}").status_code == 200


def test_without_a_folder_of_the_operators_no_path_is_taken() -> None:
    with running_server(ToyEngine) as running:
        reply = running.client.post("/v1/corpora", json={"path": "good.txt"})
        assert reply.status_code == 422
        assert "--corpora-dir" in reply.json()["error"]["message"]
        assert running.client.get("/v1/corpora").json()["data"] == []


def test_before_the_engine_is_there_nothing_is_taken_and_nothing_kept(toy: Running) -> None:
    toy.service.draining = True
    try:
        assert add(toy.client, "late").status_code == 503
        native = toy.client.post("/add_external_corpus", json={"documents": ["a"]})
        assert (native.status_code, native.json()["success"]) == (503, False)
    finally:
        toy.service.draining = False
