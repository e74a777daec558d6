"""A drafter that plays what was recorded: as many drafts at each place of an answer, and as many of them right.

The model of a GPU benchmark has seeded random weights. What it says to a prompt is learned by running it once; then the
drafts that were right on real text become what it says, and those that were wrong become something else. So the device
verifies in earnest, and what it accepts is known. How many drafts are offered is decided as in service, by the pace of
sessile/draft from the device's step times and from what was accepted; the lookup is made as well, on what this model
says, and thrown away, so that a step costs what it costs in service.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sessile.bench.speculate_record import RecordedAnswer
from sessile.contract.drafting import Counts as TokenCounts
from sessile.contract.drafting import DraftLine, DraftWish, Ints, SequenceIndex, SourceUse
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import Acceptance, LateScale, StepTimes, affordable
from sessile.errors import NotFound
from sessile.units import TokenId

SOURCE = "recorded"


@dataclass
class Expected:
    """What was recorded of an answer, and what the model here says instead of it: as many tokens, once learned."""

    recorded: RecordedAnswer
    tokens: list[int] = field(default_factory=list)

    def learn(self, said: list[int]) -> None:
        """The model has said this last, so it is expected to say it again: in steps of another shape near ties part."""
        self.tokens = said


@dataclass
class Counts:
    """Of lines and steps. as_recorded: of those with drafts, in which as many were accepted as were right."""

    asked: int = 0
    with_drafts: int = 0
    as_recorded: int = 0
    offered: int = 0
    accepted: int = 0


class ReplayedLine:
    """One request. Made by `ReplayingDrafter.start`, which alone changes it."""

    def __init__(self, looked_up: DraftLine, expected: Expected) -> None:
        self.looked_up = looked_up
        self.acceptance = Acceptance()
        self._expected = expected
        self._sequence, self._prompt_tokens = looked_up.index, expected.recorded.prompt_tokens
        self._match = self._made = self._right = 0
        self._offered = self._accepted = 0

    @property
    def index(self) -> SequenceIndex:
        """That of the request's sequence."""
        return self._sequence

    @property
    def match(self) -> int:
        """The longest match that was recorded where the answer is now."""
        return self._expected.recorded.matches[self._place]

    @property
    def has_drafts(self) -> bool:
        """Whether some are in flight."""
        return self._made > 0

    def uses(self) -> Sequence[SourceUse]:
        """What was offered and accepted; as of the lookup, nothing where nothing was offered."""
        return [SourceUse(SOURCE, self._offered, self._accepted)] if self._offered else []

    def offer(self, cap: int) -> list[TokenId]:
        """At most so many drafts, of those that were recorded here."""
        place, expected = self._place, self._expected
        self._match = max(self.match, 1)
        self._made = min(cap, expected.recorded.offered[place])
        self._right = min(self._made, expected.recorded.accepted[place])
        said = expected.tokens[place : place + self._made]
        assert len(said) == self._made, f"{len(said)} tokens were learned where {self._made} drafts were recorded"
        # Any other token is wrong; this one is in every vocabulary of an even size.
        return [TokenId(token if number < self._right else token ^ 1) for number, token in enumerate(said)]

    def judge(self, accepted: int, counts: Counts) -> None:
        """So many of the last drafts were accepted: learn from them as lookup does, and count."""
        for number in range(min(accepted + 1, self._made)):
            self.acceptance.judge(self._match + number, number < accepted)
        self._offered += self._made
        self._accepted += accepted
        if self._made:
            counts.with_drafts += 1
            counts.as_recorded += accepted == self._right
            counts.offered += self._made
            counts.accepted += accepted
        self._made = 0

    @property
    def _place(self) -> int:
        """How much of the answer is settled."""
        return self._sequence.tokens - self._prompt_tokens


class ReplayingDrafter:
    """Implements the contract's Drafter. A request names its answer as its only corpus.

    lookup: asked for its time alone; owned. expected: the answers by name.
    """

    def __init__(self, lookup: LookupDrafter, times: StepTimes) -> None:
        self.expected: dict[str, Expected] = {}
        self.late = LateScale(times)
        self._lookup = lookup
        self._counts = Counts()

    def take_counts(self) -> Counts:
        """What happened since the last time."""
        counts, self._counts = self._counts, Counts()
        return counts

    def check(self, wish: DraftWish) -> None:
        """Raise NotFound for an answer that is not there."""
        for name in wish.corpora or ():
            if name not in self.expected:
                raise NotFound(f"corpora: no answer {name!r} is expected", param="corpora")

    def new_index(self) -> SequenceIndex:
        """The lookup's."""
        return self._lookup.new_index()

    def start(self, index: SequenceIndex, wish: DraftWish) -> ReplayedLine:
        """A request begins whose sequence `index` is of."""
        assert wish.corpora is not None and len(wish.corpora) == 1, "a request of this bench names its answer"
        looked_up = self._lookup.start(index, DraftWish(wish.tenant, (), wish.drafts_max))
        return ReplayedLine(looked_up, self.expected[wish.corpora[0]])

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: TokenCounts) -> None:
        """The lookup's."""
        self._lookup.extend([_ours(line).looked_up for line in lines], tokens, counts)

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        """Most drafts worth verifying, by what was recorded and by the pace."""
        ours = [_ours(line) for line in lines]
        self._lookup.matches([line.looked_up for line in ours])
        self._counts.asked += len(ours)
        matches = np.array([line.match for line in ours], np.int32)
        allowed = np.array(caps, np.int32)
        begins = not any(line.has_drafts for line in ours)
        learned = np.array([line.acceptance.address for line in ours], np.int64)
        limits: list[int] = affordable(learned, matches, allowed, tokens, self.late, begins=begins).tolist()
        return limits

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> Sequence[Sequence[TokenId]]:
        """What was recorded where each line is now."""
        ours = [_ours(line) for line in lines]
        self._lookup.draft([line.looked_up for line in ours], caps)
        return [line.offer(cap) for line, cap in zip(ours, caps, strict=True)]

    def observe_late(self, lines: int, late_ns: int) -> None:
        """As lookup is told."""
        self.late.observe(lines, late_ns)

    def settled(self, line: DraftLine, accepted: int) -> None:
        """How many of the line's last drafts the model accepted."""
        ours = _ours(line)
        self._lookup.settled(ours.looked_up, 0)
        ours.judge(accepted, self._counts)

    def remember(self, tenant: str, tokens: bytes) -> None:
        """Nothing is kept of what this model says."""

    def close(self) -> None:
        """End the lookup's threads."""
        self._lookup.close()


def _ours(line: DraftLine) -> ReplayedLine:
    assert isinstance(line, ReplayedLine), "a line of another drafter"
    return line
