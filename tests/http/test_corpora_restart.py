"""Corpora survive a server: what the state folder has is back when the next one is ready, or it is said why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sessile.errors import StartupError
from sessile.server.config import ServerOptions
from sessile.server.corpora.folder import open_folder
from tests.http.conftest import Running, running_server
from tests.http.corpora_stage import added, files_of, listed, tokens_on_shelf, when_settled
from tests.http.toy_engine import ToyEngine


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a server has left two corpora."""
    folder = tmp_path_factory.mktemp("left")
    with running_server(ToyEngine, corpora_dir=str(folder)) as running:
        added(running.client, "one", "what is here")
        added(running.client, "two", "what is gone", "b")
        added(running.client, "one", "what was here", replace=True)
        added(running.client, "three", "x")
        assert running.client.delete("/v1/corpora/three").status_code == 200
        assert len(files_of(running)["indexes"]) == 2
    return folder


@pytest.fixture
def kept(left_behind: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(left_behind, tmp_path / "kept"))


def restarted(folder: Path, check: Callable[[Running], None], **options: object) -> None:
    with running_server(ToyEngine, corpora_dir=str(folder), **options) as running:
        for name in listed(running.client):
            when_settled(running.client, name)
        check(running)


def the_index(folder: Path, name: str) -> Path:
    catalogue = json.loads((folder / ".sessile" / "catalogue.json").read_text())
    (file,) = [corpus["file"] for corpus in catalogue["corpora"] if corpus["id"] == name]
    return folder / ".sessile" / "indexes" / file


def test_a_restart_brings_everything_back_without_building(kept: Path) -> None:
    def check(running: Running) -> None:
        assert listed(running.client) == {"one": "ready", "two": "ready"}
        assert tokens_on_shelf(running) == {("", "one"): 13, ("", "two"): 13}
        two = running.client.get("/v1/corpora/two").json()
        assert (two["tokens"], two["documents"], two["bytes"]) == (13, 2, 108)
        assert running.client.get("/v1/corpora").json()["budget"]["used"] == {"tokens": 26, "bytes": 216}
        assert running.service.corpora is not None and running.service.corpora.builder.pid is None
        assert running.client.delete("/v1/corpora/two").status_code == 200

    restarted(kept, check)
    restarted(kept, lambda running: _assert_only(running, "one"))


def _assert_only(running: Running, name: str) -> None:
    assert listed(running.client) == {name: "ready"}
    assert len(files_of(running)["indexes"]) == 1


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda raw: raw[:-8], "its header tells of"),
        (lambda raw: raw[:20], "does not begin with a header"),
        (lambda raw: raw[:140] + bytes([raw[140] ^ 1]) + raw[141:], "its checksum is another"),
        (lambda raw: b"", "does not begin with a header"),
    ],
)
def test_a_damaged_index_is_said_to_be_and_the_others_are_back(
    kept: Path, harm: Callable[[bytes], bytes], says: str
) -> None:
    path = the_index(kept, "one")
    path.write_bytes(harm(path.read_bytes()))

    def check(running: Running) -> None:
        assert listed(running.client) == {"one": "failed", "two": "ready"}
        assert says in running.client.get("/v1/corpora/one").json()["reason"]
        assert tokens_on_shelf(running) == {("", "two"): 13}
        assert running.generate(sampling_params={"max_new_tokens": 2}).status_code == 200
        assert added(running.client, "one", "as new")["state"] == "ready", "no replace: there was none"
        assert len(files_of(running)["indexes"]) == 2

    restarted(kept, check)


def test_the_index_of_another_corpus_is_not_taken_for_it(kept: Path) -> None:
    the_index(kept, "one").write_bytes(the_index(kept, "two").read_bytes())

    def check(running: Running) -> None:
        assert listed(running.client) == {"one": "failed", "two": "ready"}
        assert "another file than the one" in running.client.get("/v1/corpora/one").json()["reason"]

    restarted(kept, check)


