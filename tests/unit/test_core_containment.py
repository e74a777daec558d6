"""What a violation costs where it is contained: whoever it names, and nobody else."""

from collections.abc import Callable
from typing import Any

import pytest

from sessile.contract.messages import Cancel, Flush
from sessile.core.books import Books
from sessile.core.ledger import QUARANTINE
from sessile.core.request import Phase
from sessile.errors import AuditError, OwnershipError
from tests.unit.stage import Stage, expected
from tests.unit.test_core_audit import (
    PAGES,
    PARKED,
    PINS,
    ROWS,
    SESSIONS,
    TURN,
    a_node_has_tokens_without_pages,
    a_receipt_names_a_foreign_page,
    a_tag_is_stale,
    books_of,
    busy_stage,
    pages_of,
    parked_kv_is_longer_than_its_pages,
    two_holders_have_one_account,
    two_owners_swap_a_page,
    two_tags_are_swapped,
)

LENGTHS = [plant for plant, text in ROWS.items() if text.startswith(("request 2:", "request 2 has", "request 2 kn"))]
HOPELESS = [plant for plant in ROWS if plant not in LENGTHS]
CONTAINED = [*PAGES, *PINS, *LENGTHS, *SESSIONS]
BOTH_ENDED = {two_tags_are_swapped, two_holders_have_one_account}


def play_on(stage: Stage) -> None:
    """Everything runs to its end; then each session has one turn more, and ends."""
    stage.run()
    for key, session in ((6, PARKED), (7, TURN)):
        stage.submit(key, [key] * 3, session=session)
    stage.run()
    for key in (8, 9):
        stage.submit(key, [key] * 9)
    stage.run()


@pytest.fixture(scope="module")
def sound() -> Stage:
    """The same without a fault."""
    stage = busy_stage()
    play_on(stage)
    return stage


def assert_everything_comes_back(stage: Stage) -> None:
    for _, session in list(books_of(stage).sessions):
        stage.close(session)
    stage.step()
    stage.ask(Flush)
    stats = stage.stats()
    assert (stats.pages_free, stats.pages_quarantine) == (stats.pages_total - 1, 0)
    assert (stats.rows_held, stats.sessions_open) == (0, 0)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("plant", CONTAINED, ids=lambda plant: plant.__name__)
def test_h07_a_violation_costs_whom_it_names_and_nobody_else(
    plant: Callable[[Books], None], level: int, sound: Stage
) -> None:
    stage = busy_stage(audit_level=level, contain_violations=True)
    kept = [request.lease for request in books_of(stage).requests.values()]
    plant(books_of(stage))
    watch = stage.machine._watch
    assert kept
    if level == 1:
        watch._contain(watch._checked())  # as soon as a round has come to it
    watch.settled()
    play_on(stage)
    stage.machine.audit()
    ended = [key for key, done in stage.done.items() if done.reason == "error"]
    assert set(ended) <= ({2, 4} if plant in BOTH_ENDED else {2, 4, 5}) and len(ended) <= 2
    own_history = {6} if plant is parked_kv_is_longer_than_its_pages else set()
    rolled_back = {7} if 4 in ended else set()
    for key in set(stage.done) - set(ended) - own_history - rolled_back:
        assert stage.output[key] == sound.output[key], f"request {key}"
    for key in ended:
        assert (stage.done[key].status, stage.output[key]) == (500, sound.output[key][: len(stage.output[key])])
        assert "try again" in stage.done[key].message
    assert stage.stats().audit_failures_total > 0
    assert sum(stage.stats().audit_violations_total.values()) > 0
    assert set(stage.done) >= {1, 2, 3, 4, 5, 6, 7, 8, 9}
    assert_everything_comes_back(stage)


@pytest.mark.parametrize("plant", [two_owners_swap_a_page, a_tag_is_stale, a_receipt_names_a_foreign_page])
def test_h07_the_request_that_is_named_ends_with_an_error_and_once(plant: Callable[[Books], None]) -> None:
    stage = busy_stage(contain_violations=True)
    plant(books_of(stage))
    stage.settle()
    done = stage.done[2]
    assert (done.reason, done.status) == ("error", 500)
    assert "ended it: try again" in done.message
    assert 2 not in books_of(stage).requests


def test_h07_a_session_that_is_named_keeps_its_tokens_and_goes_on_without_its_kv() -> None:
    stage = busy_stage(contain_violations=True)
    before = stage.history(PARKED)
    two_owners_swap_a_page(books_of(stage))
    stage.settle()
    assert (stage.history(PARKED), stage.view(PARKED).kv_tokens, stage.view(PARKED).phase) == (before, 0, "idle")
    stage.submit(6, [6, 6], session=PARKED)
    stage.run()
    assert stage.output[6] == expected([*before, 6, 6])


