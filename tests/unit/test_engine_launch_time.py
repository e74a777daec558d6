"""When the next step has to be planned: before the device is done, and as late as that allows."""

import numpy as np

from sessile.contract.plan import StepPlan
from sessile.engine.launch_time import MARGIN_NS, RECENT_STEPS, ROWS_MAX, SIZES_MAX, LaunchTime

MS = 1_000_000


def plan_of(tokens: int, rows: int) -> StepPlan:
    return StepPlan.empty(1, tokens=np.zeros(tokens, np.int32), rows=np.arange(rows, dtype=np.int32))


DECODE, PROMPT = plan_of(8, 8), plan_of(135, 8)


def test_a_size_that_was_not_seen_is_due_at_once() -> None:
    times = LaunchTime()
    times.observe_step(DECODE, 5 * MS)
    assert times.due_ns(PROMPT, 70 * MS) == 70 * MS
    assert times.due_ns(DECODE, 70 * MS) == 75 * MS - MARGIN_NS


def test_steps_of_many_rows_are_followed_at_once() -> None:
    times = LaunchTime()
    for rows in (ROWS_MAX, ROWS_MAX + 1):
        times.observe_step(plan_of(rows, rows), 5 * MS)
    assert times.due_ns(plan_of(ROWS_MAX, ROWS_MAX), 0) == 5 * MS - MARGIN_NS
    assert times.due_ns(plan_of(ROWS_MAX + 1, ROWS_MAX + 1), 0) == 0


def test_the_shortest_of_the_last_steps_counts() -> None:
    times = LaunchTime()
    for step_ms in (9, 3, 7, 20):
        times.observe_step(DECODE, step_ms * MS)
    assert times.due_ns(DECODE, 0) == 3 * MS - MARGIN_NS
    for _ in range(RECENT_STEPS):
        times.observe_step(DECODE, 8 * MS)
    assert times.due_ns(DECODE, 0) == 8 * MS - MARGIN_NS


def test_a_slow_host_is_believed_at_once_and_a_quick_one_by_and_by() -> None:
    times = LaunchTime()
    times.observe_step(DECODE, 5 * MS)
    times.observe_host(DECODE, MS)
    assert times.due_ns(DECODE, 0) == 4 * MS - MARGIN_NS
    times.observe_host(DECODE, MS // 5)
    after_one = times.due_ns(DECODE, 0)
    assert 4 * MS - MARGIN_NS < after_one < 5 * MS - MS // 5 - MARGIN_NS
    for _ in range(100):
        times.observe_host(DECODE, MS // 5)
    assert abs(times.due_ns(DECODE, 0) - (5 * MS - MS // 5 - MARGIN_NS)) < 10


def test_what_the_host_needs_behind_a_step_that_seats_requests_is_learned_by_itself() -> None:
    times = LaunchTime()
    seating = StepPlan.empty(
        1, tokens=np.zeros(8, np.int32), rows=np.arange(8, dtype=np.int32), bind_rows=np.arange(8, dtype=np.int32)
    )
    times.observe_step(DECODE, 5 * MS)
    times.observe_host(seating, 2 * MS)
    times.observe_host(DECODE, MS)
    assert times.due_ns(DECODE, 0) == 4 * MS - MARGIN_NS
    assert times.due_ns(seating, 0) == 3 * MS - MARGIN_NS


def test_sizes_are_forgotten_before_they_are_too_many() -> None:
    times = LaunchTime()
    for tokens in range(SIZES_MAX + 1):
        times.observe_step(plan_of(tokens, 1), MS)
    assert len(times._durations_ns) == 1