def test_an_index_that_is_gone_is_said_to_be_and_can_be_removed(kept: Path) -> None:
    the_index(kept, "one").unlink()

    def check(running: Running) -> None:
        assert listed(running.client) == {"one": "failed", "two": "ready"}
        assert "No such file" in running.client.get("/v1/corpora/one").json()["reason"]
        assert running.client.delete("/v1/corpora/one").status_code == 200

    restarted(kept, check)
    restarted(kept, lambda running: _assert_only(running, "two"))


def test_an_index_of_another_tokenizer_is_refused_and_kept_for_its_own(kept: Path) -> None:
    catalogue = kept / ".sessile" / "catalogue.json"
    good = catalogue.read_text()
    catalogue.write_text(good.replace('"tokenizer": "', '"tokenizer": "00'))

    def check(running: Running) -> None:
        assert listed(running.client) == {"one": "failed", "two": "failed"}
        assert "with another tokenizer than this model's" in running.client.get("/v1/corpora/one").json()["reason"]
        assert tokens_on_shelf(running) == {}

    restarted(kept, check)
    catalogue.write_text(good)
    restarted(kept, lambda running: _assert_both(running))


def _assert_both(running: Running) -> None:
    assert listed(running.client) == {"one": "ready", "two": "ready"}


def test_a_budget_that_was_lowered_refuses_what_does_not_fit_and_keeps_its_file(kept: Path) -> None:
    def check(running: Running) -> None:
        assert sorted(listed(running.client).values()) == ["failed", "ready"]
        (failed,) = [name for name, state in listed(running.client).items() if state == "failed"]
        assert "there is room for 7 of 20 tokens" in running.client.get(f"/v1/corpora/{failed}").json()["reason"]

    restarted(kept, check, corpora_tokens_max=20)
    restarted(kept, _assert_both)


def test_remains_of_a_crash_go_at_the_next_start(kept: Path) -> None:
    state = kept / ".sessile"
    (state / "indexes" / "deadbeef.corpus").write_bytes(b"x")
    (state / "indexes" / ".deadbeef.corpus.abc.part").write_bytes(b"x")
    (state / "uploads" / "deadbeef.jsonl").write_bytes(b"x")

    def check(running: Running) -> None:
        files = files_of(running)
        assert (len(files["indexes"]), files["uploads"]) == (2, [])

    restarted(kept, check)


def test_without_a_folder_nothing_outlives_the_server() -> None:
    with running_server(ToyEngine) as running:
        added(running.client, "one")
        assert running.service.corpora is not None
        place = running.service.corpora.folder.index("x").parent
        assert list(place.iterdir())
    assert not place.exists()


def test_a_folder_that_another_server_uses_is_refused_in_one_line(tmp_path: Path) -> None:
    options = ServerOptions(corpora_dir=str(tmp_path))
    folder = open_folder(options, "")
    with pytest.raises(StartupError, match="another server uses .*--corpora-dir"):
        open_folder(options, "")
    folder.close()
    open_folder(options, "").close()


ELSEWHERE = json.dumps({"version": 1, "corpora": [{
    "id": "a", "tenant": "", "file": "../../keys.corpus", "tokens": 1, "documents": 1, "bytes": 12, "tokenizer": "t",
    "checksum": "c", "created_s": 1,
}]})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "cannot be read"), ('{"version": 1}', "cannot be read"), ('{"version": 9, "corpora": []}', "another"),
     ('"\udcff"', "cannot be read"), ('{"a": ' * 5000, "cannot be read"), (ELSEWHERE, "none of ours")],
)  # fmt: skip
def test_a_damaged_catalogue_is_one_line_and_nothing_is_lost(kept: Path, text: str, says: str) -> None:
    catalogue = kept / ".sessile" / "catalogue.json"
    good = catalogue.read_text()
    catalogue.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StartupError, match=says):
        open_folder(ServerOptions(corpora_dir=str(kept)), "")
    catalogue.write_text(good)
    restarted(kept, _assert_both)


@pytest.mark.parametrize("name", ["none", "file"])
def test_a_directory_that_is_none_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StartupError, match="is no folder"):
        open_folder(ServerOptions(corpora_dir=str(tmp_path / name)), "")
