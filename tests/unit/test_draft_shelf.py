"""The shelf: whoever reads a snapshot keeps it, whatever is put there or taken away meanwhile."""

import gc
import threading
import weakref

import numpy as np
import pytest

from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.shelf import Shelf


def index(token: int = 1) -> CorpusIndex:
    return CorpusIndex.build([np.full(10, token, np.int32)])


def names(shelf: Shelf) -> list[tuple[str, str]]:
    return [(entry.tenant, entry.corpus_id) for entry in shelf.snapshot.entries]


def test_h44_a_snapshot_stays_as_it_was_taken() -> None:
    shelf = Shelf()
    old = index()
    shelf.put("", "docs", old)
    taken = shelf.snapshot
    shelf.put("", "docs", index(2))
    shelf.remove("", "docs")
    assert [entry.index for entry in taken.entries] == [old]


def test_h44_an_index_goes_when_the_last_reader_lets_go() -> None:
    shelf = Shelf()
    shelf.put("", "docs", index())
    taken = shelf.snapshot
    watched = weakref.ref(taken.entries[0].index)
    shelf.remove("", "docs")
    gc.collect()
    assert watched() is not None
    del taken
    gc.collect()
    assert watched() is None


def test_h45_entries_are_in_the_order_of_their_names_however_they_came() -> None:
    one, other = Shelf(), Shelf()
    wanted = [("", "a"), ("", "b"), ("x", "a"), ("y", "a")]
    for tenant, corpus_id in wanted:
        one.put(tenant, corpus_id, index())
    for tenant, corpus_id in reversed(wanted):
        other.put(tenant, corpus_id, index())
    assert names(one) == names(other) == wanted


def test_h51_a_tenant_sees_its_own_corpora_and_the_operators() -> None:
    shelf = Shelf()
    for tenant in ("", "x", "y"):
        shelf.put(tenant, "docs", index())
    assert [entry.tenant for entry in shelf.snapshot.visible_to("x", None)] == ["", "x"]
    assert [entry.tenant for entry in shelf.snapshot.visible_to("", None)] == [""]


@pytest.mark.parametrize(("wanted", "found"), [(("b", "nothing"), ["b"]), ((), []), (None, ["a", "b"])])
def test_a_request_that_names_corpora_gets_those_alone(wanted: tuple[str, ...] | None, found: list[str]) -> None:
    shelf = Shelf()
    shelf.put("", "a", index())
    shelf.put("", "b", index())
    assert [entry.corpus_id for entry in shelf.snapshot.visible_to("x", wanted)] == found


def test_removing_tells_whether_it_was_there() -> None:
    shelf = Shelf()
    shelf.put("x", "docs", index())
    version = shelf.snapshot.version
    assert not shelf.remove("y", "docs") and shelf.snapshot.version == version
    assert shelf.remove("x", "docs") and names(shelf) == []


def test_h44_many_writers_at_once_lose_nothing() -> None:
    shelf, one = Shelf(), index()

    def write(number: int) -> None:
        for corpus in range(50):
            shelf.put("", f"{number}-{corpus}", one)
            if corpus % 2:
                shelf.remove("", f"{number}-{corpus}")

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(shelf.snapshot.entries) == 8 * 25
    assert shelf.snapshot.version == 8 * 75
