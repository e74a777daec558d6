"""Host time of steps and turns, with bounds so wide that only a change of order breaks them.

The targets themselves are measured by `sessile bench step`, `history` and `audit` on a quiet machine.
"""

import numpy as np

from sessile.bench.audit import COVERAGE_S, LEVEL_1_SHARE, LEVEL_2_MS, STEP_MS, AuditBenchOptions, measured_audit
from sessile.bench.history import LENGTHS_TOKENS, measured_turns
from sessile.bench.step import TARGETS, measured_steps

NOISE = 5
"""How much slower a busy machine may be than a quiet one."""


def test_a_step_of_256_rows_takes_a_fraction_of_a_millisecond_on_the_host() -> None:
    target_ms = TARGETS[256].p50_ms
    assert target_ms is not None
    times = measured_steps(rows=256, steps=200)
    assert np.median([t.step_ns for t in times]) / 1e6 <= NOISE * target_ms


def test_a_turn_on_a_long_history_costs_what_one_on_a_short_history_costs() -> None:
    turn_ms = measured_turns(turns=40)
    assert turn_ms[LENGTHS_TOKENS[-1]] <= 2 * turn_ms[LENGTHS_TOKENS[0]]


def test_h07_the_audit_costs_little_on_the_books_of_a_large_server() -> None:
    times = measured_audit(AuditBenchOptions(checks=20))
    assert (times.requests, times.sessions) == (256, 1000)
    assert times.full_ns.min() / 1e6 <= NOISE * LEVEL_2_MS
    assert np.median(times.look_ns) / 1e6 <= NOISE * LEVEL_1_SHARE * STEP_MS
    assert times.round_looks * STEP_MS / 1e3 <= COVERAGE_S
