"""The prefix tree: what matches, what a receipt locks through splits and cuts, what is adopted and evicted when."""

from array import array

import numpy as np
import pytest

from sessile.contract.messages import pack_tokens
from sessile.core.ledger import LIMBO, TREE, Lease, PageLedger
from sessile.core.prefix import Pin, PrefixTree
from sessile.errors import OwnershipError

PAGE_SIZE = 4


def tokens(*pages: int) -> bytes:
    """Pages of equal tokens: tokens(7, 8) is 7 7 7 7 8 8 8 8."""
    return pack_tokens(np.repeat(np.array(pages, np.int32), PAGE_SIZE))


class Grove:
    """A tree over a ledger, and what its users do with it."""

    def __init__(self, pages_total: int = 32) -> None:
        self.ledger = PageLedger(pages_total)
        self.tree = PrefixTree(self.ledger, PAGE_SIZE)

    def grow(self, *pages: int) -> None:
        """A plain request with these pages of tokens ended: the tree adopts what it lacks."""
        lease, pin = self.draw(len(pages)), self.start(*pages, match_pages=0)
        self.tree.publish_ended(pin, lease, tokens(*pages))
        self.tree.unpin(pin, used=True)
        self.ledger.release(lease, step=0)
        self.ledger.settle(0)

    def draw(self, count: int) -> Lease:
        lease = self.ledger.open()
        self.ledger.draw(lease, count)
        return lease

    def start(self, *pages: int, match_pages: int = 99) -> Pin:
        """Pin the longest match, at most `match_pages` pages."""
        line = tokens(*pages)
        return self.tree.pin(self.tree.match("", line, min(match_pages, len(pages))))

    def matched(self, *pages: int) -> int:
        return self.tree.match("", tokens(*pages), len(pages)).pages

    def evict(self, pages: int = 1) -> int:
        return self.tree.evict_oldest(pages)


def test_an_empty_tree_matches_nothing() -> None:
    grove = Grove()
    match = grove.tree.match("", tokens(1, 2), 2)
    assert (match.pages, match.node_pages, match.unpinned_pages) == (0, 0, 0)


@pytest.mark.parametrize(
    ("wanted", "found"), [((1, 2, 3), 3), ((1, 2, 9), 2), ((1, 9, 3), 1), ((9, 2, 3), 0), ((1, 2, 3, 4), 3), ((1,), 1)]
)
def test_a_match_is_the_longest_common_prefix_in_whole_pages(wanted: tuple[int, ...], found: int) -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    assert grove.matched(*wanted) == found


def test_a_page_that_differs_in_its_last_token_does_not_match() -> None:
    grove = Grove()
    grove.grow(1, 2)
    line = tokens(1, 2)[:-4] + pack_tokens([7])
    assert grove.tree.match("", line, 2).pages == 1


def test_a_match_is_capped() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    assert grove.tree.match("", tokens(1, 2, 3), 2).pages == 2


def test_a_match_follows_branches() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    grove.grow(1, 2, 4, 5)
    grove.grow(1, 6)
    assert [grove.matched(1, 2, 3), grove.matched(1, 2, 4, 5), grove.matched(1, 6, 7)] == [3, 4, 2]


def test_a_match_tells_which_pages_nobody_holds_yet() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    pin = grove.start(1, 2)
    match = grove.tree.match("", tokens(1, 2, 3), 3)
    assert (match.pages, match.unpinned_pages) == (3, 1)
    grove.tree.unpin(pin, used=True)


def test_a_receipt_lists_the_pages_of_its_path_in_the_order_of_tokens() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    whole = list(grove.start(1, 2, 3).pages)
    assert list(grove.start(1, 2).pages) == whole[:2]
    assert list(grove.start(1, 2, 3).pages) == whole


def test_pages_under_two_receipts_are_pinned_once() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    first, second = grove.start(1, 2, 3), grove.start(1, 2)
    assert grove.tree.hard_pages == 3
    grove.tree.unpin(first, used=True)
    assert (grove.tree.hard_pages, grove.tree.unpinned_pages) == (2, 1)
    grove.tree.unpin(second, used=True)
    assert (grove.tree.hard_pages, grove.tree.unpinned_pages) == (0, 3)


def test_pinning_a_match_that_the_tree_has_outgrown_is_refused() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    match = grove.tree.match("", tokens(1, 2, 3), 3)
    grove.evict(3)
    with pytest.raises(AssertionError, match="the tree changed between match and pin"):
        grove.tree.pin(match)


def test_h20_a_receipt_stays_right_while_its_path_is_split_again_and_again() -> None:
    grove = Grove()
    grove.grow(1, 2, 3, 4)
    deep = grove.start(1, 2, 3, 4)
    pages = list(deep.pages)
    shallow = [grove.start(*range(1, count + 1)) for count in (3, 1, 2)]
    path = array("i")
    for node in reversed(list(deep.path())):
        path.extend(node.pages)
    assert list(path) == pages == list(deep.pages)
    assert grove.tree.nodes == 4
    for pin in (deep, *shallow):
        grove.tree.unpin(pin, used=True)
    assert grove.tree.hard_pages == 0


