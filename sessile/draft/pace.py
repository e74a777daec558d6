"""How many drafts are worth verifying: what they will probably give against what they make the step cost.

A step of t tokens takes T(t), a table measured at start, and each line waits so long for a token. A draft that is
accepted with probability p brings its line p tokens more, and makes the step longer by a token for all. Drafts are
taken likeliest first, and as many as make the time least that a line waits for a token, on average over the lines; if
even that is not clearly less than without, none are (H50), and where several lines would wait for drafts to begin it
has to be clearer. Tokens of a step against its time would not do: a few lines would double their pace at the price of
all others, who wait for the same step.
Everything here is a function of the table, of what was settled, and of how long late steps are said to have taken: no
clock is read. The arithmetic is in `weighing.py`.
"""

from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sessile.draft.weighing import (
    ACCEPTED_AT,
    CLASSES,
    JUDGED_AT,
    LEARNED_FIELDS,
    MATCH_LENGTHS,
    REST_FADE,
    RESTS_AT,
    weigh_drafts,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.int64]

JUDGED_MAX = 64.0
"""Drafts of a class that are remembered: beyond it old ones fade."""
LATE_TOLD = 16
"""Late steps, the newest of which say how long one takes longer."""
LATE_SCALE_MAX = 4.0
"""Of what was assumed: a step that took longer was disturbed."""
LATE_REST_FADE = 1 / 256
"""What is forgotten of it in a step without drafts: so that a machine that was busy for a while is tried again."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The time of a step by the number of its tokens. tokens: ascending, from 1 or more; times_ns: of each, > 0.

    late_ns: what a step with a late part takes longer, as it does not overlap with the one before it; late_line_ns: and
    for each line that is settled, looked up for and judged meanwhile. plain_tokens, plain_times_ns: of steps without
    drafts, on a device that runs them otherwise (a GPU has kernels and graphs of its own for them); empty: as of all
    others.
    """

    tokens: tuple[int, ...]
    times_ns: tuple[int, ...]
    late_ns: int = 0
    late_line_ns: int = 0
    plain_tokens: tuple[int, ...] = ()
    plain_times_ns: tuple[int, ...] = ()
    curve: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)
    """Tokens and times as compiled code is told of them: a larger step that was measured to be faster is taken to be as
    slow as the smaller one. Beyond the last point, time grows as at its end."""
    plain_curve: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)
    """The same of steps without drafts; maybe empty."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.times_ns) >= 2, "a table of step times has two points or more"
        assert len(self.plain_tokens) == len(self.plain_times_ns), "a point has tokens and a time"
        for tokens in (self.tokens, self.plain_tokens):
            assert all(low < high for low, high in pairwise(tokens)), "tokens must ascend"
        assert min(*self.times_ns, *self.plain_times_ns) > 0, "a step takes time"
        assert min(self.late_ns, self.late_line_ns) >= 0, "a late part makes no step shorter"
        object.__setattr__(self, "curve", _ascending(self.tokens, self.times_ns))
        object.__setattr__(self, "plain_curve", _ascending(self.plain_tokens, self.plain_times_ns))


def _ascending(tokens: tuple[int, ...], times_ns: tuple[int, ...]) -> tuple[Floats, Floats]:
    return np.array(tokens, np.float64), np.maximum.accumulate(np.array(times_ns, np.float64))


@dataclass(slots=True)
class LateScale:
    """How much longer late steps have taken lately than a table says. Told, never measured here."""

    times: StepTimes
    factor: float = 1.0

    def observe(self, lines: int, late_ns: int) -> None:
        """A step of so many lines came so much later than one that is planned ahead."""
        assumed_ns = max(self.times.late_ns + self.times.late_line_ns * lines, 1)
        self.factor += (min(late_ns / assumed_ns, LATE_SCALE_MAX) - self.factor) / LATE_TOLD

    def rest(self) -> None:
        """A step passed without drafts."""
        self.factor += (1 - self.factor) * LATE_REST_FADE

    def ns(self, lines: int) -> float:
        """What a late step of so many lines is expected to take longer."""
        return self.factor * (self.times.late_ns + self.times.late_line_ns * lines)


class Acceptance:
    """What became of a line's drafts, by class of match: counts that fade. address: of them, for compiled code."""

    __slots__ = ("_fields", "address")

    def __init__(self) -> None:
        self._fields = array("d", bytes(8 * LEARNED_FIELDS))
        self.address = self._fields.buffer_info()[0]

    @property
    def rests(self) -> int:
        """Steps without a draft since the last one that was judged."""
        return int(self._fields[RESTS_AT])

    def judge(self, match: int, is_accepted: bool) -> None:
        """One draft behind a match of so many tokens, drafts before it included."""
        fields = self._fields
        if self.rests:
            left = REST_FADE**self.rests
            for at in range(ACCEPTED_AT, JUDGED_AT + CLASSES):
                fields[at] *= left
            fields[RESTS_AT] = 0.0
        kind = bisect_right(MATCH_LENGTHS, match) - 1
        if fields[JUDGED_AT + kind] >= JUDGED_MAX:
            fields[ACCEPTED_AT + kind] /= 2
            fields[JUDGED_AT + kind] /= 2
        fields[ACCEPTED_AT + kind] += is_accepted
        fields[JUDGED_AT + kind] += 1


def affordable(learned: Words, matches: Ints, allowed: Ints, tokens: int, late: LateScale, *, begins: bool) -> Ints:
    """int32[lines]: most drafts worth verifying of each line, and no more than it allows; 0 is a step's rest for it.

    All 0 is one for `late`. learned int64[lines]: the addresses of what the lines have learned (`Acceptance`). matches,
    allowed int32[lines]. tokens: of the step without drafts. begins: the step in flight has no drafts.
    """
    limits = np.empty(len(learned), np.int32)
    curves = (*late.times.curve, *late.times.plain_curve)
    if not weigh_drafts(learned, matches, allowed, tokens, late.ns(len(learned)), begins, *curves, limits):
        late.rest()
    return limits
