"""`sessile corpus`: add, list, remove on a running server, and build without one."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sessile.cli import main
from sessile.draft.corpus_index import CorpusIndex
from sessile.text.load import load_tokenizer
from tests.http.conftest import Running, ring_of, running_server
from tests.http.corpora_stage import listed, remove_all, stopped_builder, tokens_on_shelf, tree_of, when_settled
from tests.http.serving import PATIENCE_S, ROOT, Deployment, free_port, wait_until_healthy
from tests.http.toy_engine import ToyEngine
from tests.unit.tiny_folder import write_tiny_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tree_of(tmp_path_factory.mktemp("corpora"), **{"served.txt": "what is served"})
    with running_server(ToyEngine, corpora_dir=str(folder), corpora_tokens_max=1000) as running:
        yield running


@pytest.fixture
def toy(shared: Running, capsys: Capture) -> Iterator[Running]:
    yield shared
    remove_all(shared)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    files = {"a.txt": "abc", "b.jsonl": '"de"\n{"text": "fgh"}', "deep__c.py": "i = 1", "d": ""}
    return tree_of(tmp_path / "texts", **files)


def corpus(running: Running, command: str, *arguments: object) -> int:
    return main(["corpus", command, "--url", running.url, *map(str, arguments)])


def test_files_and_folders_are_uploaded_as_one_corpus(toy: Running, texts: Path, capsys: Capture) -> None:
    assert corpus(toy, "add", "--id", "texts", texts) == 0
    assert "texts is ready: 13 tokens of 4 documents" in capsys.readouterr().err
    assert tokens_on_shelf(toy) == {("", "texts"): 13}


def test_a_path_is_the_servers(toy: Running, capsys: Capture) -> None:
    assert corpus(toy, "add", "--path", "served.txt") == 0
    assert "is ready: 14 tokens of 1 documents" in capsys.readouterr().err


def test_the_list_shows_state_sizes_and_what_is_left(toy: Running, texts: Path, capsys: Capture) -> None:
    corpus(toy, "add", "--id", "texts", texts)
    assert corpus(toy, "list") == 0
    head, row, left = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["id", "state", "tokens", "documents", "bytes"]
    assert row.split()[:5] == ["texts", "ready", "13", "4", "108"]
    assert left.startswith("room for 987 more tokens")


def test_replacing_and_removing_are_asked_for(toy: Running, texts: Path, capsys: Capture) -> None:
    corpus(toy, "add", "--id", "texts", texts)
    assert corpus(toy, "add", "--id", "texts", texts / "a.txt") == 2
    assert "is there already" in capsys.readouterr().err
    assert corpus(toy, "add", "--id", "texts", "--replace", texts / "a.txt") == 0
    assert tokens_on_shelf(toy) == {("", "texts"): 3}
    assert corpus(toy, "remove", "texts") == 0
    assert tokens_on_shelf(toy) == {}
    assert corpus(toy, "remove", "texts") == 2
    assert "corpus 'texts' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "name files to"), (("--path", "x", "here.txt"), "name files to"), (("none.txt",), "there is no"),
     (("--path", "../x"), "must not contain '..'"), (("--id", "a/b", "here.txt"), "id"),
     (("void",), "there are no files"), (("index.corpus",), "with --path"), (("bad.jsonl",), "line 1: not valid JSON"),
     (("latin.txt",), "not UTF-8 at byte 3"), (("long.txt",), "there is room for")],
)  # fmt: skip
def test_what_cannot_be_added_is_one_line(
    toy: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    files = {"here.txt": "x", "index.corpus": "x", "bad.jsonl": "x", "long.txt": "x" * 9000}
    monkeypatch.chdir(tree_of(tmp_path, **files))
    (tmp_path / "void").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert corpus(toy, "add", *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert listed(toy.client) == {}


def test_without_a_server_or_a_key_that_is_said(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["corpus", "list", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "Is a server there? See --url." in capsys.readouterr().err
    with running_server(ToyEngine, key_ring=ring_of(acme="user")) as running:
        assert corpus(running, "list") == 2
        assert "SESSILE_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("SESSILE_API_KEY", "acme-key")
        assert corpus(running, "list") == 0


def test_how_far_it_is_shows_when_it_takes_long(
    toy: Running, texts: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessile.commands.QUIET_S", 0.0)
    monkeypatch.setattr("sessile.server.corpora.store.COUNT_WAIT_S", 0.05)
    corpus(toy, "add", "--id", "first", texts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopped_builder(toy))
        monkeypatch.setattr("sessile.corpora.client.sleep", lambda seconds: stack.close())
        assert corpus(toy, "add", "--id", "texts", texts) == 0
    said = capsys.readouterr().err
    assert "sending, 100%" in said and "texts: waiting, 0%" in said


def test_an_index_is_built_without_a_server(tmp_path: Path, texts: Path, capsys: Capture) -> None:
    model = write_tiny_model(tmp_path)
    output = tmp_path / "texts.corpus"
    assert main(["corpus", "build", str(texts), "--model", str(model), "--output", str(output)]) == 0
    assert "13 tokens of 4 documents" in capsys.readouterr().err
    index = CorpusIndex.load(output)
    assert (index.tokens, index.documents) == (13, 4)
    assert index.label.hex() == load_tokenizer(model).fingerprint()


@pytest.mark.parametrize(
    ("output", "source", "says"),
    [("x.idx", "a.txt", "must end in .corpus"), ("none/x.corpus", "a.txt", "there is no folder"),
     ("x.corpus", "none", "there is no"), ("x.corpus", "d", "the documents are empty")],
)  # fmt: skip
def test_an_index_that_cannot_be_built_is_one_line(
    tmp_path: Path, texts: Path, capsys: Capture, output: str, source: str, says: str
) -> None:
    model = write_tiny_model(tmp_path)
    argv = ["corpus", "build", str(texts / source), "--model", str(model), "--output", str(tmp_path / output)]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(tmp_path.glob("**/*.corpus*")) == []


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[Deployment]:
    """`sessile serve` with a tiny model, in processes of its own."""
    port, log = free_port(), folder / "server.log"
    argv = [sys.executable, "-m", "sessile", "serve", f"--model={folder}", "--load-format=dummy", f"--port={port}",
            "--page-size=4", "--kv-memory=4M", "--context-tokens=512", *flags]  # fmt: skip
    with log.open("w") as sink:
        process = subprocess.Popen(argv, stderr=sink, cwd=ROOT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deployment = Deployment(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(deployment)
        yield deployment
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_h47_a_served_model_drafts_from_what_was_built_before_also_after_a_restart(tmp_path: Path, texts: Path) -> None:
    model = write_tiny_model(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    argv = ["corpus", "build", str(texts), "--model", str(model), "--output", str(place / "built.corpus")]
    assert main(argv) == 0
    flags = (f"--corpora-dir={place}", "--speculate=on")
    with served(model, *flags) as deployment:
        assert main(["corpus", "add", "--url", deployment.url, "--id", "built", "--path", "built.corpus"]) == 0
        assert main(["corpus", "add", "--url", deployment.url, "--id", "sent", str(texts / "a.txt")]) == 0
    with served(model, *flags) as deployment, httpx.Client(base_url=deployment.url) as client:
        for name, tokens in (("built", 13), ("sent", 3)):
            corpus = when_settled(client, name)
            assert (corpus["state"], corpus["tokens"]) == ("ready", tokens)
        body = {"text": "abc", "corpora": ["sent"], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        assert client.post("/generate", json=body, timeout=PATIENCE_S).status_code == 200
        assert client.post("/generate", json=body | {"corpora": ["none"]}).status_code == 400


def test_h47_where_nobody_drafts_a_corpus_is_refused(tmp_path: Path) -> None:
    with served(write_tiny_model(tmp_path)) as deployment, httpx.Client(base_url=deployment.url) as client:
        for path in ("/v1/corpora", "/add_external_corpus"):
            reply = client.post(path, json={"documents": ["abc"]})
            assert reply.status_code in (400, 422)
            assert "--speculate on" in reply.text
        assert client.get("/v1/corpora").json()["data"] == []
