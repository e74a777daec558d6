"""Every corruption that is planted is named by the audit, and nothing else is."""

from array import array
from collections.abc import Callable

import pytest

from sessile.contract.messages import Cancel, pack_tokens
from sessile.core.books import Books
from sessile.core.ledger import FREE, QUARANTINE, SCRATCH
from sessile.core.request import Request
from sessile.core.rolling import LOOK_STEPS
from sessile.core.session import ParkedKv
from sessile.errors import AuditError
from tests.unit.stage import Stage

PARKED, TURN = "parked", "running"


def busy_stage(**settings: int) -> Stage:
    """Something in every place: session "parked" idle and warm; "running" and request 2 running, 3 draining, 5 waiting.

    A step is in flight; 3 left pages in limbo; prompts are in the tree.
    """
    stage = Stage(rows=3, chunk=32, **settings)
    for session in (PARKED, TURN):
        stage.open(session)
    stage.submit(1, [1] * 9, session=PARKED)
    stage.run()
    stage.submit(2, [2] * 9, max_new_tokens=40)
    stage.submit(3, [3] * 9, max_new_tokens=40)
    stage.submit(4, [4] * 9, session=TURN, max_new_tokens=40)
    stage.submit(5, [5] * 9)
    stage.step(2)
    stage.launch()
    stage.send(Cancel(3))
    return stage


def books_of(stage: Stage) -> Books:
    return stage.machine._books


@pytest.fixture
def stage() -> Stage:
    return busy_stage()


@pytest.fixture
def books(stage: Stage) -> Books:
    return books_of(stage)


def parked(books: Books) -> ParkedKv:
    found = books.sessions["", PARKED].parked
    assert found is not None
    return found


def pages_of(books: Books, key: int) -> "array[int]":
    lease = books.requests[key].lease
    assert lease is not None
    return lease.pages


def row_of(books: Books, key: int) -> int:
    row = books.requests[key].row
    assert row is not None
    return row


def test_sound_books_pass(books: Books, stage: Stage) -> None:
    stage.machine.audit()
    assert (len(books.draining), len(books.waiting), books.ledger.limbo_pages > 0) == (1, 1, True)
    assert stage.stats().audit_failures_total == 0


# -- pages --------------------------------------------------------------------------------------------------------


def two_owners_swap_a_page(books: Books) -> None:
    mine, theirs = pages_of(books, 2), parked(books).lease.pages
    mine[0], theirs[0] = theirs[0], mine[0]


def two_tags_are_swapped(books: Books) -> None:
    tags, page, other = books.ledger._tags, pages_of(books, 2)[0], pages_of(books, 4)[0]
    tags[page], tags[other] = tags[other], tags[page]


def a_tag_is_stale(books: Books) -> None:
    books.ledger._tags[pages_of(books, 2)[0]] = FREE


def a_page_is_in_a_lease_twice(books: Books) -> None:
    pages = pages_of(books, 2)
    pages.append(pages[0])


def a_page_is_in_a_lease_twice_and_another_is_gone(books: Books) -> None:
    pages = parked(books).lease.pages
    pages[0] = pages_of(books, 2)[0]


def a_page_is_forgotten(books: Books) -> None:
    pages_of(books, 2).pop()


def a_page_in_limbo_is_free_already(books: Books) -> None:
    _, pages = next(books.ledger.limbo_by_step())
    books.ledger.free_stack.append(pages[0])


def a_free_page_is_lost(books: Books) -> None:
    books.ledger.free_stack.pop()


def a_tree_node_shows_a_page_of_a_request(books: Books) -> None:
    node = next(books.tree.walk())
    node.pages[0] = pages_of(books, 2)[0]


def two_holders_have_one_account(books: Books) -> None:
    books.requests[2].lease = books.requests[4].lease


def the_scratch_page_is_given_out(books: Books) -> None:
    books.ledger._tags[0] = books.requests[2].lease.account  # type: ignore[union-attr]
    pages_of(books, 2).append(0)
    slot = int(books.requests[2].lease.account) & 0xFFFFF  # type: ignore[union-attr]
    books.ledger._balances[slot] += 1
    books.ledger._balances[SCRATCH] -= 1


def a_page_is_in_quarantine_and_in_use(books: Books) -> None:
    page = books.ledger.free_stack[0]
    books.ledger._tags[page] = QUARANTINE
    books.ledger._balances[FREE] -= 1
    books.ledger._balances[QUARANTINE] += 1


def the_counter_of_parked_pages_is_wrong(books: Books) -> None:
    books.parked_pages += 1


