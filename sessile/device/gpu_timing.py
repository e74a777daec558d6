"""How long a GPU's steps take by their size, measured at its start: what a drafter weighs its drafts against."""

import time
from dataclasses import dataclass

import numpy as np

from sessile.contract.plan import SAMPLE, StepPlan
from sessile.device.buckets import TOKEN_SIZES, round_up
from sessile.device.gpu_runner import GpuRunner
from sessile.units import ceil_div

DECODING_ROWS = (1, 8, 16, 32, 64, 128, 256)
VERIFYING_TOKENS = (16, 32, 64, 128, 256, 512)
"""Sizes that are timed; those between them lie on a line."""
STEPPED_TOKENS_MAX = 64
"""Up to here a step takes as long as the largest of its bucket, and one token more as long as the next bucket's."""
TIMED_KV_TOKENS = 512
"""KV of each row, if its context is as long: a step that verifies needs longer for it than one that decodes. On an H100
32 rows × 5 tokens of the 1.5B shape took 2.77 ms behind none, 3.28 behind 512 and 3.82 behind 2,048."""
STEPS_IN_A_ROW, ROUNDS = 8, 2
"""Of each size; the fastest row counts."""


@dataclass(frozen=True)
class GpuStepTimes:
    """As DeviceFacts has them. All empty where nobody drafts."""

    step_ms: tuple[tuple[int, float], ...] = ()
    decode_ms: tuple[tuple[int, float], ...] = ()
    late_ms: float = 0.0


def blank_plan(rows: int, tokens: int, drafts: int = 0, kv_tokens: int = 0) -> StepPlan:
    """So many rows that run so many tokens each, the last of them drafts. No row is bound: all use the scratch page."""
    none, ones = np.zeros(rows, np.int32), np.ones(rows, np.int32)
    return StepPlan.empty(
        0, rows=np.arange(rows, dtype=np.int32), starts=ones * kv_tokens, query_counts=ones * tokens,
        draft_counts=ones * drafts, flags=ones * SAMPLE, output_indices=none, logprob_tops=-ones,
        tokens=np.zeros(rows * tokens, np.int32),
    )  # fmt: skip


def verifying_plans(rows_max: int, drafts_max: int, kv_tokens: int = 0) -> dict[int, StepPlan]:
    """By the size they run at, the smallest first: steps in which rows verify half the drafts they may, or all of them
    where there would be too few rows."""
    plans = {}
    for tokens in VERIFYING_TOKENS:
        rows = min(max(tokens // (1 + ceil_div(drafts_max, 2)), 1), rows_max)
        width = min(tokens // rows, 1 + drafts_max)
        plans[round_up(rows * width, TOKEN_SIZES)] = blank_plan(rows, width, width - 1, kv_tokens)
    return plans


def time_gpu_steps(runner: GpuRunner, rows_max: int, drafts_max: int, context_tokens: int) -> GpuStepTimes:
    """Measure steps with and without drafts, back to back, and what one costs more that is launched when all is done.

    Kernels are compiled. Takes some tens of steps of each size.
    """
    kv_tokens = min(TIMED_KV_TOKENS, context_tokens - 1)
    decoding = [blank_plan(rows, 1, 0, kv_tokens) for rows in DECODING_ROWS if rows <= rows_max]
    decode_ms = tuple((plan.rows.size, step_ms(runner, plan)) for plan in decoding)
    verifying = verifying_plans(rows_max, drafts_max, kv_tokens)
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
