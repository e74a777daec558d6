"""Drafters for tests: one that knows what is to be said, and what they have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sessile.contract.drafting import Counts, DraftLine, DraftWish, Ints, SequenceIndex, SourceUse
from sessile.errors import NotFound
from sessile.sim.drafter import ListIndex, extend_each
from tests.unit.stage import expected

CORPORA = ("python", "letters")
"""What every tenant has here."""


@dataclass
class Line:
    """A DraftLine that remembers what became of its drafts. verdicts: accepted drafts, step by step."""

    index: SequenceIndex
    wish: DraftWish
    shown: int = 0
    verdicts: list[int] = field(default_factory=list)
    offered: int = 0

    def uses(self) -> Sequence[SourceUse]:
        return [SourceUse("session", self.offered, sum(self.verdicts))]


class ToldDrafter:
    """Asks `said` for what follows a text, for every line; keeps what it was told. limit: drafts wanted for each."""

    def __init__(self, said: Callable[[list[int], int], list[int]], limit: int = 4) -> None:
        self._said = said
        self.limit = limit
        self.shown: list[list[int]] = []
        """Every text that it was asked about."""
        self.lines: list[Line] = []
        self.calls: list[int] = []
        """Rows of each call of `draft`."""
        self.limit_calls: list[tuple[int, int]] = []
        """(rows, tokens) of each call of `limits`."""
        self.caps: list[list[int]] = []
        """What each of these calls asked for at most."""
        self.remembered: list[tuple[str, bytes]] = []

    def check(self, wish: DraftWish) -> None:
        for name in wish.corpora or ():
            if name not in CORPORA:
                raise NotFound(f"corpus {name!r} does not exist", param="corpora")

    def new_index(self) -> ListIndex:
        return ListIndex()

    def start(self, index: SequenceIndex, wish: DraftWish) -> Line:
        self.lines.append(Line(index, wish))
        return self.lines[-1]

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
        extend_each(lines, tokens, counts)

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        self.limit_calls.append((len(lines), tokens))
        self.caps.append(list(caps))
        return [min(self.limit, cap) for cap in caps]

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> list[list[int]]:
        self.calls.append(len(lines))
        drafts = []
        for line, cap in zip(lines, caps, strict=True):
            text = line.index.known.tolist()
            self.shown.append(text)
            drafts.append(self._said(text, cap)[:cap])
            line.shown = len(drafts[-1])
        return drafts

    def settled(self, line: Line, accepted: int) -> None:
        assert 0 <= accepted <= line.shown, "more drafts were accepted than proposed"
        line.verdicts.append(accepted)
        line.offered += line.shown
        line.shown = 0

    def remember(self, tenant: str, tokens: bytes) -> None:
        self.remembered.append((tenant, tokens))


class PerfectDrafter(ToldDrafter):
    """Proposes what the toy model will say: `right` tokens of it, and then as many wrong ones as it may."""

    def __init__(self, right: int = 99, limit: int = 4) -> None:
        def said(text: list[int], count: int) -> list[int]:
            tokens = expected(text, count)
            return [token if index < right else (token + 1) % 50 for index, token in enumerate(tokens)]

        super().__init__(said, limit)
