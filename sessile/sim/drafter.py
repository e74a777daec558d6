"""A toy drafter: it knows the right tokens and is wrong as often as its world wants.

A request that names `corpus_of` its key among its corpora is drafted from what it is about to say; one that names none,
from its own tokens. Every index is a plain list, checked against what its request has said whenever it is asked.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np

from sessile.contract.drafting import Counts, DraftLine, DraftWish, Ints, SequenceIndex, SourceUse
from sessile.errors import NotFound
from sessile.sim import hashing
from sessile.sim.books import Books
from sessile.sim.records import check, corpus_of
from sessile.sim.world import World
from sessile.units import TokenId


class ListIndex:
    """A SequenceIndex that keeps its tokens and indexes nothing."""

    def __init__(self, known: "array[int] | None" = None) -> None:
        self.known = array("i") if known is None else known

    @property
    def tokens(self) -> int:
        """How many it holds."""
        return len(self.known)

    def extend(self, tokens: bytes) -> None:
        """Tokens at the end."""
        self.known.frombytes(tokens)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first ones."""
        assert 0 <= tokens <= len(self.known), f"an index of {len(self.known)} tokens was cut to {tokens}"
        del self.known[tokens:]

    def fork(self, tokens: int) -> "ListIndex":
        """One of the first tokens, independent of this one."""
        assert 0 <= tokens <= len(self.known), f"an index of {len(self.known)} tokens was forked at {tokens}"
        return ListIndex(self.known[:tokens])

    def looked_up(self, most: int) -> list[TokenId]:
        """What followed the last token where it occurred before, latest place first."""
        known = self.known
        for place in range(len(known) - 2, -1, -1):
            if known[place] == known[-1]:
                return [TokenId(token) for token in known[place + 1 : place + 1 + most]]
        return []


STRETCH_TOKENS = 8
"""Of a sequence: in one of three such stretches nothing is drafted."""
SILENCE_ASKS, SILENCE_EVERY = 24, 32
"""In calm worlds: in so many of so many asks there is nothing to say."""


def extend_each(lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
    """`Drafter.extend`, one index after the other."""
    ends = np.cumsum(counts).tolist()
    assert len(ends) == len(lines) and ends[-1] == len(tokens), "tokens of other lines than those"
    for line, first, last in zip(lines, [0, *ends], ends, strict=False):
        if first < last:
            line.index.extend(tokens[first:last].tobytes())


@dataclass
class ToyLine:
    """A DraftLine. key: of the request it is, where that is known."""

    index: SequenceIndex
    key: int | None
    shown: int = 0
    """Drafts that were not judged yet."""
    offered: int = 0
    accepted: int = 0

    def uses(self) -> Sequence[SourceUse]:
        """One source a line."""
        source = "session" if self.key is None else f"corpus:{corpus_of(self.key)}"
        return [SourceUse(source, self.offered, self.accepted)]


@dataclass
class ToyDrafter:
    """A Drafter. Deterministic: the same request at the same length gets the same drafts."""

    world: World
    books: Books
    indexes: "WeakSet[_TrackedIndex]" = field(default_factory=WeakSet)
    """Every index that anybody holds."""
    asked: int = 0
    """Calls of `limits`."""

    def check(self, wish: DraftWish) -> None:
        """Whose corpus it is must have been sent before, or just now."""
        known = [corpus_of(request.key) for request in self.books.live.values()]
        unknown = [name for name in wish.corpora or () if name not in known]
        if unknown:
            raise NotFound(f"corpus {unknown[0]!r} does not exist", param="corpora")

    def new_index(self) -> SequenceIndex:
        """An empty one."""
        return self._tracked(ListIndex())

    def start(self, index: SequenceIndex, wish: DraftWish) -> DraftLine:
        """A request begins: which one, the corpus that it names tells."""
        by_corpus = {corpus_of(key): key for key in self.books.live}
        return ToyLine(index, by_corpus[wish.corpora[0]] if wish.corpora else None)

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
        """Each index gets its own."""
        extend_each(lines, tokens, counts)

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        """0 to what each has a use for, differing from step to step; the most they can be every other time.

        In one world of four nothing in some stretches, so that steps in a row have no drafts though they may; in
        calm worlds, most of the time, nothing for all at once.
        """
        most, has_stretches = self.world.limits.drafts_max, self.world.seed % 4 == 0
        self.asked += 1
        if self.world.is_calm and self.asked % SILENCE_EVERY < SILENCE_ASKS:
            return [0] * len(lines)
        return [
            0
            if has_stretches and self._dice(line, line.index.tokens // STRETCH_TOKENS) % 3 == 0
            else min(cap, self._dice(line, line.index.tokens) % (2 * most))
            for line, cap in zip(lines, caps, strict=True)
        ]

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> Sequence[Sequence[TokenId]]:
        """Up to as many as are asked for, each wrong by chance."""
        return [self._drafts(line, cap) for line, cap in zip(lines, caps, strict=True)]

    def settled(self, line: DraftLine, accepted: int) -> None:
        """Count."""
        assert isinstance(line, ToyLine)
        check(0 <= accepted <= line.shown, "draft", f"{accepted} of {line.shown} drafts were accepted")
        line.accepted += accepted
        line.offered += line.shown
        line.shown = 0

    def remember(self, tenant: str, tokens: bytes) -> None:
        """Count: what is remembered changes no draft here."""
        self.books.totals["remembered tokens"] += len(tokens) // 4

    def _drafts(self, line: DraftLine, cap: int) -> list[TokenId]:
        assert isinstance(line, ToyLine) and isinstance(line.index, ListIndex)
        drafts = line.index.looked_up(cap) if line.key is None else self._known(line.key, line, cap)
        drafts = drafts[: self._dice(line, -line.index.tokens) % (cap + 1)] if cap > 1 else drafts
        line.shown = len(drafts)
        return drafts

    def _known(self, key: int, line: ToyLine, cap: int) -> list[TokenId]:
        """What a request says next, as far as the dice let us."""
        request = self.books.requests[key]
        speaker = request.speaker.copy()
        text = [*request.prompt, *request.output]
        # The client may not have got the newest tokens yet.
        while len(text) < line.index.tokens:
            text.append(speaker.peek())
            speaker.push(text[-1])
        assert isinstance(line.index, ListIndex)
        check(line.index.known.tolist() == text, "index", f"request {key} has {len(text)} tokens, its index has others")
        drafts = []
        for _ in range(cap):
            token = speaker.peek()
            if token < 0:
                break
            speaker.push(token)
            is_wrong = self._dice(line, speaker.chain.length) % 1000 >= self.world.temper.draft_rate * 1000
            drafts.append(TokenId((token + is_wrong) % self.world.facts.vocab_size))
        return drafts

    def _dice(self, line: DraftLine, length: int) -> int:
        assert isinstance(line, ToyLine)
        return hashing.mix(hashing.mix(self.world.seed + ((line.key or 0) << 24)) + length)

    def _tracked(self, index: ListIndex) -> "_TrackedIndex":
        return _TrackedIndex(index.known, self.indexes)


class _TrackedIndex(ListIndex):
    """An index that is on the list of all there are for as long as somebody holds it."""

    def __init__(self, known: "array[int]", indexes: "WeakSet[_TrackedIndex]") -> None:
        super().__init__(known)
        self._indexes = indexes
        indexes.add(self)

    def fork(self, tokens: int) -> "_TrackedIndex":
        """On the same list."""
        return _TrackedIndex(super().fork(tokens).known, self._indexes)
