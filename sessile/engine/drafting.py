"""Drafting as the engine sees it: whether it can pay on this device, and how long it takes.

The core knows no clock and the drafter no device, so both questions are answered here.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from sessile.contract.drafting import Counts, Drafter, DraftLine, DraftWish, Ints, SequenceIndex
from sessile.engine.clock import Clock
from sessile.units import TokenId

if TYPE_CHECKING:  # An engine that drafts nothing starts sooner without what is compiled there.
    from sessile.draft.pace import StepTimes
    from sessile.draft.shelf import Shelf

StepTable = Sequence[tuple[int, float]]
"""(tokens of a step, its milliseconds), fewest tokens first, as the device measured them at its start."""

ASSUMED_STEP_MS: StepTable = ((1, 5.0), (64, 6.0), (256, 10.0))
"""For a device that measured none: one on which few tokens cost what the weights cost to read."""
LATE_NS, LATE_LINE_NS = 300_000, 20_000
"""What a step with drafts is taken to take longer beside its tokens, until late steps have said it (`LateScale`): the
scheduler's share of it, which overlaps otherwise, in all and for each request; what the device needs to begin comes on
top. On H100 machines late steps said 1.1 to 1.5 times as much, the core compiled."""

PAYS_BELOW = 0.5
"""Verifying a draft may cost at most so much of a step of one token, or drafts that are half right gain nothing."""


class StepFacts(Protocol):
    """What a device found out at its start about how long its steps take."""

    @property
    def step_ms(self) -> StepTable:
        """Of steps of few tokens that verify drafts; empty if nobody drafts, or if they were not measured."""
        ...

    @property
    def decode_ms(self) -> StepTable:
        """Of steps in which each row runs one token, where they are run otherwise than those above; else empty."""
        ...

    @property
    def late_ms(self) -> float:
        """What a step takes longer that is launched only when the one before it is done."""
        ...


MakeDrafter = Callable[["Shelf", StepFacts], "OwnedDrafter"]
"""A drafter for a device with these step times, which finds its corpora on that shelf."""


def can_pay(table: StepTable, drafts_max: int) -> bool:
    """Whether some number of drafts, at most so many, is cheap enough to verify. False where nothing was timed."""
    if not table or table[0][0] != 1:
        return False
    alone_ms = table[0][1]
    costs = [(step_ms - alone_ms) / (tokens - 1) for tokens, step_ms in table[1:] if tokens <= 1 + drafts_max]
    return bool(costs) and min(costs) <= PAYS_BELOW * alone_ms


def lookup_drafter(shelf: "Shelf", facts: StepFacts) -> "OwnedDrafter":
    """The drafter of sessile/draft, ready to be asked; it remembers what it may within the default bounds."""
    from sessile.draft.drafter import LookupDrafter
    from sessile.draft.history import History, HistoryLimits

    drafter = LookupDrafter(shelf, step_times(facts), history=History(HistoryLimits()))
    drafter.prepare()
    return drafter


def step_times(facts: StepFacts) -> "StepTimes":
    """What a device measured, or what is assumed where it did not, as a drafter weighs its drafts against."""
    from sessile.draft.pace import StepTimes

    verifying = facts.step_ms if len(facts.step_ms) > 1 else ASSUMED_STEP_MS
    tokens, times_ns = _points(verifying)
    late_ns = LATE_NS + round(facts.late_ms * 1e6)
    return StepTimes(tokens, times_ns, late_ns, LATE_LINE_NS, *_points(facts.decode_ms))


def _points(table: StepTable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tokens for tokens, _ in table), tuple(round(ms * 1e6) for _, ms in table)


class OwnedDrafter(Drafter, Protocol):
    """A drafter with threads of its own, which end with `close`."""

    def observe_late(self, lines: int, late_ns: int) -> None:
        """A step of so many lines that waited for the one before it was launched so long after that was done."""
        ...

    def close(self) -> None: ...


class TimedDrafter:
    """A drafter, and the time that its answers took: `ns_total`. Owns the drafter."""

    def __init__(self, drafter: OwnedDrafter, clock: Clock) -> None:
        self._drafter = drafter
        self._clock = clock
        self.ns_total = 0

    def close(self) -> None:
        """End the drafter's threads. May be called again."""
        self._drafter.close()

    def check(self, wish: DraftWish) -> None:
        """As the drafter does."""
        self._drafter.check(wish)

    def new_index(self) -> SequenceIndex:
        """The drafter's."""
        return self._drafter.new_index()

    def start(self, index: SequenceIndex, wish: DraftWish) -> DraftLine:
        """The drafter's."""
        return self._drafter.start(index, wish)

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
        """The drafter's, timed."""
        started_ns = self._clock.now_ns()
        self._drafter.extend(lines, tokens, counts)
        self.ns_total += self._clock.now_ns() - started_ns

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        """The drafter's, timed."""
        started_ns = self._clock.now_ns()
        limits = self._drafter.limits(lines, caps, tokens)
        self.ns_total += self._clock.now_ns() - started_ns
        return limits

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> Sequence[Sequence[TokenId]]:
        """The drafter's, timed."""
        started_ns = self._clock.now_ns()
        drafts = self._drafter.draft(lines, caps)
        self.ns_total += self._clock.now_ns() - started_ns
        return drafts

    def settled(self, line: DraftLine, accepted: int) -> None:
        """Tell the drafter."""
        self._drafter.settled(line, accepted)

    def observe_late(self, lines: int, late_ns: int) -> None:
        """Tell the drafter."""
        self._drafter.observe_late(lines, late_ns)

    def remember(self, tenant: str, tokens: bytes) -> None:
        """Tell the drafter, timed."""
        started_ns = self._clock.now_ns()
        self._drafter.remember(tenant, tokens)
        self.ns_total += self._clock.now_ns() - started_ns
