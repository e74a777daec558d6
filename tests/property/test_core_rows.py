"""Steps that a row table only notes leave in its columns what steps leave that are written one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.core.rows import COLUMNS, COUNTED, OUTPUT_COLUMNS, Column, Flags, RowTable, pack_row
from sessile.units import RowId

ROWS = 4
LEFT = (9, 40)
"""Tokens that row 0 may still get, and the others."""
STOP = 7


def seated() -> RowTable[str]:
    """A table of rows that decode, at different places of their outputs, all of them plain."""
    table: RowTable[str] = RowTable(ROWS)
    table.provide_for((STOP,), -1, constrained=False)
    rows = [table.take(f"request {number}") for number in range(ROWS)]
    starts = [
        start(
            key=row + 5, known=10 + row, filled=3 * row, settled=9 + row, planned=9 + row,
            kv_goal=10 + row + LEFT[row > 0], pages=9, prompt=2,
        )
        for row in rows
    ]  # fmt: skip
    table.seat(rows, starts, [(STOP,)] * ROWS)
    return table


def start(**figures: int) -> bytes:
    """The columns of a row that is live, all others 0."""
    return pack_row(*(dict.fromkeys(COLUMNS, 0) | {"live": 1} | figures).values())


def choose(rows: list[int]) -> tuple[Column, Flags]:
    """Rows twice: in the order of a plan, and as bool[rows_max]."""
    flags = np.zeros(ROWS, np.bool_)
    flags[rows] = True
    return np.array(rows, np.int64), flags


def assert_same(one: RowTable[str], other: RowTable[str], names: list[str]) -> None:
    for name in names:
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name


tokens = st.lists(st.integers(8, 99), min_size=ROWS, max_size=ROWS)
moves = st.lists(
    st.one_of(
        st.sampled_from(["plan", "ask"]),
        tokens,
        st.sampled_from([sorted(COUNTED)[:3], ["planned"], ["outputs"], ["known", "pending"]]),
    ),
    max_size=40,
)


@given(moves, st.permutations(range(ROWS)), st.integers(2, ROWS))
def test_what_was_only_noted_is_there_for_whoever_looks(
    moves: "list[str | list[int] | list[str]]", order: list[int], count: int
) -> None:
    noted, written = seated(), seated()
    active, chosen = choose(order[:count])
    for table in (noted, written):
        table.note_plain(chosen)
    step, planned, appended, told = 0, 0, 0, written.known.copy()
    for move in moves:
        if move == "plan":
            step, planned = step + 1, planned + 1
            noted.plan_once_more(chosen, step)
            written.plan_one(chosen, step)
        elif move and isinstance(move[0], int):
            if appended == planned:
                continue
            said = np.array(move[:count], np.int32)
            keys = noted.append_once_more(active, chosen, said)
            ended = bool((written.known[active] + 1 > written.kv_goal[active]).any())
            assert (keys is None) == ended
            if keys is None:
                break
            appended += 1
            assert keys.tolist() == (active + 5).tolist()
            written.settle_one(chosen)
            written.append_one(active, chosen, said)
        elif move == "ask":
            run = noted._run
            assert noted.planned_so_far().tolist() == written.planned.tolist()
            assert noted._run is run, "nobody had to write"
            known, pending = noted.reached(active)
            assert (known.tolist(), pending.tolist()) == (
                written.known[active].tolist(), written.pending[active].tolist()
            )
            for which in (np.arange(count), np.arange(0, count, 2)):
                asked = active[which]
                counts = (known - told[active])[which]
                newest = noted.newest_noted(active, which, counts)
                if newest is not None:
                    assert newest.tolist() == written.newest(asked, counts).tolist()
                    assert newest.flags.c_contiguous and newest.flags.writeable
                    assert noted._run is run, "nobody had to write"
            told[active] = known
        else:
            assert_same(noted, written, list(move))
    assert_same(noted, written, [*sorted(COUNTED), "outputs"])


def test_how_far_rows_are_and_what_they_said_is_known_without_writing_what_was_noted() -> None:
    table = seated()
    active, chosen = choose([3, 1])
    table.note_plain(chosen)
    for step, said in enumerate(([8, 9], [10, 11], [12, 13])):
        table.plan_once_more(chosen, step)
        assert table.append_once_more(active, chosen, np.array(said, np.int32)) is not None
    table.plan_once_more(chosen, 3)
    run = table._run
    known, pending = table.reached(active)
    assert (known.tolist(), pending.tolist()) == ([16, 14], [1, 1])
    ahead = table.planned_so_far()
    assert ahead[active].tolist() == (table._planned[active] + 4).tolist() and ahead is not table._planned
    both, second = np.arange(2), np.array([1])
    for count, expected in ((1, [12, 13]), (3, [8, 10, 12, 9, 11, 13])):
        newest = table.newest_noted(active, both, np.full(2, count))
        assert newest is not None and newest.tolist() == expected and newest.flags.c_contiguous
        newest = table.newest_noted(active, second, np.array([count]))
        assert newest is not None and newest.tolist() == expected[count:] and newest.flags.c_contiguous
    for counts in ([0, 0], [1, 2], [4, 4]):
        assert table.newest_noted(active, both, np.array(counts)) is None
    others = table.newest_noted(active.copy(), both, np.ones(2, np.int64))
    assert others is None, "an array of its own may be of other rows"
    assert table._run is run, "nothing was written"
    steps = table.noted_steps(active)
    assert steps is not None and [step.tolist() for step in steps] == [[8, 9], [10, 11], [12, 13]]
    assert table.noted_steps(active.copy()) is None
    assert table.reached(np.array([1]))[0].tolist() == [14] and table._run is None
    assert table.noted_steps(active) is None, "they were written"


def test_a_step_is_not_noted_if_a_row_may_not_be_plain() -> None:
    table = seated()
    active, chosen = choose([0, 2])
    said = np.array([8, 9], np.int32)
    assert table.append_once_more(active, chosen, said) is None, "nobody said so"
    table.note_plain(chosen)
    assert table.append_once_more(*choose([0, 2]), said) is None, "of others"
    assert table.append_once_more(active, chosen, said) is not None
    table.make_slow(2)
    assert table.append_once_more(active, chosen, said) is None, "since then one has become slow"
    assert table.known.tolist() == [11, 11, 13, 13]


@pytest.mark.parametrize("place", [0, 1])
def test_a_step_is_not_noted_if_a_token_ends_a_row(place: int) -> None:
    table = seated()
    active, chosen = choose([3, 1])
    table.note_plain(chosen)
    said = np.array([8, 9], np.int32)
    assert table.append_once_more(active, chosen, said) is not None
    said = said.copy()
    said[place] = STOP
    assert table.append_once_more(active, chosen, said) is None
    assert table.last_token[active].tolist() == [8, 9]


def test_steps_of_other_rows_are_noted_behind_what_was_noted_of_some() -> None:
    table = seated()
    (some, chosen), (others, other_chosen) = choose([0, 1]), choose([1, 2])
    table.plan_once_more(chosen, 4)
    table.note_plain(chosen)
    assert table.append_once_more(some, chosen, np.array([8, 9], np.int32)) is not None
    table.plan_once_more(other_chosen, 5)
    table.note_plain(other_chosen)
    assert table.append_once_more(others, other_chosen, np.array([10, 11], np.int32)) is not None
    assert table.known.tolist() == [11, 13, 13, 13]
    assert table.last_step.tolist() == [4, 5, 5, 0]
    assert table.outputs[1, 3:5].tolist() == [9, 10]


def test_the_same_rows_may_come_in_another_order() -> None:
    table = seated()
    _, chosen = choose([1, 2])
    table.note_plain(chosen)
    for order, said in (([1, 2], [8, 9]), ([2, 1], [10, 11]), ([2, 1], [12, 13])):
        assert table.append_once_more(np.array(order, np.int64), chosen, np.array(said, np.int32)) is not None
    assert table.outputs[1, 3:6].tolist() == [8, 11, 13]
    assert table.outputs[2, 6:9].tolist() == [9, 10, 12]


def test_a_row_that_is_taken_meanwhile_counts_from_where_it_begins() -> None:
    table = seated()
    _, chosen = choose([0, 1])
    table.plan_once_more(chosen, 1)
    table.give_back(RowId(1), table.occupant(1))
    row = table.take("the next")
    table.seat([row], [start(key=9, known=5, kv_goal=9, prompt=5)], [()])
    assert table.planned.tolist() == [10, 0, 11, 12]


def test_nothing_is_noted_that_a_full_row_has_no_place_for() -> None:
    table = seated()
    table.kv_goal[:] = 10_000
    active, chosen = choose([3])
    table.note_plain(chosen)
    noted = 0
    while table.append_once_more(active, chosen, np.array([8], np.int32)) is not None:
        noted += 1
    assert int(table.filled[3]) == 9 + noted == OUTPUT_COLUMNS - 1
