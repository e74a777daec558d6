"""The pace of drafting on what real text came to: recorded answers played against step times, without a model.

The drafts of each place of an answer, how many of them were right and how much matched are those that a real model had
(`sessile/bench/speculate_recorded.json`); steps take what they took on an H100 with the 1.5B shape. What comes out is
decided by the rules alone, to the last digit, and so shows what a change of them is worth.
"""

from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
import pytest

from sessile.bench.speculate_record import RECORDED, RecordedAnswer, Recording
from sessile.core.planning import ASK_EVERY_MAX, QUIET_ASKS
from sessile.draft.pace import Acceptance, LateScale, StepTimes, affordable
from tests.unit.weighed import learned_by, plain_ns, step_ns

VERIFY_MS = (1.57, 2.08, 2.08, 2.09, 2.09, 2.45, 2.45, 3.05, 3.08, 4.81)
PLAIN_MS = (1.57, 1.82, 1.97, 2.00, 2.21, 2.81, 3.48)
TIMES = StepTimes(
    (1, 2, 16, 17, 32, 33, 64, 128, 256, 512), tuple(round(ms * 1e6) for ms in VERIFY_MS), 350_000, 20_000,
    (1, 8, 16, 32, 64, 128, 256), tuple(round(ms * 1e6) for ms in PLAIN_MS),
)  # fmt: skip
"""Of an H100 at cc14530 (docs/BENCHMARKS.md)."""


@dataclass
class Line:
    """A request that answers as recorded. settled: its tokens; emits: what the step in flight brings it."""

    answer: RecordedAnswer
    acceptance: Acceptance = field(default_factory=Acceptance)
    settled: int = 0
    emits: int = 1
    made: int = 0

    @property
    def left(self) -> int:
        return self.answer.tokens - self.settled

    def run(self, limit: int) -> None:
        """Begin a step with as many drafts as were recorded here, and as the limit and the end allow."""
        self.made = min(limit, self.left - 1, self.answer.offered[self.settled]) if limit else 0
        right = min(self.made, self.answer.accepted[self.settled])
        match = max(self.answer.matches[self.settled], 1)
        for number in range(min(right + 1, self.made)):
            self.acceptance.judge(match + number, number < right)
        self.emits = 1 + right


def wall_ms(answers: list[RecordedAnswer], drafts_max: int, late: LateScale, late_ms: tuple[float, float]) -> float:
    """Until the last of them is answered, of requests sent at once. late_ms: a late step's, in all and for each row."""
    lines = [Line(answer) for answer in answers]
    wall, begins, quiet_asks, steps_unasked = 0.0, True, 0, 0
    while lines:
        # As in an engine: how many drafts is decided before what is in flight has settled, which ones behind it. Nobody
        # asks in each step behind many in which nothing was drafted.
        limits = [0] * len(lines)
        if steps_unasked:
            steps_unasked -= 1
        else:
            matches = np.array([line.answer.matches[line.settled] for line in lines], np.int32)
            allowed = np.array([min(drafts_max, line.left - 1) for line in lines], np.int32)
            learned = learned_by([line.acceptance for line in lines])
            limits = affordable(learned, matches, allowed, len(lines), late, begins=begins).tolist()
            quiet_asks += 1
            steps_unasked = min(quiet_asks // QUIET_ASKS, ASK_EVERY_MAX - 1)
        is_late = not begins or any(limits)
        for line in lines:
            line.settled += line.emits
        limit_of = {id(line): limit for line, limit in zip(lines, limits, strict=True)}
        lines = [line for line in lines if line.left > 0]
        if is_late:
            quiet_asks = steps_unasked = 0
        for line in lines:
            line.run(limit_of[id(line)])
        drafts = sum(line.made for line in lines)
        tokens = len(lines) + drafts
        if lines:
            late_part_ms = is_late * (late_ms[0] + late_ms[1] * len(lines))
            wall += late_part_ms + (step_ns if drafts else plain_ns)(TIMES, tokens) / 1e6
        begins = not drafts
    return wall


def ratios(workload: str, batch: int, *, late_ms: tuple[float, float] = (0.45, 0.03)) -> list[float]:
    """Rate with speculation against without, of each batch of a workload."""
    recording = Recording.read(RECORDED)
    answers, late, found = recording.workloads[workload], LateScale(TIMES), []
    late.factor = (late_ms[0] + 8 * late_ms[1]) * 1e6 / late.ns(8)  # As late steps have told it.
    for number in range(max(32 // batch, 1) if batch > 1 else 12):
        chosen = list(islice(cycle(answers), number * batch, (number + 1) * batch))
        factor = late.factor
        with_drafts = wall_ms(chosen, recording.drafts_max, late, late_ms)
        late.factor = factor
        found.append(wall_ms(chosen, 0, LateScale(TIMES), late_ms) / with_drafts)
    return found


@pytest.mark.parametrize("late_ms", [(0.35, 0.02), (0.45, 0.03), (0.9, 0.05)], ids=["quick", "usual", "slow"])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_h50_chat_is_not_slower_where_hosts_are_quick_and_where_they_are_slow(
    batch: int, late_ms: tuple[float, float]
) -> None:
    found = ratios("chat", batch, late_ms=late_ms)
    assert np.median(found) >= 0.995
    assert min(found) >= (0.98 if batch == 1 else 0.998), "of a batch, all wait for the bets of a few"


@pytest.mark.parametrize(
    ("workload", "least"),
    [
        ("edit", (2.9, 1.9, 1.25)), ("documents", (2.2, 1.4, 1.0)), ("json", (2.5, 2.0, 1.3)),
        ("earlier", (3.9, 3.6, 2.5)),
    ],
)  # fmt: skip
def test_drafts_are_worth_what_they_were_worth(workload: str, least: tuple[float, float, float]) -> None:
    """Of edits, quotations, JSON and answers given before, in batches of 1, 8 and 32."""
    for batch, expected in zip((1, 8, 32), least, strict=True):
        assert np.median(ratios(workload, batch)) >= expected, batch
