"""The page ledger beyond its plain arrows: what a wrong caller gets, in what order pages come and go."""

from array import array
from collections.abc import Callable

import numpy as np
import pytest

from sessile.core.ledger import FREE, LIMBO, QUARANTINE, TREE, Lease, PageLedger
from sessile.errors import LeaseError, OwnershipError

MANY = 40
"""Pages enough for the ledger to move them as an array instead of one by one."""


def drawn(ledger: PageLedger, count: int) -> Lease:
    lease = ledger.open()
    ledger.draw(lease, count)
    return lease


def test_a_fresh_pool_hands_out_neighbours() -> None:
    ledger = PageLedger(16)
    lease = drawn(ledger, 5)
    assert list(lease.pages) == [1, 2, 3, 4, 5]
    ledger.release(lease, step=1)


def test_pages_that_came_back_are_drawn_again_in_the_order_of_their_tokens() -> None:
    ledger = PageLedger(16)
    first = drawn(ledger, 5)
    before = list(first.pages)
    ledger.release(first, step=1)
    ledger.settle(1)
    second = drawn(ledger, 5)
    assert list(second.pages) == before
    ledger.release(second, step=2)


def test_drawing_more_than_is_free_is_refused() -> None:
    ledger = PageLedger(4)
    lease = drawn(ledger, 2)
    with pytest.raises(AssertionError, match="drew 2 pages of 1 free ones"):
        ledger.draw(lease, 2)
    assert (len(lease), ledger.free_pages) == (2, 1)
    ledger.release(lease, step=1)


def test_limbo_is_not_free_to_draw() -> None:
    ledger = PageLedger(4)
    ledger.release(drawn(ledger, 3), step=1)
    lease = ledger.open()
    with pytest.raises(AssertionError, match="drew 1 pages of 0"):
        ledger.draw(lease, 1)
    assert ledger.limbo_pages == 3


def test_drawing_appends_behind_what_the_sequence_has() -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 2)
    more = ledger.draw(lease, 3)
    assert list(lease.pages[2:]) == list(more)
    ledger.release(lease, step=1)


def test_publishing_takes_a_run_out_and_keeps_the_rest_in_order() -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 5)
    before = list(lease.pages)
    published = ledger.publish(lease, 1, 2)
    assert list(published) == before[1:3]
    assert list(lease.pages) == [before[0], *before[3:]]
    assert (ledger.balance(TREE), ledger.balance(lease.account)) == (2, 3)
    ledger.release(lease, step=1)


@pytest.mark.parametrize(("start", "count"), [(0, 4), (2, 2), (3, 1), (0, 0)])
def test_publishing_pages_that_the_sequence_does_not_have_is_refused(start: int, count: int) -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 3)
    with pytest.raises(AssertionError, match="published more pages than the sequence owns"):
        ledger.publish(lease, start, count)
    assert (ledger.balance(TREE), len(lease)) == (0, 3)
    ledger.release(lease, step=1)


def test_h12_dropping_a_tail_keeps_the_first_pages_and_counts_the_rest() -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 5)
    before = list(lease.pages)
    assert ledger.drop_tail(lease, 2, step=1) == 3
    assert list(lease.pages) == before[:2]
    assert ledger.drop_tail(lease, 2, step=1) == 0
    ledger.release(lease, step=1)


def test_h24_settling_a_step_frees_what_waited_for_it_and_for_earlier_ones_only() -> None:
    ledger = PageLedger(8)
    for step in (3, 4, 5):
        ledger.release(drawn(ledger, 2), step=step)
    ledger.settle(4)
    assert (ledger.free_pages, ledger.limbo_pages) == (5, 2)
    assert [step for step, _ in ledger.limbo_by_step()] == [5]


def test_pages_of_several_holders_may_wait_for_the_same_step() -> None:
    ledger = PageLedger(8)
    first, second = drawn(ledger, 2), drawn(ledger, 3)
    ledger.release(first, step=7)
    ledger.drop_tail(second, 1, step=7)
    ledger.settle(7)
    assert (ledger.limbo_pages, ledger.free_pages) == (0, 6)
    ledger.release(second, step=8)