def test_h20_both_halves_of_a_split_node_stay_locked() -> None:
    grove = Grove()
    grove.grow(1, 2)
    deep = grove.start(1, 2)
    grove.tree.unpin(grove.start(1), used=True)
    assert (grove.tree.hard_pages, grove.tree.oldest_use()) == (2, None)
    grove.tree.unpin(deep, used=True)
    assert grove.evict(9) + grove.evict(9) == 2


def test_h20_both_halves_of_a_split_node_stay_marked_by_a_parked_reader() -> None:
    grove = Grove()
    grove.grow(1, 2)
    parked = grove.start(1, 2)
    grove.tree.soften(parked)
    grove.tree.unpin(grove.start(1), used=True)
    assert [(node.hard, node.soft) for node in parked.path()] == [(0, 1), (0, 1)]
    grove.tree.unpin(parked, used=True)


def test_h21_a_receipt_cannot_be_used_after_it_was_given_back() -> None:
    grove = Grove()
    grove.grow(1, 2)
    pin, other = grove.start(1, 2), grove.start(1, 2)
    grove.tree.unpin(pin, used=True)
    for use in (grove.tree.soften, lambda pin: grove.tree.unpin(pin, used=False)):
        with pytest.raises(OwnershipError, match="given back already"):
            use(pin)
    assert [node.hard for node in other.path()] == [1]


def test_a_parked_reader_keeps_its_path_and_lets_go_of_the_reservation() -> None:
    grove = Grove()
    grove.grow(1, 2)
    pin = grove.start(1, 2)
    grove.tree.soften(pin)
    assert (grove.tree.hard_pages, grove.tree.unpinned_pages) == (0, 2)
    assert grove.tree.oldest_use() is None  # The parked reader has to shrink first.
    grove.tree.harden(pin)
    assert grove.tree.hard_pages == 2
    grove.tree.unpin(pin, used=True)


def test_a_soft_receipt_is_given_back_as_what_it_is() -> None:
    grove = Grove()
    grove.grow(1, 2)
    soft, hard = grove.start(1, 2), grove.start(1, 2)
    grove.tree.soften(soft)
    grove.tree.unpin(soft, used=False)
    assert [(node.hard, node.soft) for node in hard.path()] == [(1, 0)]
    grove.tree.unpin(hard, used=False)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_h64_a_shortened_receipt_locks_its_first_pages_only(kept: int) -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    pin = grove.start(1, 2, 3)
    pages = list(pin.pages)
    grove.tree.shorten(pin, kept)
    assert list(pin.pages) == pages[:kept]
    assert grove.tree.hard_pages == kept
    assert grove.matched(1, 2, 3) == 3
    grove.tree.unpin(pin, used=True)
    assert grove.tree.hard_pages == 0


def test_a_receipt_is_shortened_across_nodes() -> None:
    grove = Grove()
    grove.grow(1, 2, 3, 4, 5)
    others = [grove.start(1, 2), grove.start(1, 2, 3, 4)]
    pin = grove.start(1, 2, 3, 4, 5)
    grove.tree.shorten(pin, 1)
    assert list(pin.pages) == list(others[0].pages)[:1]
    for other in others:
        grove.tree.unpin(other, used=True)
    assert grove.tree.hard_pages == 1
    grove.tree.unpin(pin, used=True)


def test_a_running_sequence_publishes_behind_its_receipt() -> None:
    grove = Grove()
    grove.grow(1)
    pin, lease = grove.start(1), grove.draw(3)
    own = list(lease.pages)
    assert grove.tree.publish_live(pin, lease, tokens(2, 3))
    assert list(pin.pages)[1:] == own[:2]
    assert list(lease.pages) == own[2:]
    assert (grove.matched(1, 2, 3), grove.tree.hard_pages) == (3, 3)
    grove.tree.unpin(pin, used=True)
    grove.ledger.release(lease, step=1)


def test_a_prompt_that_is_published_chunk_by_chunk_is_one_node() -> None:
    grove = Grove()
    pin, lease = grove.start(1, match_pages=0), grove.draw(4)
    for page in (1, 2, 3):
        assert grove.tree.publish_live(pin, lease, tokens(page))
    assert (grove.tree.nodes, grove.matched(1, 2, 3), grove.tree.hard_pages) == (1, 3, 3)
    grove.tree.unpin(pin, used=True)
    grove.ledger.release(lease, step=1)


