"""The drafter as the core sees it: sources that come and go, tenants, what is learned, and the same drafts always."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.contract.drafting import DraftWish, SourceUse
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.drafter import LookupDrafter, LookupLine
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf

ROOT = Path(__file__).resolve().parents[2]
FREE = StepTimes((1, 1000), (1_000_000, 1_000_001))
CONTEXT = [1, 2, 3, 4]


def index_of(*documents: Sequence[int]) -> CorpusIndex:
    return CorpusIndex.build([np.array(document, np.int32) for document in documents])


def shelf_of(*corpora: tuple[str, str, list[list[int]]]) -> Shelf:
    shelf = Shelf()
    for tenant, corpus_id, documents in corpora:
        shelf.put(tenant, corpus_id, index_of(*documents))
    return shelf


def line_of(
    drafter: LookupDrafter,
    tokens: Sequence[int] = CONTEXT,
    tenant: str = "",
    corpora: tuple[str, ...] | None = None,
    drafts_max: int = 8,
) -> LookupLine:
    index = drafter.new_index()
    index.extend(np.array(tokens, np.int32).tobytes())
    return drafter.start(index, DraftWish(tenant, corpora, drafts_max))


def drafts(drafter: LookupDrafter, line: LookupLine, cap: int = 8) -> list[int]:
    return [int(token) for token in drafter.draft([line], [cap])[0]]


def test_a_draft_is_what_followed_in_a_corpus() -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[0, 1, 2, 3, 4, 5, 6, 7]])), FREE)
    assert drafts(drafter, line_of(drafter)) == [5, 6, 7]


@pytest.mark.parametrize(("cap", "drafts_max", "count"), [(2, 8, 2), (8, 1, 1), (0, 8, 0), (8, 0, 0)])
def test_no_more_is_drafted_than_step_and_request_allow(cap: int, drafts_max: int, count: int) -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[*CONTEXT, 5, 6, 7]])), FREE)
    assert len(drafts(drafter, line_of(drafter, drafts_max=drafts_max), cap)) == count


def test_a_line_that_matches_nothing_needs_no_late_part() -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[7, 8, 9]])), FREE)
    assert drafter.limits([line_of(drafter)], [8], 1) == [0]


def test_limits_follow_the_match_at_the_known_end() -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[*range(40), 50, 51]])), FREE)
    long, none = line_of(drafter, range(40)), line_of(drafter, [99])
    assert drafter.limits([long, none], [8, 8], 2) == [8, 0]


def test_limits_are_no_more_than_a_line_has_a_use_for() -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[*range(40), 50, 51]])), FREE)
    lines = [line_of(drafter, range(40)), line_of(drafter, range(40), drafts_max=2), line_of(drafter, range(40))]
    assert drafter.limits(lines, [3, 5, 8], 3) == [3, 2, 8]


def test_h50_at_the_end_of_an_answer_a_late_part_can_bring_little_and_is_not_begun() -> None:
    drafter = LookupDrafter(shelf_of(), StepTimes((1, 1000), (1_000, 1_001), late_ns=900))
    line = line_of(drafter, [*range(12)] * 4)
    assert drafter.limits([line], [8], 1) == [8]
    assert drafter.limits([line], [1], 1) == [0]


def test_the_longest_match_of_sequence_and_corpora_counts() -> None:
    shelf = shelf_of(("", "a", [[3, 4, 9]]), ("", "b", [[7, 2, 3, 4, 9]]))
    drafter = LookupDrafter(shelf, FREE)
    assert drafter.matches([line_of(drafter), line_of(drafter, [4]), line_of(drafter, [8] * 5)]) == [3, 1, 4]


def test_h50_limits_are_zero_where_verifying_costs_as_much_as_a_step() -> None:
    shelf = shelf_of(("", "docs", [[*range(40), 50, 51]]))
    drafter = LookupDrafter(shelf, StepTimes((1, 2), (1_000, 2_000)))
    assert drafter.limits([line_of(drafter, range(40))], [8], 1) == [0]


def test_h50_a_line_whose_drafts_always_fail_is_left_alone() -> None:
    text = [*range(40, 46), *CONTEXT]
    drafter = LookupDrafter(shelf_of(("", "docs", [[*text, 5, 6]])), StepTimes((1, 2, 9), (100, 130, 200)))
    line = line_of(drafter, text)
    assert drafter.limits([line], [8], 1) != [0]
    for _ in range(12):
        drafter.draft([line], [4])
        drafter.settled(line, 0)
    assert drafter.limits([line], [8], 1) == [0]


def test_h50_to_begin_to_draft_takes_more_than_to_go_on() -> None:
    """The step behind drafts is late in any case."""
    drafter = LookupDrafter(shelf_of(), StepTimes((1, 1000), (1_000, 1_001), late_ns=4_000))
    line = line_of(drafter, [*range(12)] * 4)
    assert drafter.limits([line], [8], 1) == [0]
    assert drafts(drafter, line, 2) == [0, 1]
    assert drafter.limits([line], [8], 1) == [8]
    drafter.settled(line, 2)
    assert drafter.limits([line], [8], 1) == [0]


def test_h44_a_corpus_that_is_replaced_between_two_steps_is_the_new_one_in_the_second() -> None:
    shelf = shelf_of(("", "docs", [[*CONTEXT, 5]]))
    drafter = LookupDrafter(shelf, FREE)
    line = line_of(drafter)
    assert drafts(drafter, line) == [5]
    shelf.put("", "docs", index_of([*CONTEXT, 6]))
    assert drafts(drafter, line) == [6]
    shelf.remove("", "docs")
    assert drafts(drafter, line) == []


def test_h44_a_removed_corpus_is_kept_alive_by_no_line_and_no_drafter() -> None:
    shelf = shelf_of(("", "docs", [[*CONTEXT, 5]]))
    drafter = LookupDrafter(shelf, FREE)
    line = line_of(drafter)
    drafts(drafter, line)
    watched = weakref.ref(shelf.snapshot.entries[0].index)
    shelf.remove("", "docs")
    gc.collect()
    assert watched() is None
    assert drafts(drafter, line) == []


def test_h44_corpora_that_come_and_go_while_steps_read_them_give_right_drafts_or_none() -> None:
    shelf = Shelf()
    drafter = LookupDrafter(shelf, FREE, threads=2)
    lines = [line_of(drafter) for _ in range(40)]
    seen: list[tuple[int, ...]] = []

    def churn(number: int) -> None:
        for turn in range(40):
            filler = np.random.default_rng(turn).integers(100, 200, 500).tolist()
            shelf.put("", f"{number}", index_of(filler, [*CONTEXT, 10 + number, 20 + number]))
            if turn % 3 == 2:
                shelf.remove("", f"{number}")

    writers = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen += [tuple(int(token) for token in each) for each in drafter.draft(lines, [2] * len(lines))]
    for writer in writers:
        writer.join()
    assert drafts(drafter, lines[0], cap=2) in ([10, 20], [11, 21], [12, 22])
    assert set(seen) <= {(), (10, 20), (11, 21), (12, 22)}
    drafter.close()


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=3)


@settings(max_examples=20)
@given(corpora=st.lists(texts, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_h45_neither_order_of_insertion_nor_threads_change_a_draft(corpora: list[list[list[int]]], seed: int) -> None:
    named = [("", f"corpus-{number}", corpus) for number, corpus in enumerate(corpora)]
    contexts = np.random.default_rng(seed).integers(0, 3, (160, 20)).tolist()
    outcomes = []
    for order, threads in ((named, 1), (named[::-1], 1), (named, 4)):
        drafter = LookupDrafter(shelf_of(*order), FREE, threads=threads)
        lines = [line_of(drafter, context) for context in contexts]
        outcome: list[object] = []
        for _ in range(3):
            outcome.append(list(drafter.limits(lines, [8] * len(lines), len(lines))))
            outcome.append([list(each) for each in drafter.draft(lines, [6] * len(lines))])
            for line in lines:
                drafter.settled(line, 0)
        outcomes.append(outcome + [line.uses() for line in lines])
        drafter.close()
    assert outcomes[0] == outcomes[1] == outcomes[2]


HASHED = """
import numpy as np
from tests.unit.test_draft_drafter import FREE, line_of, shelf_of
from sessile.draft.drafter import LookupDrafter
random = np.random.default_rng(1)
corpora = [("", f"corpus {number}", random.integers(0, 3, (4, 60)).tolist()) for number in range(20)]
drafter = LookupDrafter(shelf_of(*corpora), FREE)
for context in random.integers(0, 3, (50, 12)).tolist():
    line = line_of(drafter, context)
    print(drafter.limits([line], [8], 1), drafter.draft([line], [8]), line.uses())
