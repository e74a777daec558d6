"""Ownership of pages and rows, arrow by arrow: what docs/INVARIANTS.md claims of the ledger, the tree and the rows."""

import copy
import gc
import pickle
from array import array

import numpy as np
import pytest

from sessile.contract.messages import pack_tokens
from sessile.core.ledger import FREE, LIMBO, QUARANTINE, SCRATCH, TREE, PageLedger
from sessile.core.prefix import PrefixTree
from sessile.core.rows import RowTable
from sessile.errors import LeaseError, OwnershipError

PAGE_SIZE = 4


def tokens(*pages: int) -> bytes:
    """Pages of equal tokens: tokens(7, 8) is 7 7 7 7 8 8 8 8."""
    return pack_tokens(np.repeat(np.array(pages, np.int32), PAGE_SIZE))


def balances(ledger: PageLedger) -> dict[str, int]:
    names = {"free": FREE, "tree": TREE, "limbo": LIMBO, "scratch": SCRATCH, "quarantine": QUARANTINE}
    return {name: ledger.balance(account) for name, account in names.items() if ledger.balance(account)}


def test_a_fresh_pool_is_free_but_for_the_scratch_page() -> None:
    ledger = PageLedger(8)
    assert balances(ledger) == {"free": 7, "scratch": 1}
    assert ledger.tags[0] == SCRATCH


def test_drawn_pages_carry_the_account_of_their_sequence() -> None:
    ledger = PageLedger(8)
    lease = ledger.open()
    pages = ledger.draw(lease, 3)
    assert set(ledger.tags[pages]) == {lease.account}
    assert (ledger.balance(lease.account), ledger.free_pages) == (3, 4)
    ledger.release(lease, step=1)


def test_every_arrow_keeps_the_sum_of_all_balances() -> None:
    ledger = PageLedger(10)
    first, second = ledger.open(), ledger.open()
    ledger.draw(first, 4)
    ledger.draw(second, 2)
    published = ledger.publish(first, 0, 2)
    ledger.evict(published[1:], step=3)
    second.abandon()
    held = [(first.account, first.pages), (TREE, published[:1])]
    assert ledger.restore(held, suspects=array("i"), step=5) == 2
    ledger.release(first, step=4)
    assert balances(ledger) == {"free": 3, "tree": 1, "limbo": 3, "scratch": 1, "quarantine": 2}
    assert sum(balances(ledger).values()) == ledger.pages_total


def test_h24_a_released_page_is_not_free_before_the_step_that_may_touch_it_settles() -> None:
    ledger = PageLedger(4)
    lease = ledger.open()
    ledger.draw(lease, 3)
    ledger.release(lease, step=5)
    ledger.settle(4)
    assert (ledger.free_pages, ledger.limbo_pages) == (0, 3)
    ledger.settle(5)
    assert (ledger.free_pages, ledger.limbo_pages) == (3, 0)


def test_h06_moving_a_page_of_another_owner_names_page_and_owners_and_moves_nothing() -> None:
    ledger = PageLedger(8)
    mine, theirs = ledger.open(), ledger.open()
    ledger.draw(mine, 2)
    stolen = ledger.draw(theirs, 1)[0]
    mine.pages[1], kept = stolen, mine.pages[1]
    with pytest.raises(OwnershipError, match=f"page {stolen} should belong to sequence account"):
        ledger.release(mine, step=1)
    assert ledger.limbo_pages == 0
    mine.pages[1] = kept
    ledger.release(mine, step=1)
    ledger.release(theirs, step=1)


def test_h06_two_sequences_that_swap_pages_are_found_though_every_balance_is_right() -> None:
    ledger = PageLedger(8)
    mine, theirs = ledger.open(), ledger.open()
    ledger.draw(mine, 1)
    ledger.draw(theirs, 1)
    mine.pages[0], theirs.pages[0] = theirs.pages[0], mine.pages[0]
    with pytest.raises(OwnershipError):
        ledger.drop_tail(mine, 0, step=1)
    mine.pages[0], theirs.pages[0] = theirs.pages[0], mine.pages[0]
    ledger.release(mine, step=1)
    ledger.release(theirs, step=1)


def test_h09_an_account_with_a_forgotten_tail_cannot_be_closed() -> None:
    ledger = PageLedger(8)
    lease = ledger.open()
    ledger.draw(lease, 3)
    forgotten = lease.pages.pop()
    with pytest.raises(OwnershipError, match="closed with 1 pages on its name"):
        ledger.release(lease, step=1)
    assert ledger.tags[forgotten] not in (FREE, LIMBO)


def test_h75_a_closed_account_is_never_mistaken_for_the_next_one_in_its_slot() -> None:
    ledger = PageLedger(8)
    first = ledger.open()
    old = first.account
    ledger.release(first, step=1)
    second = ledger.open()
    assert second.account != old
    with pytest.raises(AssertionError, match="is closed"):
        ledger.balance(old)