PAGES: dict[Callable[[Books], None], str] = {
    two_owners_swap_a_page: "is held by sequence account .* but tagged sequence account",
    two_tags_are_swapped: "is held by sequence account .* but tagged sequence account",
    a_tag_is_stale: "FREE has a balance of .* tags",
    a_page_is_in_a_lease_twice: "request 2 holds .* pages, its account says otherwise",
    a_page_is_in_a_lease_twice_and_another_is_gone: "is held by .* but tagged",
    a_page_is_forgotten: "request 2 holds .* pages, its account says otherwise",
    a_page_in_limbo_is_free_already: "is held by FREE but tagged LIMBO",
    a_free_page_is_lost: r"\(FREE\) is held 0 times",
    a_tree_node_shows_a_page_of_a_request: "is held by TREE but tagged sequence account",
    two_holders_have_one_account: "request 4 and request 2 hold the same account",
    the_scratch_page_is_given_out: "page 0 should be SCRATCH but is tagged sequence account",
    a_page_is_in_quarantine_and_in_use: "is held by FREE but tagged QUARANTINE",
    the_counter_of_parked_pages_is_wrong: "parked sessions hold .* pages, the running counter says",
}


def assert_found(stage: Stage, plant: Callable[[Books], None], message: str) -> None:
    kept = [request.lease for request in books_of(stage).requests.values()]  # so that none is lost besides
    plant(books_of(stage))
    with pytest.raises(AuditError, match=message):
        stage.machine.audit()
    assert stage.stats().audit_failures_total == 1
    assert kept


@pytest.mark.parametrize("plant", PAGES, ids=lambda plant: plant.__name__)
def test_h06_pages_that_are_not_where_their_tags_say_are_found(stage: Stage, plant: Callable[[Books], None]) -> None:
    assert_found(stage, plant, PAGES[plant])


def test_h06_a_swap_leaves_every_sum_as_it_was(stage: Stage, books: Books) -> None:
    before = stage.stats()
    two_owners_swap_a_page(books)
    assert stage.stats() == before


def test_pages_on_an_account_that_nobody_holds_are_found(stage: Stage, books: Books) -> None:
    forgotten = books.ledger.open()
    books.ledger.draw(forgotten, 2)
    with pytest.raises(AuditError, match="owns 2 pages but nobody holds it"):
        stage.machine.audit()
    books.ledger.release(forgotten, step=0)


def test_a_lost_lease_is_found(stage: Stage, books: Books) -> None:
    books.ledger.draw(books.ledger.open(), 2)
    with pytest.raises(AuditError, match="a lease was lost: account .* was dropped with pages"):
        stage.machine.audit()


# -- pins ---------------------------------------------------------------------------------------------------------


def a_pin_is_forgotten(books: Books) -> None:
    books.tree.pin(books.tree.match("", pack_tokens([2] * 8), 2))


def a_pin_is_dropped_for_another(books: Books) -> None:
    node = next(books.requests[2].pin.path())  # type: ignore[union-attr]
    node.hard -= 1


def a_soft_pin_is_counted_as_hard(books: Books) -> None:
    for node in parked(books).pin.path():
        node.hard, node.soft = node.hard + 1, node.soft - 1


def a_receipt_names_a_foreign_page(books: Books) -> None:
    books.requests[2].pin.pages[0] = books.requests[4].pin.pages[0]  # type: ignore[union-attr]


def the_counter_of_pinned_pages_is_wrong(books: Books) -> None:
    books.tree.hard_pages -= 1


def a_node_is_not_counted(books: Books) -> None:
    books.tree.nodes -= 1


def a_node_has_tokens_without_pages(books: Books) -> None:
    node = next(books.tree.walk())
    node.tokens = node.tokens * 2


PINS: dict[Callable[[Books], None], str] = {
    a_pin_is_forgotten: "counts 2 hard and 0 soft pins, its receipts are 1 and 0",
    a_pin_is_dropped_for_another: "counts 0 hard and 0 soft pins, its receipts are 1 and 0",
    a_soft_pin_is_counted_as_hard: "counts 1 hard and 0 soft pins, its receipts are 0 and 1",
    a_receipt_names_a_foreign_page: "a receipt names pages .* but its path holds",
    the_counter_of_pinned_pages_is_wrong: "the tree counts .* pinned pages",
    a_node_is_not_counted: "the tree counts .* nodes",
    a_node_has_tokens_without_pages: "has 16 tokens for 2 pages",
}


@pytest.mark.parametrize("plant", PINS, ids=lambda plant: plant.__name__)
def test_h03_h21_pins_without_a_receipt_are_found(stage: Stage, plant: Callable[[Books], None]) -> None:
    assert_found(stage, plant, PINS[plant])


# -- rows and lengths ---------------------------------------------------------------------------------------------


def a_row_has_two_requests(books: Books) -> None:
    books.requests[4].row = books.requests[2].row


def a_row_is_free_and_held(books: Books) -> None:
    books.rows.free_list.append(row_of(books, 2))


def a_draining_row_is_forgotten(books: Books) -> None:
    books.draining.clear()


def a_row_has_another_occupant(books: Books) -> None:
    books.rows.occupants[row_of(books, 2)] = books.requests[4]


def a_running_request_waits(books: Books) -> None:
    books.waiting.enter(books.requests[2])


def a_waiting_request_is_out_of_line(books: Books) -> None:
    books.waiting.leave(books.requests[5])


def settled_runs_ahead_of_planned(books: Books) -> None:
    books.rows.planned[row_of(books, 2)] = books.rows.settled[row_of(books, 2)] - 1


