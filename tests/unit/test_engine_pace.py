"""Pace: steps stay under the limit on a device whose speed is not known in advance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.engine.build import CPU_CHUNK_TOKENS_MIN, GPU_CHUNK_TOKENS_MIN, GPU_STEP_LIMIT_MS
from sessile.engine.pace import Pace


def paced_steps(pace: Pace, ms_per_token: float, steps: int, fixed_ms: float = 0.0) -> list[float]:
    """Times of steps that use the whole budget each."""
    times = []
    for _ in range(steps):
        times.append(fixed_ms + pace.chunk_tokens * ms_per_token)
        pace.observe(pace.chunk_tokens, times[-1])
    return times


def test_a_fast_device_reaches_the_configured_budget_within_a_few_steps() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    paced_steps(pace, ms_per_token=0.1, steps=4)
    assert pace.chunk_tokens == 512


@given(ms_per_token=st.floats(0.05, 10), fixed_ms=st.floats(0, 50))
def test_after_the_first_steps_no_step_is_over_the_limit(ms_per_token: float, fixed_ms: float) -> None:
    times = paced_steps(Pace(250, 8192, CPU_CHUNK_TOKENS_MIN), ms_per_token, steps=20, fixed_ms=fixed_ms)
    assert max(times[6:]) <= 250


def test_a_step_that_was_short_for_lack_of_work_does_not_raise_the_budget() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    assert pace.observe(step_tokens=1, step_ms=5) == 64


def test_the_budget_never_falls_below_a_useful_chunk() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    assert pace.observe(step_tokens=64, step_ms=60_000) == CPU_CHUNK_TOKENS_MIN


def test_a_hiccup_of_a_gpu_leaves_it_chunks_that_fill_it() -> None:
    pace = Pace(GPU_STEP_LIMIT_MS, 8192, GPU_CHUNK_TOKENS_MIN)
    assert pace.observe(step_tokens=64, step_ms=900) == GPU_CHUNK_TOKENS_MIN


@pytest.mark.parametrize("configured", [1, 7, 40])
def test_a_small_configured_budget_is_never_exceeded(configured: int) -> None:
    pace = Pace(250, configured, CPU_CHUNK_TOKENS_MIN)
    paced_steps(pace, ms_per_token=0.01, steps=5)
    assert pace.chunk_tokens == configured


def test_the_budget_follows_when_attention_makes_chunks_dearer() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    paced_steps(pace, ms_per_token=0.1, steps=5)
    times = paced_steps(pace, ms_per_token=1.0, steps=3)
    assert times[0] > 250 and max(times[1:]) <= 250


def test_where_no_budget_keeps_to_the_limit_half_of_a_step_still_goes_to_tokens() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    paced_steps(pace, ms_per_token=2.0, steps=30, fixed_ms=400)
    assert 100 <= pace.chunk_tokens <= 300


def test_single_tokens_between_chunks_show_what_is_fixed_without_lowering_the_budget() -> None:
    pace = Pace(250, 512, CPU_CHUNK_TOKENS_MIN)
    for _ in range(20):
        pace.observe(1, 31)
        paced_steps(pace, ms_per_token=1.0, steps=1, fixed_ms=30)
    assert 150 <= pace.chunk_tokens <= 220


def test_an_empty_step_teaches_nothing() -> None:
    assert Pace(250, 512, CPU_CHUNK_TOKENS_MIN).observe(step_tokens=0, step_ms=1000) == 64
