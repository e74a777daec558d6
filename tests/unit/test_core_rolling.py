"""Audit level 1: what it finds, how much it looks at, and that nothing that moves between two looks alarms it."""

from collections.abc import Callable

import pytest

from sessile.bench.audit import AuditBenchOptions, filled_machine
from sessile.core.books import Books
from sessile.core.ledger import FREE, TREE
from sessile.core.rolling import LOOK_MIN, LOOK_STEPS, ROUND_LOOKS, RollingAudit
from sessile.errors import AuditError
from tests.unit.stage import Stage
from tests.unit.test_core_audit import (
    PAGES,
    ROWS,
    a_node_has_tokens_without_pages,
    a_pin_is_dropped_for_another,
    a_pin_is_forgotten,
    a_row_has_another_occupant,
    books_of,
    busy_stage,
    two_owners_swap_a_page,
)

LENGTHS = [plant for plant in ROWS if "request 2: " in ROWS[plant] or "request 2 (has|knows)" in ROWS[plant]]


def looked_round(books: Books) -> RollingAudit:
    """A rolling audit that has looked at everything once. Raises what it finds."""
    rolling = RollingAudit(books)
    rounds = books.totals.audit_checks
    for _ in range(ROUND_LOOKS):
        rolling.look()
        if books.totals.audit_checks > rounds:
            return rolling
    raise AssertionError("the round does not end")


# -- what it finds ------------------------------------------------------------------------------------------------


def a_page_stands_in_for_another(books: Books) -> None:
    """The free list names a page twice and another never: all tags, balances and lengths stay right."""
    books.ledger.free_stack[0] = books.ledger.free_stack[-1]


def a_page_of_the_tree_stands_in_for_another(books: Books) -> None:
    first, second = [node for node in books.tree.walk() if not node.children][:2]
    first.pages[-1] = second.pages[-1]


def an_account_has_no_holder(books: Books) -> None:
    leaked.append(books.ledger.open())
    books.ledger.draw(leaked[-1], 2)


def a_page_is_tagged_free_but_in_no_list(books: Books) -> None:
    ledger = books.ledger
    page = ledger.free_stack.pop(0)
    assert ledger.tags[page] == FREE


leaked = []
"""Keeps leases alive, so that they are not found for being lost."""
LEAKS = (
    a_page_stands_in_for_another, a_page_of_the_tree_stands_in_for_another, an_account_has_no_holder,
    a_page_is_tagged_free_but_in_no_list,
)  # fmt: skip
PINS = (a_pin_is_forgotten, a_pin_is_dropped_for_another, a_node_has_tokens_without_pages)
FOUND = (*PAGES, *LEAKS, *PINS, *LENGTHS, a_row_has_another_occupant)


@pytest.mark.parametrize("plant", FOUND, ids=lambda plant: plant.__name__)
def test_h06_h07_a_round_of_looks_finds_a_corruption(plant: Callable[[Books], None]) -> None:
    books = books_of(busy_stage(audit_level=0))
    kept = [request.lease for request in books.requests.values()]
    plant(books)
    with pytest.raises(AuditError):
        looked_round(books)
    assert books.totals.audit_failures == 1
    assert kept
    for lease in leaked:
        lease.abandon()


def test_h07_a_violation_under_load_is_found_by_the_machine_itself() -> None:
    stage = Stage(pages=200, rows=8, audit_level=1)
    for key in range(8):
        stage.submit(key, [key] * 5, max_new_tokens=60)
    stage.step(3)
    tags, books = books_of(stage).ledger.tags, books_of(stage)
    mine, theirs = (books.requests[key].lease.pages[0] for key in (0, 7))  # type: ignore[union-attr]
    tags[mine], tags[theirs] = tags[theirs], tags[mine]
    with pytest.raises(AuditError, match=r"request \d holds pages that are tagged otherwise: page \d+ belongs to"):
        stage.step(30)


def test_h07_who_holds_the_page_is_named() -> None:
    books = books_of(busy_stage(audit_level=0))
    two_owners_swap_a_page(books)
    with pytest.raises(AuditError) as caught:
        looked_round(books)
    assert caught.value.keys == (2,) or caught.value.sessions == (books.sessions["", "parked"].serial,)


# -- how much it looks at -----------------------------------------------------------------------------------------


@pytest.fixture
def large() -> Books:
    return filled_machine(AuditBenchOptions(requests=16, sessions=200, nodes=400, pages=60_000))._books


def test_h07_every_page_is_looked_at_within_a_round(large: Books) -> None:
    rolling = looked_round(large)
    seen = rolling._seen_index
    lists = [large.ledger.free_stack, *(node.pages for node in large.tree.walk())]
    lists += [large.ledger.in_slot(slot)[2] for slot in range(5, large.ledger.slots)]
    assert sum(map(len, lists)) == large.ledger.pages_total - 1
    assert all(seen[page] == index for pages in lists for index, page in enumerate(pages))


def test_a_round_takes_less_than_30_s_of_steps_of_6_ms(large: Books) -> None:
    rolling, rounds, looks = RollingAudit(large), large.totals.audit_checks, 0
    while large.totals.audit_checks == rounds:
        rolling.look()
        looks += 1
    places = large.ledger.pages_total + large.ledger.slots + large.tree.nodes
    assert places / (rolling.look_size + 1) <= looks <= ROUND_LOOKS <= 5000 // LOOK_STEPS


def test_a_look_is_bounded_whatever_the_length_of_a_list(large: Books) -> None:
    rolling = RollingAudit(large)
    rolling.look()
    unseen = sum(1 for index in rolling._seen_index if index == 0)
    assert large.ledger.pages_total - unseen <= rolling.look_size == LOOK_MIN


# -- what moves meanwhile -----------------------------------------------------------------------------------------


def test_h20_a_half_that_is_split_off_to_a_place_that_was_passed_is_looked_at() -> None:
    stage = Stage(pages=400, rows=4, audit_level=0, chunk=400)
    for key in range(4):
        stage.submit(key, [key + 1] * 161)
        stage.run()
    books = books_of(stage)
    rolling = RollingAudit(books)
    books.tree.evict_oldest(1000)
    vacant = books.tree.places.index(None)
    last = max((node for node in books.tree.walk() if len(node.pages) > 10), key=lambda node: node.place)
    while not any(node.looked for node in books.tree.walk() if node.place > vacant):
        rolling.look()
    upper = books.tree._split(last, 10)
    assert (upper.place, upper.looked, last.looked) == (vacant, 0, 0)
    rounds = books.totals.audit_checks
    while books.totals.audit_checks == rounds:
        rolling.look()
    assert [rolling._seen_index[page] for page in upper.pages] == list(range(10))
    assert {rolling._seen_node[page] for page in upper.pages} == {upper.place}


def test_looks_between_steps_of_a_busy_machine_raise_no_alarm() -> None:
    stage = Stage(pages=40, rows=4, audit_level=1)
    for session in "ab":
        stage.open(session)
    for turn in range(12):
        for index, session in enumerate("ab"):
            stage.submit(100 * turn + index, [turn + index] * 7, session=session, max_new_tokens=3)
        stage.submit(100 * turn + 2, [turn % 3] * 13, max_new_tokens=9)
        stage.run()
    stage.close("a")
    stage.submit(9999, [1] * 30)
    stage.run()
    assert (stage.stats().audit_failures_total, stage.stats().evicted_pages_total > 0) == (0, True)
    assert books_of(stage).ledger.balance(TREE) > 0