def planned_runs_ahead_of_allocated(books: Books) -> None:
    row = row_of(books, 2)
    books.rows.planned[row] = int(books.rows.pages[row]) * 4 + 1


def kv_covers_every_token(books: Books) -> None:
    row = row_of(books, 2)
    books.rows.settled[row] = books.rows.planned[row] = books.rows.known[row]


def the_row_counts_other_pages(books: Books) -> None:
    books.rows.pages[row_of(books, 2)] += 1


def the_row_counts_other_tokens(books: Books) -> None:
    books.rows.known[row_of(books, 2)] += 1


ROWS: dict[Callable[[Books], None], str] = {
    a_row_has_two_requests: "requests 4 and 2 hold row",
    a_row_is_free_and_held: "rows are free and 3 held, of 3",
    a_draining_row_is_forgotten: "rows are free and 2 held, of 3",
    a_row_has_another_occupant: "request 2 holds row .*, which has another occupant",
    a_running_request_waits: "request 2 is RUNNING but the waiting line says otherwise",
    a_waiting_request_is_out_of_line: "request 5 is QUEUED but the waiting line says otherwise",
    settled_runs_ahead_of_planned: "request 2: settled .*, planned",
    planned_runs_ahead_of_allocated: "request 2: settled .*, planned .*, allocated",
    kv_covers_every_token: "request 2: settled .*, known",
    the_row_counts_other_pages: "request 2 has .* pages, its row says",
    the_row_counts_other_tokens: "request 2 knows .* tokens, its row",
}


@pytest.mark.parametrize("plant", ROWS, ids=lambda plant: plant.__name__)
def test_h22_rows_and_lengths_that_contradict_their_requests_are_found(
    stage: Stage, plant: Callable[[Books], None]
) -> None:
    assert_found(stage, plant, ROWS[plant])


# -- sessions -----------------------------------------------------------------------------------------------------


def a_session_is_busy_with_a_foreign_request(books: Books) -> None:
    books.sessions["", PARKED].turn = books.sessions["", TURN].turn


def a_busy_mark_is_stuck(books: Books) -> None:
    books.sessions["", PARKED].turn = 1  # type: ignore[assignment]


def parked_kv_covers_every_token(books: Books) -> None:
    parked(books).tokens += 1


def parked_kv_is_longer_than_its_pages(books: Books) -> None:
    session = books.sessions["", PARKED]
    session.history.append(pack_tokens([1] * 50))
    parked(books).tokens += 20


def parked_kv_leaves_a_page_unused(books: Books) -> None:
    parked(books).tokens = 1


def a_session_keeps_its_kv_while_its_turn_runs(books: Books) -> None:
    request: Request = books.requests[4]
    assert request.lease is not None and request.pin is not None
    pin = books.tree.pin(books.tree.match("", pack_tokens([4] * 8), 2))
    books.tree.soften(pin)
    books.sessions["", TURN].parked = ParkedKv(books.ledger.open(), pin, 8, 0)


SESSIONS: dict[Callable[[Books], None], str] = {
    a_session_is_busy_with_a_foreign_request: "session 'parked' is busy with request 4, which is not its own",
    a_busy_mark_is_stuck: "session 'parked' is busy with request 1, which is not its own",
    parked_kv_covers_every_token: "session 'parked' has KV of 13 tokens on 3 pages for 13 tokens",
    parked_kv_is_longer_than_its_pages: "session 'parked' has KV of 32 tokens on 3 pages",
    parked_kv_leaves_a_page_unused: "session 'parked' has KV of 1 tokens on 3 pages",
    a_session_keeps_its_kv_while_its_turn_runs: "session 'running' holds KV while its turn runs",
}


@pytest.mark.parametrize("plant", SESSIONS, ids=lambda plant: plant.__name__)
def test_h02_sessions_that_contradict_their_turns_are_found(stage: Stage, plant: Callable[[Books], None]) -> None:
    assert_found(stage, plant, SESSIONS[plant])


# -- under load ---------------------------------------------------------------------------------------------------


def test_h07_a_violation_is_found_in_the_very_step_at_level_2() -> None:
    stage = busy_stage()
    two_owners_swap_a_page(books_of(stage))
    with pytest.raises(AuditError):
        stage.settle()


def test_h07_a_rolling_audit_finds_a_violation_within_a_round_of_all_holders() -> None:
    stage = Stage(pages=200, rows=8, audit_level=1)
    for key in range(8):
        stage.submit(key, [key] * 5, max_new_tokens=60)
    stage.step(3)
    two_tags_are_swapped_in(books_of(stage), 0, 7)
    with pytest.raises(AuditError, match="holds pages that are tagged otherwise"):
        stage.step(3 * LOOK_STEPS)
    assert stage.stats().audit_failures_total == 1


def two_tags_are_swapped_in(books: Books, key: int, other: int) -> None:
    tags, mine, theirs = books.ledger._tags, pages_of(books, key)[0], pages_of(books, other)[0]
    tags[mine], tags[theirs] = tags[theirs], tags[mine]