"""


def test_h45_hash_seeds_do_not_change_a_draft() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == 50


def test_h46_more_corpora_than_drafts_leave_none_unread() -> None:
    others = [("", f"other-{number}", [[50 + number, 60, 70, 80]]) for number in range(100)]
    drafter = LookupDrafter(shelf_of(*others, ("", "right", [[*CONTEXT, 5, 6, 7, 8]])), FREE)
    assert drafts(drafter, line_of(drafter), cap=4) == [5, 6, 7, 8]


def test_h51_a_corpus_of_another_tenant_is_never_drafted_from() -> None:
    shelf = shelf_of(("x", "docs", [[*CONTEXT, 5]]), ("", "docs", [[3, 4, 6]]))
    drafter = LookupDrafter(shelf, FREE)
    assert drafts(drafter, line_of(drafter, tenant="x")) == [5]
    assert drafts(drafter, line_of(drafter, tenant="y")) == [6]


def test_a_request_that_names_corpora_is_drafted_for_from_those() -> None:
    shelf = shelf_of(("", "a", [[*CONTEXT, 5]]), ("", "b", [[3, 4, 6]]))
    drafter = LookupDrafter(shelf, FREE)
    assert drafts(drafter, line_of(drafter, corpora=("b",))) == [6]
    assert drafts(drafter, line_of(drafter, corpora=())) == []


def test_uses_tell_of_each_source_what_was_offered_and_accepted() -> None:
    shelf = shelf_of(("", "b", [[8, 9, 10, 11]]), ("", "a", [[*CONTEXT, 5, 6, 7]]))
    drafter = LookupDrafter(shelf, FREE)
    line = line_of(drafter)
    drafts(drafter, line)
    drafter.settled(line, 2)
    line.index.extend(np.array([5, 6, 8, 9], np.int32).tobytes())
    drafts(drafter, line)
    drafter.settled(line, 2)
    assert line.uses() == [SourceUse("corpus:a", 3, 2), SourceUse("corpus:b", 2, 2)]


def test_a_source_that_is_wrong_again_and_again_gives_way_to_one_that_is_right() -> None:
    shelf = shelf_of(("", "liar", [[7, 3, 4, 50]]), ("", "right", [[8, 3, 4, 60]]))
    drafter = LookupDrafter(shelf, FREE)
    line = line_of(drafter, [9, 3, 4])
    first = drafts(drafter, line, cap=1)
    for _ in range(3):
        drafter.settled(line, 0)
        drafts(drafter, line, cap=1)
    assert first != drafts(drafter, line, cap=1)


def test_what_one_line_learned_is_not_known_to_another() -> None:
    shelf = shelf_of(("", "liar", [[7, 3, 4, 50]]), ("", "right", [[8, 3, 4, 60]]))
    drafter = LookupDrafter(shelf, FREE)
    line = line_of(drafter, [9, 3, 4])
    first = drafts(drafter, line, cap=1)
    for _ in range(3):
        drafter.settled(line, 0)
        drafts(drafter, line, cap=1)
    assert drafts(drafter, line_of(drafter, [9, 3, 4]), cap=1) == first


def test_the_sequence_itself_counts_more_than_a_corpus() -> None:
    drafter = LookupDrafter(shelf_of(("", "docs", [[1, 2, 3, 9]])), FREE)
    assert drafts(drafter, line_of(drafter, [1, 2, 3, 4, 1, 2, 3]), cap=1) == [4]


def test_without_lines_there_is_nothing_to_do() -> None:
    drafter = LookupDrafter(Shelf(), FREE)
    assert (drafter.limits([], [], 5), drafter.draft([], [])) == ([], [])


def test_a_drafter_can_be_made_ready_before_its_first_step() -> None:
    drafter = LookupDrafter(Shelf(), FREE)
    drafter.prepare()
    assert drafts(drafter, line_of(drafter)) == []
