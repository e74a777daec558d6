"""Drafting as the engine runs it: when there is a drafter, what it is told of the device, and what it costs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sessile.contract.drafting import DraftWish
from sessile.contract.messages import Sampling, Submit, pack_tokens
from sessile.contract.plan import StepPlan
from sessile.core.limits import SchedulerOptions
from sessile.device.factory import TIMED_TOKENS, time_steps
from sessile.draft.shelf import Shelf
from sessile.engine.build import DeviceRequest, Engine, open_engine
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import TimedDrafter, can_pay, lookup_drafter
from tests.unit.drafters import PerfectDrafter
from tests.unit.stage_device import small_device
from tests.unit.test_engine_build import OpenedToy, describe, run_to_end

CHEAP = ((1, 10.0), (2, 10.5), (4, 11.0), (8, 12.0))
DEAR = ((1, 10.0), (2, 19.0), (4, 38.0), (8, 75.0))


class Steps:
    """A clock that moves on by a millisecond whenever it is asked."""

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        self._now_ns += 1_000_000
        return self._now_ns


class ClosingDrafter(PerfectDrafter):
    closed = 0

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self.late: list[tuple[int, int]] = []

    def observe_late(self, lines: int, late_ns: int) -> None:
        self.late.append((lines, late_ns))

    def close(self) -> None:
        self.closed += 1


def opened(step_ms: Any = (), **options: Any) -> tuple[Engine, list[Any]]:
    """An engine over the toy device, and (shelf, table) of every drafter that was made for it."""
    made: list[Any] = []

    def open_toy(request: DeviceRequest) -> OpenedToy:
        toy = OpenedToy(request)
        toy.facts.step_ms = step_ms
        return toy

    def make(shelf: Shelf, facts: Any) -> ClosingDrafter:
        made.append((shelf, facts.step_ms))
        return ClosingDrafter(limit=3)

    engine = open_engine(
        SchedulerOptions(audit_level=2), EngineOptions(**options), open_toy, describe, on_cpu=True, clock=Steps(),
        make_drafter=make,
    )  # fmt: skip
    return engine, made


def test_nothing_is_drafted_unless_it_is_asked_for() -> None:
    engine, made = opened(CHEAP)
    assert (engine.drafter, made) == (None, [])
    assert isinstance(engine.device, OpenedToy) and engine.device.request.drafts_max == 0


@pytest.mark.parametrize(("table", "drafts"), [(CHEAP, True), (DEAR, False), ((), False)])
def test_auto_drafts_where_the_measured_table_says_that_it_can_pay(table: Any, drafts: bool) -> None:
    engine, made = opened(table, speculate="auto")
    assert (engine.drafter is not None) == drafts == bool(made)


@pytest.mark.parametrize("table", [CHEAP, DEAR, ()])
def test_a_drafter_is_given_the_step_times_of_its_device(table: Any) -> None:
    engine, made = opened(table, speculate="on", drafts_max=5)
    assert [given for _, given in made] == [table]
    assert isinstance(engine.device, OpenedToy) and engine.device.request.drafts_max == 5


def test_only_drafts_within_the_bound_can_pay() -> None:
    late = ((1, 10.0), (2, 19.0), (4, 37.0), (8, 12.0))
    assert can_pay(late, 7) and not can_pay(late, 3)


def test_an_engine_that_drafts_says_how_long_that_took() -> None:
    engine, _ = opened(CHEAP, speculate="on")
    submit = Submit(key=1, tokens=pack_tokens([1, 5, 6]), sampling=Sampling(seed=1, temperature=0.0, max_new_tokens=20))
    run_to_end(engine, submit)
    assert engine.machine.stats().drafts_offered_total > 0
    assert engine.drafter is not None and engine.drafter.ns_total > 0


def test_h50_a_drafter_is_told_how_late_the_steps_are_that_wait_for_it() -> None:
    engine, _ = opened(CHEAP, speculate="on")
    submit = Submit(key=1, tokens=pack_tokens([1, 2, 3]), sampling=Sampling(seed=0, max_new_tokens=40))
    run_to_end(engine, submit)
    assert engine.drafter is not None
    late = engine.drafter._drafter.late  # type: ignore[attr-defined]
    # Here every look at the clock takes one step of it, and between a result and the next launch there are some.
    assert len(late) >= engine.machine.stats().verifications_total - 1 > 3
    assert {lines for lines, _ in late} == {1} and all(0 < late_ns < 50_000_000 for _, late_ns in late)


def test_closing_an_engine_ends_its_drafter() -> None:
    engine, _ = opened(CHEAP, speculate="on")
    drafter = engine.drafter
    engine.close()
    assert isinstance(drafter, TimedDrafter) and drafter._drafter.closed == 1  # type: ignore[attr-defined]


@pytest.fixture
def timed(tmp_path: Path) -> Iterator[tuple[tuple[int, float], ...]]:
    with small_device(tmp_path) as device:
        yield device.facts.step_ms


def test_a_cpu_measures_its_steps_at_the_start(timed: tuple[tuple[int, float], ...]) -> None:
    sizes = [tokens for tokens, _ in timed]
    assert sizes == list(TIMED_TOKENS)[: len(sizes)] and len(sizes) >= 4
    assert all(ms > 0 for _, ms in timed)


class StallingRunner:
    """A device that takes 0.5 ms a token, but for its first timed step: then something else has the processor."""

    pages_total = 64

    def __init__(self, stalled_s: float) -> None:
        self._stalls_s = [stalled_s]

    def run(self, plan: StepPlan) -> None:
        if plan.tokens.size:
            time.sleep(self._stalls_s.pop() if self._stalls_s else 5e-4 * plan.tokens.size)


@pytest.mark.parametrize("stalled_s", [0.15, 0.5])
def test_a_stall_at_the_start_is_not_taken_for_the_time_of_a_step(stalled_s: float) -> None:
    """Verifying would seem to cost nothing, and drafts that are wrong would be offered all the time."""
    runner: Any = StallingRunner(stalled_s)
    table = time_steps(runner, page_size=16, rows_max=8)
    assert [tokens for tokens, _ in table][:4] == list(TIMED_TOKENS)[:4]
    assert table[0][1] < 1e3 * stalled_s


@pytest.mark.parametrize("table", [CHEAP, ()])
def test_the_drafter_of_an_engine_finds_what_was_said_before(table: Any) -> None:
    """On a device without a table too, with the times that are assumed then."""
    engine = open_engine(
        SchedulerOptions(audit_level=2), EngineOptions(speculate="on"), OpenedToy, describe, on_cpu=True, clock=Steps(),
        make_drafter=lambda shelf, facts: lookup_drafter(shelf, replace(facts, step_ms=table)),
    )  # fmt: skip
    assert engine.drafter is not None
    line = engine.drafter.start(engine.drafter.new_index(), DraftWish("", None, 4))
    line.index.extend(pack_tokens([7, 8, 9, 10, 11, 12] * 8))
    assert engine.drafter.limits([line], [4], 1)[0] > 0
    assert list(engine.drafter.draft([line], [3])[0]) == [7, 8, 9]
    engine.close()
