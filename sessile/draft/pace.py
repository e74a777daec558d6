"""How many drafts are worth verifying: what they will probably give against what they make the step cost.

A step of t tokens takes T(t), a table measured at start, and each line waits so long for a token. A draft that is
accepted with probability p brings its line p tokens more, and makes the step longer by a token for all. Drafts are
taken likeliest first, and as many as make the time least that a line waits for a token, on average over the lines; if
even that is not clearly less than without, none are (H50), and where several lines would wait for drafts to begin it
has to be clearer. Tokens of a step against its time would not do: a few lines
would double their pace at the price of all others, who wait for the same step.
Everything here is a function of the table, of what was settled, and of how long late steps are said to have taken: no
clock is read.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MATCH_LENGTHS = (1, 2, 3, 5, 9, 17, 33)
"""Matches are judged in classes; each begins at one of these lengths."""
EXPECTED = np.array((0.08, 0.15, 0.35, 0.50, 0.65, 0.80, 0.90))
"""Share of drafts accepted in each class before any was seen: a little below what held-out Python source gives."""
EXPECTED_WEIGHT = 4.0
"""Drafts that what is expected counts for."""
JUDGED_MAX = 64.0
"""Drafts of a class that are remembered: beyond it old ones fade."""
REST_FADE = 1 - 1 / 64
"""What is left of what was learned after a step for which it allowed no draft: so that a line that changes from chat to
code is tried again, at a cost of a few drafts in a hundred steps."""
GAIN_MIN = 1.02
"""Wait without drafts against that with them, below which none are offered: the table is as noisy as that."""
SHARED_GAIN_MIN = 1.07
"""The same where several lines would wait for drafts to begin: what is gained so is a few lines', what it costs all's,
and a bet that gains little on average keeps the slowest of them longer."""
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
    drafts, on a device that runs them otherwise (a GPU has kernels and graphs of their own for them); empty: as of all
    others.
    """

    tokens: tuple[int, ...]
    times_ns: tuple[int, ...]
    late_ns: int = 0
    late_line_ns: int = 0
    plain_tokens: tuple[int, ...] = ()
    plain_times_ns: tuple[int, ...] = ()
    _curve: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)
    _plain_curve: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.times_ns) >= 2, "a table of step times has two points or more"
        assert len(self.plain_tokens) == len(self.plain_times_ns), "a point has tokens and a time"
        for tokens in (self.tokens, self.plain_tokens):
            assert all(low < high for low, high in pairwise(tokens)), "tokens must ascend"
        assert min(*self.times_ns, *self.plain_times_ns) > 0, "a step takes time"
        assert min(self.late_ns, self.late_line_ns) >= 0, "a late part makes no step shorter"
        object.__setattr__(self, "_curve", _ascending(self.tokens, self.times_ns))
        object.__setattr__(self, "_plain_curve", _ascending(self.plain_tokens, self.plain_times_ns))

    def plain_ns(self, tokens: int) -> float:
        """Of a step of so many tokens without drafts. Beyond the last that was measured it holds prompts too, and runs
        like one that verifies."""
        if not self.plain_tokens or tokens > self.plain_tokens[-1]:
            return float(self.time_ns(np.array([tokens], np.int64))[0])
        return float(np.interp(tokens, *self._plain_curve))

    def time_ns(self, tokens: npt.NDArray[np.int64]) -> Floats:
        """Of steps of so many tokens: between two points along a line, beyond the last one along the last line."""
        at, times = self._curve
        slope = (times[-1] - times[-2]) / (at[-1] - at[-2])
        beyond: Floats = np.maximum(tokens - at[-1], 0.0) * slope
        inside: Floats = np.interp(tokens, at, times)
        return inside + beyond


def _ascending(tokens: tuple[int, ...], times_ns: tuple[int, ...]) -> tuple[Floats, Floats]:
    """(tokens, times): a larger step that was measured to be faster is taken to be as slow as the smaller one."""
    return np.array(tokens, np.float64), np.maximum.accumulate(np.array(times_ns, np.float64))


def _nothing() -> list[float]:
    return [0.0] * len(MATCH_LENGTHS)


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