def test_h18_the_turn_of_a_request_that_is_named_is_rolled_back() -> None:
    stage = busy_stage(contain_violations=True)
    two_tags_are_swapped(books_of(stage))
    stage.settle()
    assert (stage.done[4].reason, stage.history(TURN), stage.view(TURN).phase) == ("error", [], "idle")
    stage.submit(7, [4] * 9, session=TURN)
    stage.run()
    assert stage.output[7] == expected([4] * 9)


def test_h07_pages_stay_in_quarantine_until_no_step_can_touch_them() -> None:
    stage = busy_stage(contain_violations=True)
    stage.settle()
    stage.launch()
    suspects = len(pages_of(books_of(stage), 2))
    books_of(stage).requests[2].lease.pages.append(pages_of(books_of(stage), 2)[0])  # type: ignore[union-attr]
    stage.launch()  # settles one step, finds the fault, and leaves another step in flight
    books = books_of(stage)
    quarantined = stage.stats().pages_quarantine
    assert books.ledger.balance(QUARANTINE) == quarantined >= suspects
    assert books.ledger.quarantine_step > books.settled_step
    stage.settle()
    assert books.ledger.balance(QUARANTINE) == 0
    assert stage.stats().quarantined_pages_total == quarantined


def test_h06_whoever_shares_a_page_with_one_that_leaves_may_have_been_written_over_and_leaves_too() -> None:
    stage = busy_stage(contain_violations=True)
    pages_of(books_of(stage), 2)[0] = pages_of(books_of(stage), 4)[0]
    stage.settle()
    assert {key for key, done in stage.done.items() if done.reason == "error"} == {2, 4}
    stage.run()
    stage.machine.audit()
    assert stage.done[5].reason == "length"


def test_h06_a_tree_page_that_somebody_listed_as_its_own_leaves_the_tree_with_its_readers() -> None:
    stage = busy_stage(contain_violations=True)
    books = books_of(stage)
    node = next(node for node in books.tree.walk() if node.pages)
    readers = {key for key, request in books.requests.items() if request.pin and node in request.pin.path()}
    pages_of(books, 2)[0] = node.pages[0]
    stage.settle()
    assert {key for key, done in stage.done.items() if done.reason == "error"} == readers | {2}
    assert node not in list(books.tree.walk())
    stage.run()
    stage.machine.audit()


def test_a_faulty_tree_node_takes_its_readers_along_and_its_subtree() -> None:
    stage = busy_stage(contain_violations=True)
    books = books_of(stage)
    a_node_has_tokens_without_pages(books)
    node = next(books.tree.walk())
    readers = [key for key, request in books.requests.items() if request.pin and node in request.pin.path()]
    stage.settle()
    assert [key for key, done in stage.done.items() if done.reason == "error"] == readers
    assert node not in list(books.tree.walk())


@pytest.mark.parametrize("plant", HOPELESS, ids=lambda plant: plant.__name__)
def test_what_nobody_can_answer_for_ends_the_engine(plant: Callable[[Books], None]) -> None:
    stage = busy_stage(contain_violations=True)
    plant(books_of(stage))
    with pytest.raises(AuditError):
        stage.settle()


@pytest.mark.parametrize("plant", [two_owners_swap_a_page, a_tag_is_stale])
def test_h07_a_violation_raises_where_it_is_not_contained(plant: Callable[[Books], None]) -> None:
    stage = busy_stage()
    plant(books_of(stage))
    with pytest.raises(AuditError):
        stage.settle()


def test_h07_pages_are_proven_free_even_if_no_step_can_run_without_them() -> None:
    stage = Stage(pages=8, rows=2, contain_violations=True)
    stage.submit(1, [1] * 12, max_new_tokens=40)
    stage.submit(2, [2] * 12, max_new_tokens=12)
    stage.step(2)
    two_pages = pages_of(books_of(stage), 1)
    two_pages.append(two_pages[0])
    stage.run()
    assert (stage.done[1].status, stage.output[2]) == (500, expected([2] * 12, 12))


# -- one row ------------------------------------------------------------------------------------------------------