def test_only_pages_of_the_tree_can_be_evicted() -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 2)
    with pytest.raises(OwnershipError, match="should belong to TREE"):
        ledger.evict(lease.pages[:], step=1)
    assert ledger.balance(lease.account) == 2
    ledger.release(lease, step=1)


@pytest.mark.parametrize("count", [2, MANY])
def test_h06_a_move_with_one_foreign_page_names_it_and_moves_none(count: int) -> None:
    ledger = PageLedger(2 * MANY + 2)
    mine, theirs = drawn(ledger, count), drawn(ledger, 1)
    foreign = theirs.pages[0]
    mine.pages[count - 1], kept = foreign, mine.pages[count - 1]
    tags = ledger.tags.copy()
    with pytest.raises(OwnershipError, match=rf"^page {foreign} should belong to .* but belongs to"):
        ledger.drop_tail(mine, 0, step=1)
    assert (ledger.tags == tags).all()
    mine.pages[count - 1] = kept
    ledger.release(mine, step=1)
    ledger.release(theirs, step=1)


def test_a_free_page_in_a_lease_is_foreign_too() -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 2)
    lease.pages.append(7)
    with pytest.raises(OwnershipError, match="page 7 .* belongs to FREE"):
        ledger.publish(lease, 0, 3)
    lease.pages.pop()
    ledger.release(lease, step=1)


@pytest.mark.parametrize("count", [2, MANY])
def test_h06_a_page_listed_twice_fails_where_its_account_is_closed(count: int) -> None:
    ledger = PageLedger(2 * MANY)
    lease = drawn(ledger, count)
    lease.pages.append(lease.pages[0])
    with pytest.raises(OwnershipError, match="was closed with -1 pages on its name"):
        ledger.release(lease, step=1)


def test_the_tags_of_a_large_move_are_all_rewritten() -> None:
    ledger = PageLedger(MANY + 1)
    lease = drawn(ledger, MANY)
    assert (ledger.tags[1:] == lease.account).all()
    ledger.release(lease, step=1)
    assert (ledger.tags[1:] == LIMBO).all()
    ledger.settle(1)
    assert (ledger.tags[1:] == FREE).all()


CONSUMING: dict[str, Callable[[PageLedger, Lease], object]] = {
    "release": lambda ledger, lease: ledger.release(lease, step=1),
    "abandon": lambda ledger, lease: lease.abandon(),
}
USING: dict[str, Callable[[PageLedger, Lease], object]] = {
    "draw": lambda ledger, lease: ledger.draw(lease, 1),
    "publish": lambda ledger, lease: ledger.publish(lease, 0, 1),
    "drop a tail": lambda ledger, lease: ledger.drop_tail(lease, 0, step=1),
    "hand over": lambda ledger, lease: lease.hand_over(),
    "count": lambda ledger, lease: len(lease),
    "read": lambda ledger, lease: lease.pages,
    "release": CONSUMING["release"],
}


@pytest.mark.parametrize("use", USING.values(), ids=USING)
@pytest.mark.parametrize("consume", CONSUMING.values(), ids=CONSUMING)
def test_a_consumed_lease_is_of_no_more_use(
    consume: Callable[[PageLedger, Lease], object], use: Callable[[PageLedger, Lease], object]
) -> None:
    ledger = PageLedger(8)
    lease = drawn(ledger, 2)
    consume(ledger, lease)
    with pytest.raises(LeaseError, match="consumed"):
        use(ledger, lease)
    assert ledger.free_pages == 5


NO_PAGES = array("i")


def test_h07_pages_of_an_abandoned_lease_are_out_of_circulation_until_they_are_proven_free() -> None:
    ledger = PageLedger(8)
    kept, suspect = drawn(ledger, 2), drawn(ledger, 3)
    pages, account = list(suspect.pages), suspect.account
    suspect.abandon()
    assert ledger.restore([(kept.account, kept.pages)], NO_PAGES, step=4) == 3
    ledger.settle(99)
    assert (ledger.free_pages, ledger.balance(QUARANTINE), ledger.quarantine_step) == (2, 3, 4)
    assert sorted(ledger.quarantined) == pages
    assert account not in [drawn_account for drawn_account, _ in ledger.open_accounts()]
    ledger.free_quarantined()
    assert (ledger.free_pages, ledger.balance(QUARANTINE)) == (5, 0)
    ledger.release(kept, step=5)