def test_a_node_that_another_reads_does_not_grow_under_its_receipt() -> None:
    grove = Grove()
    pin, lease = grove.start(1, match_pages=0), grove.draw(2)
    grove.tree.publish_live(pin, lease, tokens(1))
    reader = grove.start(1)
    grove.tree.publish_live(pin, lease, tokens(2))
    assert len(reader.pages) == 1
    assert [len(node.pages) for node in reader.path()] == [1]
    assert grove.tree.hard_pages == 2
    for each in (pin, reader):
        grove.tree.unpin(each, used=True)
    grove.ledger.release(lease, step=1)


def test_h62_a_running_sequence_keeps_its_own_copy_of_a_page_that_the_tree_has() -> None:
    grove = Grove()
    pin, lease = grove.start(1, match_pages=0), grove.draw(2)
    own = list(lease.pages)
    grove.grow(1)
    assert not grove.tree.publish_live(pin, lease, tokens(1, 2))
    assert (list(lease.pages), list(pin.pages)) == (own, [])
    grove.tree.unpin(pin, used=True)
    grove.ledger.release(lease, step=1)


@pytest.mark.parametrize(
    ("there", "adopted"), [((), 3), ((1,), 2), ((1, 2), 1), ((1, 2, 3), 0), ((1, 2, 3, 4), 0), ((1, 9), 2)]
)
def test_h62_of_an_ended_sequence_only_what_the_tree_lacks_is_adopted(there: tuple[int, ...], adopted: int) -> None:
    grove = Grove()
    if there:
        grove.grow(*there)
    pin, lease = grove.start(1, 2, 3, match_pages=0), grove.draw(4)
    before = list(lease.pages)
    assert grove.tree.publish_ended(pin, lease, tokens(1, 2, 3)) == adopted
    assert list(lease.pages) == before[: 3 - adopted] + before[3:]
    assert grove.matched(1, 2, 3) == 3
    grove.tree.unpin(pin, used=True)
    grove.ledger.release(lease, step=1)


def test_an_ended_sequence_publishes_below_what_it_read() -> None:
    grove = Grove()
    grove.grow(1, 2)
    pin, lease = grove.start(1, 2), grove.draw(2)
    assert grove.tree.publish_ended(pin, lease, tokens(3)) == 1
    assert (len(pin.pages), grove.tree.hard_pages, grove.matched(1, 2, 3)) == (2, 2, 3)
    grove.tree.unpin(pin, used=True)
    grove.ledger.release(lease, step=1)


def test_the_leaf_that_was_not_used_for_longest_is_evicted_first() -> None:
    grove = Grove()
    for page in (1, 2, 3):
        grove.grow(page)
    grove.tree.unpin(grove.start(1), used=True)
    order = []
    for _ in range(3):
        before = [page for page in (1, 2, 3) if grove.matched(page)]
        grove.evict()
        order += [page for page in before if not grove.matched(page)]
    assert order == [2, 3, 1]


def test_looking_without_using_does_not_change_the_order() -> None:
    grove = Grove()
    grove.grow(1)
    grove.grow(2)
    grove.tree.unpin(grove.start(1), used=False)
    grove.matched(1)
    grove.evict()
    assert (grove.matched(1), grove.matched(2)) == (0, 1)


def test_a_leaf_shrinks_page_by_page_from_its_tail() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    assert [(grove.evict(), grove.matched(1, 2, 3)) for _ in range(3)] == [(1, 2), (1, 1), (1, 0)]
    assert (grove.tree.nodes, grove.tree.oldest_use()) == (0, None)


def test_a_parent_is_evicted_after_all_its_children() -> None:
    grove = Grove()
    grove.grow(1, 2)
    grove.grow(1, 3)
    sizes = []
    while grove.tree.oldest_use() is not None:
        grove.evict(9)
        sizes.append(grove.matched(1))
    assert sizes == [1, 1, 0]


def test_an_evicted_page_waits_for_the_step_that_was_newest_when_it_was_let_go() -> None:
    grove = Grove(4)
    grove.tree.step = 6
    grove.grow(1, 2)
    grove.tree.evict_oldest(1)
    assert (grove.ledger.balance(TREE), grove.ledger.balance(LIMBO)) == (1, 1)
    grove.ledger.settle(5)
    assert grove.ledger.limbo_pages == 1
    grove.ledger.settle(6)
    assert grove.ledger.limbo_pages == 0


def test_a_shrunk_leaf_can_grow_again() -> None:
    grove = Grove()
    grove.grow(1, 2, 3)
    grove.evict(2)
    grove.grow(1, 2, 3)
    assert grove.matched(1, 2, 3) == 3
    assert grove.ledger.balance(TREE) == 3


def test_a_leaf_in_steady_use_is_evicted_once_for_all_its_uses() -> None:
    grove = Grove()
    grove.grow(1)
    grove.grow(2)
    for _ in range(500):
        grove.tree.unpin(grove.start(1), used=True)
    assert [grove.evict(), grove.evict()] == [1, 1]
    assert grove.tree.oldest_use() is None
