"""Corpora in the engine: files are read beside the loop, what is on the shelf changes between two steps alone."""

import time
from pathlib import Path

import numpy as np
import pytest

from sessile.contract.corpora import AddCorpus, CorpusUse, CorpusUses, GetCorpora, RemoveCorpus
from sessile.contract.messages import Outcome, Reply
from sessile.draft.corpus_file import stored_checksum
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.shelf import Shelf
from sessile.engine.corpora import CorpusDesk

PATIENCE_S = 30.0
VOCAB_SIZE = 100


@pytest.fixture
def desk() -> CorpusDesk:
    return CorpusDesk(Shelf(), VOCAB_SIZE)


def saved(folder: Path, name: str, *tokens: int) -> Path:
    path = folder / f"{name}.corpus"
    CorpusIndex.build([np.array(tokens, np.int32)]).save(path)
    return path


def add(desk: CorpusDesk, op: int, corpus: str, path: Path, *, tenant: str = "") -> None:
    checksum = stored_checksum(path).hex() if path.exists() else ""
    desk.receive(AddCorpus(op=op, corpus=corpus, tenant=tenant, path=str(path), checksum=checksum))


def replies_of(desk: CorpusDesk, count: int) -> dict[int, Reply]:
    """The answers that come, by op, after the desk has had time to read."""
    found: dict[int, Reply] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < deadline_s, "it did not answer in time"
        found |= {reply.op: reply for reply in desk.take_replies()}
    return found


def on_shelf(desk: CorpusDesk) -> dict[tuple[str, str], int]:
    return {(entry.tenant, entry.corpus_id): entry.index.tokens for entry in desk._shelf.snapshot.entries}


def test_h44_a_file_that_was_read_is_on_the_shelf_only_once_the_loop_asks(desk: CorpusDesk, tmp_path: Path) -> None:
    add(desk, 1, "c", saved(tmp_path, "c", 1, 2, 3))
    deadline_s = time.monotonic() + PATIENCE_S
    while not desk._loaded:
        assert time.monotonic() < deadline_s
    assert on_shelf(desk) == {} and desk.is_loading
    (reply,) = desk.take_replies()
    assert reply.value == Outcome({"tokens": 3, "documents": 1, "bytes": 28})
    assert on_shelf(desk) == {("", "c"): 3} and not desk.is_loading


def test_h44_of_two_loads_of_one_name_the_later_one_stays(desk: CorpusDesk, tmp_path: Path) -> None:
    add(desk, 1, "c", saved(tmp_path, "long", *range(1000)))
    add(desk, 2, "c", saved(tmp_path, "short", 1))
    replies = replies_of(desk, 2)
    assert replies[2].error is None
    assert on_shelf(desk) == {("", "c"): 1}


def test_h44_a_corpus_that_is_removed_while_it_is_read_never_appears(desk: CorpusDesk, tmp_path: Path) -> None:
    add(desk, 1, "c", saved(tmp_path, "c", 1, 2, 3))
    desk.receive(RemoveCorpus(op=2, corpus="c"))
    replies = replies_of(desk, 2)
    assert replies[2].value == Outcome({"removed": True})
    error = replies[1].error
    assert error is not None and (error.status, error.code) == (409, "cancelled")
    assert on_shelf(desk) == {}


def test_h47_removing_what_is_not_there_says_so(desk: CorpusDesk) -> None:
    desk.receive(RemoveCorpus(op=1, corpus="c"))
    assert replies_of(desk, 1)[1].value == Outcome({"removed": False})


def test_an_index_with_a_token_that_the_model_has_not_is_refused(desk: CorpusDesk, tmp_path: Path) -> None:
    add(desk, 1, "c", saved(tmp_path, "c", 1, VOCAB_SIZE, 3))
    error = replies_of(desk, 1)[1].error
    assert error is not None and (error.status, error.code) == (422, "bad_index")
    assert f"token {VOCAB_SIZE}" in error.message
    assert on_shelf(desk) == {}


@pytest.mark.parametrize("harm", ["truncated", "damaged", "foreign", "gone", "other"])
def test_h44_a_file_that_is_no_good_leaves_what_was_there(desk: CorpusDesk, tmp_path: Path, harm: str) -> None:
    add(desk, 1, "c", saved(tmp_path, "c", 1, 2, 3))
    assert replies_of(desk, 1)[1].error is None
    path = saved(tmp_path, "new", *range(100))
    whole, checksum = path.read_bytes(), stored_checksum(path).hex()
    if harm == "gone":
        path.unlink()
    elif harm == "other":
        path = saved(tmp_path, "other", 7)
    else:
        path.write_bytes({"truncated": whole[:-4], "damaged": whole[:-1] + b"\x7f", "foreign": b"text" * 99}[harm])
    desk.receive(AddCorpus(op=2, corpus="c", path=str(path), checksum=checksum))
    error = replies_of(desk, 1)[2].error
    assert error is not None
    assert (error.status, error.code) == ((500, "unreadable_index") if harm == "gone" else (422, "bad_index"))
    assert on_shelf(desk) == {("", "c"): 3}
    add(desk, 3, "d", saved(tmp_path, "d", 1))
    assert replies_of(desk, 1)[3].error is None, "the reader lives on"


def test_what_drafts_have_come_to_is_counted_by_corpus_until_it_is_replaced(desk: CorpusDesk, tmp_path: Path) -> None:
    for op, tenant in ((1, ""), (2, "t")):
        add(desk, op, "c", saved(tmp_path, "c", 1, 2, 3), tenant=tenant)
    replies_of(desk, 2)
    for offered, accepted in ((3, 2), (4, 0), (2, 2)):
        desk._shelf.note("t", "c", offered, accepted)
    desk._shelf.note("gone", "c", 1, 1)
    desk.receive(GetCorpora(3))
    own = CorpusUse(corpus="c", tenant="t", drafts_offered=9, drafts_accepted=4, accepted_by_length=(1, 0, 2))
    assert replies_of(desk, 1)[3].value == CorpusUses([CorpusUse(corpus="c"), own])
    add(desk, 4, "c", saved(tmp_path, "c2", 1), tenant="t")
    replies_of(desk, 1)
    desk.receive(GetCorpora(5))
    assert replies_of(desk, 1)[5].value == CorpusUses([CorpusUse(corpus="c"), CorpusUse(corpus="c", tenant="t")])