def failing_stage(monkeypatch: pytest.MonkeyPatch, key: int, call: str, **limits: Any) -> Stage:
    """busy_stage, in which the next call of a function of settling that concerns a request fails half way."""
    from sessile.core import settling

    real = getattr(settling, call)

    def fail_for_one(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        if arguments[1].key == key and arguments[1].phase is Phase.RUNNING:
            raise IndexError("out of range")

    stage = busy_stage(**limits)
    monkeypatch.setattr(settling, call, fail_for_one)
    return stage


@pytest.mark.parametrize("key", [2, 4])
def test_h74_a_row_that_cannot_be_settled_costs_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, key: int, sound: Stage
) -> None:
    stage = failing_stage(monkeypatch, key, "_settle_other", contain_violations=True)
    books_of(stage).rows.slow[books_of(stage).requests[key].row] = 1
    stage.settle()
    assert (stage.done[key].reason, stage.done[key].status) == ("error", 500)
    assert stage.stats().audit_violations_total == {"row": 1}
    play_on(stage)
    for other in {2, 4, 5, 6, 8, 9} - {key}:
        assert stage.output[other] == sound.output[other]
    assert_everything_comes_back(stage)


def test_h74_a_row_that_cannot_be_settled_ends_an_engine_that_contains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = failing_stage(monkeypatch, 2, "_settle_other")
    books_of(stage).rows.slow[books_of(stage).requests[2].row] = 1
    with pytest.raises(IndexError):
        stage.settle()


def its_last_page_is_foreign(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    pages_of(books, 1)[-1] = books.ledger.free_stack[0]  # which giving the pages back will notice


def parking_fails(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OwnershipError("planted")])

    def truncate(*arguments: Any) -> int:
        for failure in failures:
            raise failure
        return Books.truncate(books, *arguments)

    monkeypatch.setattr(books, "truncate", truncate)


@pytest.mark.parametrize(("session", "plant"), [(None, its_last_page_is_foreign), ("talk", parking_fails)])
def test_h74_an_end_that_fails_half_way_is_rolled_back_and_told_once(
    session: str | None,
    plant: Callable[[Books, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(audit_level=0, contain_violations=True)
    stage.open("talk")
    stage.submit(1, [1] * 6, session=session, max_new_tokens=8)
    stage.submit(2, [2] * 6, max_new_tokens=20)
    stage.step(6)
    plant(books_of(stage), monkeypatch)
    stage.run()
    assert (stage.done[1].reason, stage.done[1].status, stage.done[1].session_tokens) == ("error", 500, -1)
    assert stage.output[2] == expected([2] * 6, 20)
    stats = stage.stats()
    assert (stats.turns_committed_total, stats.turns_rolled_back_total) == ((0, 0) if session is None else (0, 1))
    assert stage.history("talk") == []
    stage.machine.audit()
    stage.submit(3, [1] * 6, session=session)
    stage.run()
    assert stage.output[3] == expected([1] * 6)
    assert_everything_comes_back(stage)


def test_a_cancel_that_finds_the_books_wrong_costs_that_request_alone(sound: Stage) -> None:
    stage = busy_stage(contain_violations=True)
    pages_of(books_of(stage), 2)[-1] = books_of(stage).ledger.free_stack[0]
    stage.send(Cancel(2))
    assert stage.done[2].status == 500
    play_on(stage)
    for other in (4, 5, 6, 7):
        assert stage.output[other] == sound.output[other]
    assert_everything_comes_back(stage)


# -- what is told -------------------------------------------------------------------------------------------------


def test_a_violation_is_reported_with_the_events_before_it() -> None:
    stage = busy_stage(contain_violations=True)
    two_owners_swap_a_page(books_of(stage))
    stage.settle()
    (report,) = stage.machine.take_reports()
    assert "is held by sequence account" in report.found[0]
    assert report.quarantined_pages > 0
    assert any(line.startswith("planned ") and "samples 1 at" in line for line in report.events)
    assert any(line.startswith("received Submit 2: 9 tokens, at most 40 new") for line in report.events)
    assert any(line.startswith("ended 3: abort") for line in report.events)
    assert any(line.startswith("settled ") for line in report.events)
    assert stage.machine.take_reports() == []
    assert any(line.startswith("violation of pages: page") for line in stage.machine.event_lines())


def test_events_are_bounded_and_keep_no_tokens() -> None:
    stage = Stage(audit_level=1)
    for key in range(400):
        stage.submit(key, [41] * 5, max_new_tokens=2)
        stage.run()
    lines = stage.machine.event_lines()
    assert len(lines) == 1000
    assert "ended 399: length after 2 tokens" in lines[-1]
    assert not any("41, 41" in line for line in lines)