@dataclass(slots=True)
class Acceptance:
    """What became of a line's drafts, by class of match: counts that fade.

    accepted, judged: as they were `rests` steps without a draft ago.
    """

    accepted: list[float] = field(default_factory=_nothing)
    judged: list[float] = field(default_factory=_nothing)
    rests: int = 0

    def judge(self, match: int, is_accepted: bool) -> None:
        """One draft behind a match of so many tokens, drafts before it included."""
        accepted, judged = self.accepted, self.judged
        if self.rests:
            left = REST_FADE**self.rests
            accepted[:] = [count * left for count in accepted]
            judged[:] = [count * left for count in judged]
            self.rests = 0
        kind = bisect_right(MATCH_LENGTHS, match) - 1
        if judged[kind] >= JUDGED_MAX:
            accepted[kind] /= 2
            judged[kind] /= 2
        judged[kind] += 1
        accepted[kind] += is_accepted

    def rest(self) -> None:
        """A step passed without a draft."""
        self.rests += 1


def path_chances(lines: Sequence[Acceptance], matches: npt.NDArray[np.int32], drafts: int) -> Floats:
    """float64[lines, drafts]: the chance that the first 1, 2 … drafts of a line are all accepted; 0 without a match.

    A draft that is accepted makes the match longer by one.
    """
    counts = np.array([(line.accepted, line.judged) for line in lines])
    counts *= (REST_FADE ** np.array([line.rests for line in lines], np.float64))[:, np.newaxis, np.newaxis]
    accepted, judged = counts[:, 0], counts[:, 1]
    each = (accepted + EXPECTED_WEIGHT * EXPECTED) / (judged + EXPECTED_WEIGHT)
    reach = matches[:, None] + np.arange(drafts)
    kinds = np.maximum(np.searchsorted(MATCH_LENGTHS, reach, side="right") - 1, 0)
    chances: Floats = np.cumprod(np.take_along_axis(each, kinds, axis=1), axis=1, dtype=np.float64)
    chances[matches == 0] = 0.0
    return chances


def worthwhile(
    chances: Floats, lines: int, tokens: int, late: LateScale, *, begins: bool = False
) -> npt.NDArray[np.int32]:  # fmt: skip
    """int32[n]: how many drafts of each line a step that runs `tokens` tokens without them should verify.

    chances: of `path_chances`, not rising along a line; 0 where a line allows no more. lines: ≥ n, all that the step
    serves; it verifies nothing for the others. begins: the step in flight has no drafts. The step behind drafts has to
    wait for them in any case; so of steps with drafts in a row each pays for one late part, and the first pays for that
    of the step behind the last one as well.
    """
    count, drafts = chances.shape
    # Stable: of equal chances the lower line's, and of a line's the nearer, so that what is taken is the first of each.
    order = np.argsort(-chances, axis=None, kind="stable")
    order = order[: int(np.count_nonzero(chances))]
    limits = np.zeros(count, np.int32)
    if not len(order):
        return limits
    steps = late.times.time_ns(tokens + np.arange(1, 1 + len(order), dtype=np.int64))
    shares = 1.0 / (1.0 + np.cumsum(chances, axis=1))  # Of a step, that a line waits for each of its tokens.
    saved = 1.0 - shares
    saved[:, 1:] = shares[:, :-1] - shares[:, 1:]
    waits = (1.0 - np.cumsum(saved.ravel()[order]) / lines) * (steps + (1 + begins) * late.ns(lines))
    gain_min = SHARED_GAIN_MIN if begins and lines > 1 else GAIN_MIN
    if waits.min() * gain_min <= late.times.plain_ns(tokens):
        taken = order[: int(waits.argmin()) + 1]
        limits += np.bincount(taken // drafts, minlength=count).astype(np.int32)
    return limits


def affordable(
    lines: Sequence[Acceptance], matches: npt.NDArray[np.int32], allowed: npt.NDArray[np.int32], tokens: int,
    late: LateScale, *, begins: bool,
) -> npt.NDArray[np.int32]:  # fmt: skip
    """int32[lines]: most drafts worth verifying of each line, and no more than it allows; 0 is a step's rest for it.

    All 0 is one for `late`. matches, allowed int32[lines]. tokens: of the step without drafts. begins: as in
    `worthwhile`.
    """
    limits = np.zeros(len(lines), np.int32)
    matching = np.minimum(matches, allowed).nonzero()[0]  # Most lines match nothing.
    if len(matching):
        allowed = allowed[matching]
        chances = path_chances([lines[i] for i in matching.tolist()], matches[matching], int(allowed.max()))
        chances[np.arange(chances.shape[1]) >= allowed[:, None]] = 0.0
        limits[matching] = worthwhile(chances, len(lines), tokens, late, begins=begins)
    for line, limit in zip(lines, limits.tolist(), strict=True):
        if not limit:
            line.rest()
    if not limits.any():
        late.rest()
    return limits
