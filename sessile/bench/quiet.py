"""Host time of steps of rows that go on, with a drafter that finds nothing to say and without one.

The texts are random, so that nothing is drafted: what speculation costs where it brings nothing. Part of
`sessile bench step`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, HostTimes, OverlappedDriver, null_result
from sessile.contract.messages import Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan, StepResult
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf
from sessile.engine.garbage import IdleCollector

PROMPT_TOKENS, ANSWER_TOKENS = (40, 120), (64, 256)
"""Of different lengths, so that rows lack pages in different steps, and end one by one."""
DRAFTS_MAX = 7
STEP_NS = 10**7
"""Virtual time between steps."""
TIMES = StepTimes((1, 16, 64), (1_600_000, 2_000_000, 2_500_000), 350_000, 20_000)
"""About those of a GPU with a small model."""


@dataclass(frozen=True)
class QuietTimes:
    """Median over rounds of the mean host time of a step, µs: without a drafter, with one."""

    plain_us: float
    drafting_us: float


def measured_quiet(rows: int, rounds: int) -> QuietTimes:
    """Rounds of this many requests side by side, in turn without and with a drafter. Raises AssertionError if anything
    is drafted."""
    drafter = LookupDrafter(Shelf(), TIMES)
    drafter.prepare()
    machines = [_machine(rows, None), _machine(rows, drafter)]
    keys = itertools.count(1)
    means: list[list[float]] = [[], []]
    collector = IdleCollector()
    collector.take_over()
    try:
        for number in range(1 + rounds):  # The first is not counted.
            for machine, into in zip(machines, means, strict=True):
                random = np.random.default_rng(number)  # The same requests for both.
                for _ in range(rows):
                    machine.receive(_request(next(keys), random))
                steps = [times.step_ns / 1e3 for times in _run(machine, random)]
                if number:
                    into.append(float(np.mean(steps)))
    finally:
        collector.release()
        drafter.close()
    return QuietTimes(*(float(np.median(each)) for each in means))


def _request(key: int, random: np.random.Generator) -> Submit:
    prompt = random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, random.integers(*PROMPT_TOKENS), np.int32)
    sampling = Sampling(seed=key, max_new_tokens=int(random.integers(*ANSWER_TOKENS)), ignore_eos=True)
    return Submit(key=key, tokens=pack_tokens(prompt), sampling=sampling)


def _machine(rows: int, drafter: LookupDrafter | None) -> Machine:
    limits = Limits(
        pages_total=rows * 64, page_size=16, rows_max=rows, context_tokens=1024, chunk_tokens=8192,
        mixed_chunk_tokens=8192, audit_level=1, drafts_max=DRAFTS_MAX if drafter else 0,
    )  # fmt: skip
    return Machine(limits, ModelFacts(vocab_size=VOCAB_SIZE, context_tokens=1024, eos_ids=(EOS_ID,)), drafter=drafter)


def _run(machine: Machine, random: np.random.Generator) -> Iterator[HostTimes]:
    """Turn until nothing is left to do."""

    def said(plan: StepPlan) -> StepResult:
        assert not plan.draft_counts.any(), "something was drafted of random tokens"
        result = null_result(plan)
        return replace(result, tokens=random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, len(result.tokens), np.int32))

    driver = OverlappedDriver(machine, said)
    for step in itertools.count():
        machine.tick(step * STEP_NS)
        times, _ = driver.turn()
        if not times.rows and not machine.has_work:
            return
        yield times
