"""The prefix tree against a dictionary of prefixes: matches, receipts, and what eviction may take."""

from collections.abc import Iterator

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sessile.contract.messages import pack_tokens
from sessile.core.ledger import TREE, Lease, PageLedger
from sessile.core.prefix import Pin, PrefixTree

PAGE_SIZE = 2
Prefix = tuple[int, ...]
"""One letter a page: the page's tokens are all that letter."""

lines = st.lists(st.integers(1, 3), min_size=1, max_size=7).map(tuple)
choice = st.integers(0, 1000)


def packed(line: Prefix, *, less_tokens: int = 0) -> bytes:
    """The line's tokens as the tree takes them, without the last few."""
    return pack_tokens(np.repeat(line, PAGE_SIZE)[: len(line) * PAGE_SIZE - less_tokens])


def beginnings(line: Prefix) -> Iterator[Prefix]:
    for count in range(1, len(line) + 1):
        yield line[:count]


class TreeAgainstDictionary(RuleBasedStateMachine):
    """Sequences start, publish, park, shrink and end; a dictionary knows which prefix has which page."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(200)
        self.tree = PrefixTree(self.ledger, PAGE_SIZE)
        self.pages: dict[Prefix, int] = {}
        self.readers: list[tuple[Pin, Prefix]] = []
        self.step = 0

    def longest(self, line: Prefix) -> int:
        return max((len(prefix) for prefix in beginnings(line) if prefix in self.pages), default=0)

    def covered(self, *, hard: bool | None = None) -> set[Prefix]:
        """Prefixes under a receipt of that kind, or of any."""
        pinned = (line for pin, line in self.readers if hard is None or pin.hard == hard)
        return {prefix for line in pinned for prefix in beginnings(line)}

    def draw(self, count: int) -> Lease:
        lease = self.ledger.open()
        self.ledger.draw(lease, count)
        return lease

    def release(self, lease: Lease) -> None:
        self.step += 1
        self.ledger.release(lease, self.step)
        self.ledger.settle(self.step)

    @rule(line=lines, cap=st.integers(0, 7))
    def match(self, line: Prefix, cap: int) -> None:
        found = self.tree.match("", packed(line), min(cap, len(line)))
        assert found.pages == min(cap, self.longest(line))
        assert found.unpinned_pages == len(set(beginnings(line[: found.pages])) - self.covered(hard=True))

    @rule(line=lines, tail=st.integers(0, PAGE_SIZE - 1))
    def match_ignores_a_partial_page(self, line: Prefix, tail: int) -> None:
        whole_pages = len(line) - (tail > 0)
        match = self.tree.match("", packed(line, less_tokens=tail), whole_pages)
        assert match.pages == self.longest(line[:whole_pages])

    @precondition(lambda self: len(self.readers) < 6)
    @rule(line=lines)
    def pin(self, line: Prefix) -> None:
        pin = self.tree.pin(self.tree.match("", packed(line), len(line)))
        line = line[: self.longest(line)]
        assert list(pin.pages) == [self.pages[prefix] for prefix in beginnings(line)]
        self.readers.append((pin, line))

    @precondition(lambda self: self.readers)
    @rule(choice=choice, used=st.booleans())
    def unpin(self, choice: int, used: bool) -> None:
        pin, _ = self.readers.pop(choice % len(self.readers))
        self.tree.unpin(pin, used=used)

    @precondition(lambda self: self.readers)
    @rule(choice=choice)
    def park_or_wake(self, choice: int) -> None:
        pin, _ = self.readers[choice % len(self.readers)]
        if pin.hard:
            self.tree.soften(pin)
        else:
            self.tree.harden(pin)

    @precondition(lambda self: any(pin.hard for pin, _ in self.readers))
    @rule(choice=choice, pages=choice)
    def shorten(self, choice: int, pages: int) -> None:
        hard = [index for index, (pin, _) in enumerate(self.readers) if pin.hard]
        index = hard[choice % len(hard)]
        pin, line = self.readers[index]
        kept = pages % (len(line) + 1)
        self.tree.shorten(pin, kept)
        self.readers[index] = (pin, line[:kept])

    @precondition(lambda self: any(pin.hard for pin, _ in self.readers))
    @rule(choice=choice, more=lines)
    def publish_live(self, choice: int, more: Prefix) -> None:
        hard = [index for index, (pin, _) in enumerate(self.readers) if pin.hard]
        index = hard[choice % len(hard)]
        pin, line = self.readers[index]
        lease = self.draw(len(more))
        own = list(lease.pages)
        adopted = self.tree.publish_live(pin, lease, packed(more))
        assert adopted == ((*line, more[0]) not in self.pages)
        if adopted:
            self.pages |= {(*line, *prefix): own[len(prefix) - 1] for prefix in beginnings(more)}
            self.readers[index] = (pin, (*line, *more))
        assert len(lease) == (0 if adopted else len(more))
        self.release(lease)

    @rule(line=lines, read=st.booleans())
    def publish_ended(self, line: Prefix, read: bool) -> None:
        pin = self.tree.pin(self.tree.match("", packed(line), len(line) - 1 if read else 0))
        start = len(pin.pages)
        lease = self.draw(len(line) - start)
        own = list(lease.pages)
        lacking = [prefix for prefix in beginnings(line) if prefix not in self.pages]
        assert self.tree.publish_ended(pin, lease, packed(line[start:])) == len(lacking)
        self.pages |= {prefix: own[len(prefix) - start - 1] for prefix in lacking}
        self.tree.unpin(pin, used=True)
        self.release(lease)

    @precondition(lambda self: self.tree.oldest_use() is not None)
    @rule(wanted=st.integers(1, 5))
    def evict(self, wanted: int) -> None:
        count = self.tree.evict_oldest(wanted)
        gone = [prefix for prefix, page in self.pages.items() if self.ledger.tags[page] != TREE]
        assert 1 <= len(gone) == count <= wanted
        assert not set(gone) & self.covered()
        for prefix in gone:
            del self.pages[prefix]
        assert all(not prefix[:-1] or prefix[:-1] in self.pages for prefix in self.pages), "a tail lost its beginning"
        self.ledger.settle(self.step)

    @invariant()
    def nothing_can_be_evicted_only_if_everything_is_read(self) -> None:
        leaves = {prefix for prefix in self.pages if not any((*prefix, letter) in self.pages for letter in (1, 2, 3))}
        assert (self.tree.oldest_use() is None) == (leaves <= self.covered())

    @invariant()
    def receipts_and_locks_agree(self) -> None:
        assert self.ledger.balance(TREE) == len(self.pages)
        assert self.tree.hard_pages == len(self.covered(hard=True))
        assert self.tree.unpinned_pages == len(self.pages) - self.tree.hard_pages
        nodes = list(self.tree.walk())
        assert self.tree.nodes == len(nodes)
        for node in nodes:
            below = [pin for pin, _ in self.readers if any(each is node for each in pin.path())]
            assert (node.hard, node.soft) == (sum(pin.hard for pin in below), sum(not pin.hard for pin in below))

    @invariant()
    def receipts_list_the_pages_of_their_packed(self) -> None:
        for pin, line in self.readers:
            assert list(pin.pages) == [self.pages[prefix] for prefix in beginnings(line)]


TreeAgainstDictionary.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestTreeAgainstDictionary = TreeAgainstDictionary.TestCase