def test_restoring_sound_books_changes_nothing() -> None:
    ledger = PageLedger(12)
    lease, other = drawn(ledger, 4), drawn(ledger, 3)
    published = ledger.publish(lease, 0, 1)
    ledger.release(other, step=2)
    before = (ledger.tags.tolist(), list(ledger.free_stack), dict(ledger.limbo_by_step()), ledger.balances_total)
    assert ledger.restore([(lease.account, lease.pages), (TREE, published)], NO_PAGES, step=2) == 0
    after = (ledger.tags.tolist(), list(ledger.free_stack), dict(ledger.limbo_by_step()), ledger.balances_total)
    assert after == before
    ledger.release(lease, step=3)


def test_h06_restoring_leaves_a_page_to_whom_its_tag_names_if_it_is_listed_there_and_takes_all_others() -> None:
    ledger = PageLedger(10)
    lease = drawn(ledger, 3)
    mine, stale, free = lease.pages[0], lease.pages[1], ledger.free_stack[-1]
    ledger._tags[stale] = FREE  # tagged FREE, but not listed there
    ledger.free_stack[0] = mine  # listed as free, but tagged with the sequence
    ledger.free_stack.append(free)  # listed twice
    restored = ledger.restore([(lease.account, lease.pages)], NO_PAGES, step=1)
    assert (restored, stale in ledger.quarantined) == (2, True)
    assert (list(ledger.free_stack).count(free), mine in ledger.free_stack) == (1, False)
    assert ledger.balances_total == ledger.pages_total == len(ledger.free_stack) + 2 + 2 + 1
    lease.pages.remove(stale)
    ledger.release(lease, step=1)


def test_h24_free_pages_that_a_suspect_listed_wait_in_quarantine_for_the_steps_that_may_touch_them() -> None:
    ledger = PageLedger(8)
    ledger.release(drawn(ledger, 1), step=9)
    suspects = array("i", [ledger.free_stack[-1], next(ledger.limbo_by_step())[1][0]])
    assert ledger.restore([], suspects, step=9) == 2
    assert sorted(ledger.quarantined) == sorted(suspects)
    assert (ledger.limbo_pages, ledger.free_pages) == (0, 5)


def test_dropping_a_lease_that_owns_nothing_is_nobodys_loss() -> None:
    ledger = PageLedger(4)
    del (lease := [ledger.open()])[0]
    assert (lease, ledger.lost) == ([], [])


def test_a_lost_lease_is_noted_with_its_pages() -> None:
    ledger = PageLedger(8)
    leases = [drawn(ledger, 2)]
    pages, account = list(leases[0].pages), leases[0].account
    leases.clear()
    assert ledger.lost == [f"account {account:#x} was dropped with pages {pages}"]


def test_h75_every_use_of_a_slot_has_a_new_account() -> None:
    ledger = PageLedger(4)
    accounts = []
    for step in range(50):
        lease = drawn(ledger, 1)
        accounts.append(int(lease.account))
        ledger.release(lease, step)
        ledger.settle(step)
    assert len(set(accounts)) == 50


def test_open_accounts_are_those_that_own_pages() -> None:
    ledger = PageLedger(8)
    empty, full = ledger.open(), drawn(ledger, 3)
    assert list(ledger.open_accounts()) == [(full.account, 3)]
    ledger.release(full, step=1)
    assert list(ledger.open_accounts()) == []
    ledger.release(empty, step=1)


def test_the_free_stack_holds_exactly_the_free_pages() -> None:
    ledger = PageLedger(16)
    first, second = drawn(ledger, 4), drawn(ledger, 4)
    ledger.release(first, step=1)
    ledger.settle(1)
    assert sorted(ledger.free_stack) == np.flatnonzero(ledger.tags == FREE).tolist()
    ledger.release(second, step=2)