def test_h01_handing_a_lease_over_moves_the_right_and_rewrites_no_tag() -> None:
    ledger = PageLedger(8)
    of_the_session = ledger.open()
    ledger.draw(of_the_session, 3)
    tags = ledger.tags.copy()
    of_the_request = of_the_session.hand_over()
    assert (ledger.tags == tags).all()
    assert len(of_the_request) == 3
    with pytest.raises(LeaseError, match="consumed"):
        ledger.draw(of_the_session, 1)
    ledger.release(of_the_request, step=1)


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_lease_cannot_be_copied_or_pickled(attempt: object) -> None:
    ledger = PageLedger(4)
    lease = ledger.open()
    with pytest.raises(LeaseError):
        attempt(lease)  # type: ignore[operator]
    ledger.release(lease, step=1)


def test_a_lease_that_is_dropped_while_it_owns_pages_is_on_record() -> None:
    ledger = PageLedger(4)
    lease = ledger.open()
    ledger.draw(lease, 2)
    del lease
    gc.collect()
    assert len(ledger.lost) == 1


def published(tree: PrefixTree, ledger: PageLedger, line: bytes) -> None:
    """Give the tree the pages of a sequence that has ended."""
    lease = ledger.open()
    ledger.draw(lease, len(line) // (4 * PAGE_SIZE))
    pin = tree.pin(tree.match("", line, 0))
    tree.publish_ended(pin, lease, line)
    tree.unpin(pin, used=True)
    ledger.release(lease, step=0)
    ledger.settle(0)


def test_h62_publishing_keeps_the_sequences_own_copy_of_a_page_that_the_tree_has() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2))
    lease = ledger.open()
    ledger.draw(lease, 3)
    own = list(lease.pages)
    unshared = tree.pin(tree.match("", tokens(1, 2, 3), 0))
    assert tree.publish_ended(unshared, lease, tokens(1, 2, 3)) == 1
    assert list(lease.pages) == own[:2]
    tree.unpin(unshared, used=True)
    ledger.release(lease, step=1)


def test_h73_a_page_under_a_hard_pin_is_never_evicted() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2, 3))
    pin = tree.pin(tree.match("", tokens(1, 2), 2))
    assert tree.evict_oldest(3) == 1
    assert tree.oldest_use() is None
    assert set(ledger.tags[np.array(pin.pages)]) == {TREE}
    tree.unpin(pin, used=True)
    assert tree.evict_oldest(3) == 2


def test_h20_a_receipt_survives_a_split_of_the_node_it_names() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2, 3))
    deep = tree.pin(tree.match("", tokens(1, 2, 3), 3))
    shallow = tree.pin(tree.match("", tokens(1, 9), 2))
    assert list(shallow.pages) == list(deep.pages)[:1]
    tree.unpin(deep, used=True)
    tree.unpin(shallow, used=True)
    assert tree.hard_pages == 0


def test_h21_a_receipt_unlocks_once_and_only_what_it_locked() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2))
    first = tree.pin(tree.match("", tokens(1, 2), 2))
    second = tree.pin(tree.match("", tokens(1, 2), 2))
    tree.unpin(first, used=True)
    with pytest.raises(OwnershipError, match="given back already"):
        tree.unpin(first, used=True)
    assert tree.hard_pages == 2
    tree.unpin(second, used=True)


def test_h71_a_namespace_never_matches_the_pages_of_another() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2))
    assert tree.match("another", tokens(1, 2), 2).pages == 0
    assert tree.match("", tokens(1, 2), 2).pages == 2


def test_h14_matching_changes_nothing() -> None:
    ledger = PageLedger(16)
    tree = PrefixTree(ledger, PAGE_SIZE)
    published(tree, ledger, tokens(1, 2, 3))
    before = (tree.nodes, tree.clock, tree.hard_pages, ledger.tags.tobytes())
    tree.match("", tokens(1, 2, 9), 3)
    assert (tree.nodes, tree.clock, tree.hard_pages, ledger.tags.tobytes()) == before


def taken(rows: "RowTable[str]", occupant: str) -> int:
    return rows.take(occupant)


def test_rows_have_one_owner_each_and_free_and_held_make_all() -> None:
    rows: RowTable[str] = RowTable(3)
    first, second = taken(rows, "first"), taken(rows, "second")
    assert first != second
    assert (rows.free_rows, rows.held_rows) == (1, 2)
    rows.give_back(first, "first")
    assert (rows.free_rows, rows.held_rows) == (2, 1)


def test_a_row_is_given_back_only_by_who_holds_it() -> None:
    rows: RowTable[str] = RowTable(2)
    row = taken(rows, "holder")
    with pytest.raises(OwnershipError):
        rows.give_back(row, "somebody else")
    assert rows.held_rows == 1


def test_a_draw_returns_pages_that_nobody_else_has() -> None:
    ledger = PageLedger(64)
    leases = [ledger.open() for _ in range(9)]
    for lease in leases:
        ledger.draw(lease, 7)
    owned = array("i")
    for lease in leases:
        owned.extend(lease.pages)
    assert len(set(owned)) == 63
    assert 0 not in owned
    for lease in leases:
        ledger.release(lease, step=1)
