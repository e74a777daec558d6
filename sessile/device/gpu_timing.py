"""How long a GPU's steps take by their size, measured at its start: what a drafter weighs its drafts against."""

import time
from dataclasses import dataclass

import numpy as np

from sessile.contract.plan import SAMPLE, StepPlan
from sessile.device.buckets import TOKEN_SIZES, round_up
from sessile.device.gpu_runner import GpuRunner

DECODING_ROWS = (1, 8, 16, 32, 64, 128, 256)
VERIFYING_TOKENS = (16, 32, 64, 128, 256, 512)
"""Sizes that are timed; those between them lie on a line."""
STEPPED_TOKENS_MAX = 64
"""Up to here a step takes as long as the largest of its bucket, and one token more as long as the next bucket's."""
STEPS_IN_A_ROW, ROUNDS = 8, 2
"""Of each size; the fastest row counts."""


@dataclass(frozen=True)
class GpuStepTimes:
    """As DeviceFacts has them. All empty where nobody drafts."""

    step_ms: tuple[tuple[int, float], ...] = ()
    decode_ms: tuple[tuple[int, float], ...] = ()
    late_ms: float = 0.0


def blank_plan(rows: int, tokens: int, drafts: int = 0) -> StepPlan:
    """So many rows that run so many tokens each, the last of them drafts. No row is bound: all use the scratch page."""
    none, ones = np.zeros(rows, np.int32), np.ones(rows, np.int32)
    return StepPlan.empty(
        0, rows=np.arange(rows, dtype=np.int32), starts=none, query_counts=ones * tokens, draft_counts=ones * drafts,
        flags=ones * SAMPLE, output_indices=none, logprob_tops=-ones, tokens=np.zeros(rows * tokens, np.int32),
    )  # fmt: skip


def verifying_plans(rows_max: int, drafts_max: int) -> dict[int, StepPlan]:
    """By the size they run at, the smallest first: steps in which each row verifies as many drafts as it may."""
    plans = {}
    for tokens in VERIFYING_TOKENS:
        width = min(1 + drafts_max, tokens)
        rows = min(tokens // width, rows_max)
        plans[round_up(rows * width, TOKEN_SIZES)] = blank_plan(rows, width, width - 1)
    return plans


def time_gpu_steps(runner: GpuRunner, rows_max: int, drafts_max: int) -> GpuStepTimes:
    """Measure steps with and without drafts, back to back, and what one costs more that is launched when all is done.

    Kernels are compiled. Takes some tens of steps of each size.
    """
    decode_ms = tuple((rows, step_ms(runner, blank_plan(rows, 1))) for rows in DECODING_ROWS if rows <= rows_max)
    verifying = verifying_plans(rows_max, drafts_max)
    verify_ms = {tokens: step_ms(runner, plan) for tokens, plan in verifying.items()}
    table = [decode_ms[0]]
    for tokens, taken_ms in verify_ms.items():
        place = TOKEN_SIZES.index(tokens)
        if tokens <= STEPPED_TOKENS_MAX:
            table.append((TOKEN_SIZES[place - 1] + 1 if place else 2, taken_ms))
        table.append((tokens, taken_ms))
    least = min(verifying)
    late_ms = max(alone_ms(runner, verifying[least]) - verify_ms[least], 0.0)
    return GpuStepTimes(tuple(table), decode_ms, late_ms)


def step_ms(runner: GpuRunner, plan: StepPlan) -> float:
    """Of a step among others like it, each queued while the one before runs."""
    for _ in range(2):  # The second time a size is seen, its graph is captured.
        runner.start(plan).wait()
    fastest_s = float("inf")
    for _ in range(ROUNDS):
        begun_s = time.perf_counter()
        steps = [runner.start(plan) for _ in range(STEPS_IN_A_ROW)]
        steps[-1].wait()
        fastest_s = min(fastest_s, (time.perf_counter() - begun_s) / STEPS_IN_A_ROW)
    return fastest_s * 1e3


def alone_ms(runner: GpuRunner, plan: StepPlan) -> float:
    """Of a step that is queued when the device has nothing to do, from its launch to its result."""
    fastest_s = float("inf")
    for _ in range(STEPS_IN_A_ROW):
        begun_s = time.perf_counter()
        runner.start(plan).wait()
        fastest_s = min(fastest_s, time.perf_counter() - begun_s)
    return fastest_s * 1e3
