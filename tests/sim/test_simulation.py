"""The shipped core under hostile schedules: a sample of what `python -m sessile.sim` runs in full."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sessile.core.marks import Mark
from sessile.sim.records import Report
from sessile.sim.run import EXPECTED, missing_totals
from sessile.sim.shrink import shrink
from sessile.sim.simulation import Simulation
from sessile.sim.world import FAULTS, World, make_world

SEEDS = range(1000, 1040)
STEPS = 400
RARE = frozenset({
    "turns found ahead", "refused 410", "done error", f"mark: {Mark.WAITED_FOR_DRAFTS.value}",
    f"mark: {Mark.SPARE_PAGES_GIVEN_UP.value}", f"mark: {Mark.RESERVE_OWED.value}", "replaced parents",
    f"mark: {Mark.REPLACED_RUNNING.value}",
})  # fmt: skip
"""Totals that a sample of this size may miss."""


@pytest.fixture(scope="module")
def reports() -> Sequence[Report]:
    return [Simulation(make_world(seed)).run(STEPS) for seed in SEEDS]


def test_no_seed_of_the_sample_finds_anything(reports: Sequence[Report]) -> None:
    failures = [report.failure for report in reports if report.failure]
    assert [f"seed {found.seed} step {found.step} ({found.checker}): {found.message}" for found in failures] == []


@pytest.mark.parametrize(("seed", "steps"), [(28, 1900), (57, 200), (548, 1700)])
def test_seeds_that_found_something_once_find_nothing_any_more(seed: int, steps: int) -> None:
    """A branch whose parent was dropped; a turn that ended before its KV was reclaimed; one that ended and was run."""
    assert Simulation(make_world(seed)).run(steps).failure is None


def plain_world(seed: int) -> World:
    """A world of requests that ask for nothing unusual, with long prompts and answers and room for all of them.

    What many steps in a row have in common is looked at once: only here they have, while prompts are read in parts.
    """
    world = make_world(seed, frozenset({"cancel", "fork"}))
    limits = replace(
        world.limits, pages_total=260, page_size=4, rows_max=6, context_tokens=200, chunk_tokens=64, mixed_chunk=True,
        mixed_chunk_tokens=(7, 9, 12)[seed % 3], admissions_max=64, tenants=(),
    )  # fmt: skip
    temper = replace(
        world.temper, live_max=5, submit_rate=0.2, prompt_tokens_max=60, cancel_rate=0.01, pace_rate=0.0,
        nonsense_rate=0.0, logprob_rate=0.0, sampling_variety=0.0, grammar_rate=0.0, group_rate=0.0,
    )  # fmt: skip
    return replace(world, facts=replace(world.facts, context_tokens=200), limits=limits, temper=temper, overlap=True)


def test_prompts_are_read_in_parts_beside_requests_that_go_on() -> None:
    reports = [Simulation(plain_world(seed)).run(300) for seed in range(30)]
    failures = [report.failure for report in reports if report.failure]
    assert [f"seed {found.seed} step {found.step} ({found.checker}): {found.message}" for found in failures] == []
    assert sum(report.steps for report in reports) > 30 * 300


def test_every_seed_runs_its_steps_or_all_that_its_clients_ask_for(reports: Sequence[Report]) -> None:
    assert all(report.steps > 0 for report in reports)
    assert sum(report.steps >= STEPS for report in reports) > len(reports) * 0.9


def test_the_sample_reaches_what_the_workload_is_for(reports: Sequence[Report]) -> None:
    totals: Counter[str] = Counter()
    for report in reports:
        totals.update(report.totals)
    assert [name for name in missing_totals(totals, frozenset(FAULTS)) if name not in RARE] == []


def test_a_total_that_stays_at_zero_is_named() -> None:
    assert missing_totals(Counter({"steps": 1}), frozenset()) == [name for name in EXPECTED[""] if name != "steps"]


def test_the_same_seed_gives_the_same_trace() -> None:
    traces = {Simulation(make_world(7)).run(150).trace for _ in range(2)}
    assert len(traces) == 1


def test_other_seeds_give_other_traces(reports: Sequence[Report]) -> None:
    assert len({report.trace for report in reports}) == len(reports)


def test_the_trace_does_not_depend_on_the_order_of_hashes() -> None:
    traces = set()
    for hash_seed in ("0", "1"):
        command = [sys.executable, "-m", "sessile.sim", "--seed", "11", "--steps", "100"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        traces.add(finished.stdout.splitlines()[0])
    assert len(traces) == 1 and "trace" in traces.pop()


def test_a_recorded_script_replays_to_the_same_trace() -> None:
    recorded = Simulation(make_world(7)).run(150)
    replayed = Simulation(make_world(7), recorded.script).run(150)
    assert replayed.trace == recorded.trace


def test_a_world_without_faults_has_none() -> None:
    temper = make_world(3, frozenset()).temper
    assert (temper.cancel_rate, temper.close_rate, temper.faulty_rate, temper.late_rate) == (0, 0, 0, 0)


def test_a_run_without_failure_cannot_be_shrunk() -> None:
    report = Simulation(make_world(3)).run(20)
    with pytest.raises(AssertionError, match="nothing to shrink"):
        shrink(make_world(3), 20, report)
