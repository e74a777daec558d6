"""Histories: append-only, shared by forks, cut anywhere; and the counters of a batch row."""

import numpy as np
import pytest

from sessile.contract.messages import pack_tokens, unpack_tokens
from sessile.core.history import History
from sessile.core.rows import COLUMNS, STOP_COLUMNS, RowTable, pack_row
from sessile.errors import OwnershipError
from sessile.units import RowId

CHUNK = 4096
"""Tokens that a history keeps in one piece."""


def line(count: int, start: int = 0) -> bytes:
    return pack_tokens(range(start, start + count))


def ids(packed: bytes) -> list[int]:
    return unpack_tokens(packed).tolist()


def history_of(*counts: int) -> History:
    """A history of 0, 1, 2 …, committed in turns of these lengths."""
    history = History()
    for count in counts:
        history.append(line(count, len(history)))
    return history


@pytest.mark.parametrize("counts", [(1,), (CHUNK,), (CHUNK + 1,), (5, CHUNK, 7), (CHUNK - 1, 1, 1), (3 * CHUNK,)])
def test_a_history_is_its_turns_one_after_the_other(counts: tuple[int, ...]) -> None:
    history = history_of(*counts)
    assert len(history) == sum(counts)
    assert history.slice(0, len(history)) == line(sum(counts))


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (0, 1), (CHUNK - 1, CHUNK), (CHUNK, CHUNK + 1), (CHUNK - 3, CHUNK + 3), (7, 2 * CHUNK + 5), (9999, 9999)],
)
def test_a_slice_may_begin_and_end_anywhere(start: int, stop: int) -> None:
    assert ids(history_of(10_000).slice(start, stop)) == list(range(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6), (6, 6)])
def test_a_slice_of_what_is_not_there_is_refused(start: int, stop: int) -> None:
    with pytest.raises(AssertionError, match="of a history of 5 tokens"):
        history_of(5).slice(start, stop)


def test_h28_what_a_slice_shows_cannot_be_written() -> None:
    history = history_of(100)
    assert isinstance(history.slice(10, 20), bytes)
    assert ids(history.slice(10, 11)) == [10]


def test_h28_what_was_committed_does_not_follow_its_source() -> None:
    history = History()
    tokens = bytearray(line(5))
    history.append(tokens)
    tokens[:] = line(5, 99)
    assert ids(history.slice(0, 5)) == [0, 1, 2, 3, 4]


def test_a_slice_stays_right_while_the_history_grows() -> None:
    history = history_of(10)
    view = history.slice(0, 10)
    history.append(line(2 * CHUNK, 10))
    assert view == line(10)


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 10_000])
def test_a_fork_is_the_first_tokens(length: int) -> None:
    fork = history_of(10_000).fork(length)
    assert ids(fork.slice(0, len(fork))) == list(range(length))


@pytest.mark.parametrize("length", [3, CHUNK, CHUNK + 3])
def test_a_fork_and_its_parent_grow_apart(length: int) -> None:
    parent = history_of(CHUNK + 10)
    fork = parent.fork(length)
    fork.append(line(20, 7000))
    parent.append(line(20, 8000))
    assert ids(fork.slice(length, length + 20)) == list(range(7000, 7020))
    assert ids(parent.slice(0, CHUNK + 10)) == list(range(CHUNK + 10))
    assert ids(parent.slice(CHUNK + 10, CHUNK + 30)) == list(range(8000, 8020))


def test_a_fork_shares_every_full_chunk_and_copies_less_than_one() -> None:
    parent = history_of(2 * CHUNK + 100)
    fork = parent.fork(2 * CHUNK + 50)
    assert [mine is theirs for mine, theirs in zip(fork.chunks, parent.chunks, strict=True)] == [True, True, False]


def start_of(value: int) -> dict[str, int]:
    return dict(zip(COLUMNS, range(value, value + len(COLUMNS)), strict=True))


def take(rows: "RowTable[str]", occupant: str, stops: tuple[int, ...], value: int) -> RowId:
    row = rows.take(occupant)
    rows.provide_for(stops, -1, constrained=False)
    rows.seat([row], [pack_row(*start_of(value).values())], [stops])
    return row


def test_a_row_that_is_taken_has_all_its_counters_set_and_nothing_of_the_last_occupant() -> None:
    rows: RowTable[str] = RowTable(1)
    row = take(rows, "first", (1, 2, 3, 4), 1000)
    rows.give_back(row, "first")
    assert take(rows, "second", (9,), 50) == row
    assert {name: int(getattr(rows, name)[row]) for name in COLUMNS} == start_of(50)
    assert rows.stops[:, row].tolist() == [9, -1, -1, -1]
    assert rows.occupants == ["second"]


def test_a_row_given_back_is_neither_live_nor_plannable() -> None:
    rows: RowTable[str] = RowTable(2)
    row = take(rows, "holder", (), 1)
    rows.give_back(row, "holder")
    assert (rows.live[row], rows.plannable[row]) == (0, 0)


@pytest.mark.parametrize("change", ["seat", "give back", "stop planning", "make slow"])
def test_rows_that_are_plain_are_so_until_any_change(change: str) -> None:
    rows: RowTable[str] = RowTable(2)
    row = take(rows, "holder", (), 1)
    chosen = rows.flags_of(np.array([row]))
    assert not rows.are_plain(chosen)
    rows.note_plain(chosen)
    assert rows.are_plain(chosen)
    assert not rows.are_plain(chosen.copy())
    if change == "seat":
        take(rows, "other", (), 5)
    elif change == "give back":
        rows.give_back(row, "holder")
    elif change == "stop planning":
        rows.stop_planning(row)
    else:
        rows.make_slow(row)
        assert rows.slow[row] == 1
    assert not rows.are_plain(chosen)


def test_a_row_is_given_back_once() -> None:
    rows: RowTable[str] = RowTable(2)
    row = take(rows, "holder", (), 1)
    rows.give_back(row, "holder")
    with pytest.raises(OwnershipError, match="does not hold it"):
        rows.give_back(row, "holder")
    assert (rows.free_rows, rows.held_rows) == (2, 0)


def test_a_row_on_the_free_list_that_is_held_is_found_when_it_is_taken() -> None:
    rows: RowTable[str] = RowTable(2)
    row = take(rows, "holder", (), 1)
    rows.free_list.append(row)
    with pytest.raises(OwnershipError, match=f"row {row} was on the free list while it was held"):
        take(rows, "thief", (), 1)


def test_more_stop_tokens_than_columns_keep_the_first_ones() -> None:
    rows: RowTable[str] = RowTable(1)
    row = take(rows, "holder", tuple(range(STOP_COLUMNS + 3)), 1)
    assert rows.stops[:, row].tolist() == list(range(STOP_COLUMNS))
