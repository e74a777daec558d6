"""A device that computes nothing, and a driver that times what the host does around it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sessile.contract.messages import Batch
from sessile.contract.plan import SAMPLE, Ints, StepPlan, StepResult, decode_plan, encode_plan
from sessile.core.machine import Machine

VOCAB_SIZE = 32_000
EOS_ID = 2
FIRST_PLAIN_ID = 16


def null_result(plan: StepPlan) -> StepResult:
    """A result in which every sampling row emits one token: any that its mask allows, or else one that is not special.

    Drafts are not verified.
    """
    emitted = (plan.flags & SAMPLE).astype(np.int32)
    tokens = FIRST_PLAIN_ID + (plan.rows * 31 + plan.output_indices * 17) % (VOCAB_SIZE - FIRST_PLAIN_ID)
    if len(plan.mask_queries):
        _follow_masks(plan, tokens)
    return StepResult(
        step=plan.step,
        rows=plan.rows,
        query_counts=plan.query_counts,
        emitted=emitted,
        tokens=tokens[emitted > 0].astype(np.int32),
        faulty=np.zeros(len(plan.rows), bool),
    )


def _follow_masks(plan: StepPlan, tokens: Ints) -> None:
    """Put tokens that the masks allow where they do not; tokens: one for each row."""
    rows = np.searchsorted(np.cumsum(plan.query_counts), plan.mask_queries, "right")
    masks = plan.mask_words.reshape(len(rows), -1).view(np.uint8)
    for row, mask in zip(rows.tolist(), masks, strict=True):
        allowed = np.unpackbits(mask, bitorder="little").nonzero()[0]
        tokens[row] = allowed[int(tokens[row]) % len(allowed)]


@dataclass
class HostTimes:
    """Nanoseconds of host work in one step, by part."""

    rows: int = 0
    """Rows that the step ran."""
    tokens: int = 0
    """Tokens that it computed."""
    plan_ns: int = 0
    """Planning and completing."""
    code_ns: int = 0
    """Encoding and decoding the plan."""
    settle_ns: int = 0
    effects_ns: int = 0
    """Gathering the message that goes to the server; not part of a step's target."""
    look_ns: int = 0
    """The rolling audit, which follows when that message is on its way; not part of it either."""

    @property
    def step_ns(self) -> int:
        """What the target for a step is about."""
        return self.plan_ns + self.code_ns + self.settle_ns


@dataclass
class OverlappedDriver:
    """Turns a machine as the engine does: plan and launch step k+1, then settle step k."""

    machine: Machine
    answer: Callable[[StepPlan], StepResult] = null_result
    """The device."""
    in_flight: StepResult | None = None
    buffer: Ints = field(default_factory=lambda: np.empty(0, np.int32))

    def turn(self) -> tuple[HostTimes, Batch | None]:
        """One turn of the loop; how long its parts took and the effects it had."""
        times = HostTimes()
        started_ns = time.perf_counter_ns()
        planned = self.machine.plan()
        if planned and planned.late:
            self._settle(times)
        plan = self.machine.complete(planned) if planned else None
        planned_ns = time.perf_counter_ns()
        times.plan_ns = planned_ns - started_ns - times.settle_ns
        if plan:
            self.buffer = encode_plan(plan)
            plan = decode_plan(self.buffer)
            times.code_ns = time.perf_counter_ns() - planned_ns
            times.rows, times.tokens = len(plan.rows), len(plan.tokens)
        result = self.answer(plan) if plan else None
        self._settle(times)
        self.in_flight = result
        taking_ns = time.perf_counter_ns()
        effects = self.machine.take_effects()
        looking_ns = time.perf_counter_ns()
        times.effects_ns = looking_ns - taking_ns
        self.machine.look()
        times.look_ns = time.perf_counter_ns() - looking_ns
        return times, effects

    def _settle(self, times: HostTimes) -> None:
        if self.in_flight:
            settling_ns = time.perf_counter_ns()
            self.machine.settle(self.in_flight)
            times.settle_ns = time.perf_counter_ns() - settling_ns
            self.in_flight = None
