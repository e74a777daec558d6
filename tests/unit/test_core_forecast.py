"""The estimate of the future: the peak against a simulation, and what the forecast learns from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.core.admission import Forecast, peak_pages

rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)
UNIT = 1024


def simulated_peak(rows: list[tuple[int, int]]) -> int:
    """Let all rows grow by one page at a time; each leaves when it has grown by what it will."""
    moments = range(max((growth for _, growth in rows), default=0) + 1)
    return max(sum(held + moment for held, growth in rows if growth >= moment) for moment in moments)


def peak(rows: list[tuple[int, int]], capacity: int = 0) -> int:
    table = np.array(rows, np.int64).reshape(-1, 2)
    return peak_pages(table[:, 0], table[:, 1], capacity)


@given(rows)
def test_the_peak_is_that_of_a_simulated_future(rows: list[tuple[int, int]]) -> None:
    assert peak(rows, capacity=-1) == simulated_peak(rows)


@given(rows, st.integers(0, 400))
def test_whether_rows_fit_does_not_depend_on_the_short_cut(rows: list[tuple[int, int]], capacity: int) -> None:
    assert (peak(rows, capacity) <= capacity) == (simulated_peak(rows) <= capacity)


def test_rows_that_leave_in_turn_need_less_than_their_sum() -> None:
    assert peak([(10, 1), (1, 10)]) == 13  # after one page each; at the end the second one holds 11 alone


def learned(forecast: Forecast, output_tokens: int, allowed_tokens: int, times: int = 500) -> int:
    for _ in range(times):
        forecast.finished(output_tokens, allowed_tokens)
        for _ in range(16):
            forecast.stepped()
    return forecast.ratio


def test_h67_the_forecast_learns_that_outputs_are_shorter_than_allowed() -> None:
    assert learned(Forecast(4096), output_tokens=40, allowed_tokens=4000) < UNIT // 10


def test_the_forecast_learns_that_outputs_are_as_long_as_allowed() -> None:
    assert learned(Forecast(4096), output_tokens=100, allowed_tokens=100) > UNIT * 95 // 100


def test_h67_a_huge_allowance_counts_up_to_the_cap() -> None:
    forecast = Forecast(100)
    assert forecast.remaining_of(10**9) == forecast.remaining_of(100) <= 100


def test_a_preemption_widens_the_margin_at_once_and_quiet_steps_narrow_it_slowly() -> None:
    forecast = Forecast(4096)
    before = forecast.ratio
    forecast.preempted()
    jumped = forecast.ratio
    for _ in range(200):
        forecast.stepped()
    assert before < forecast.ratio < jumped
    for _ in range(20_000):
        forecast.stepped()
    assert forecast.ratio < before


def test_the_margin_narrows_only_while_nothing_is_preempted() -> None:
    forecast = Forecast(4096)
    for _ in range(15):
        forecast.stepped()
    forecast.preempted()
    jumped = forecast.ratio
    for _ in range(15):
        forecast.stepped()
    assert forecast.ratio == jumped


@given(st.lists(st.sampled_from(["finished", "preempted", "stepped"]), max_size=60), st.integers(0, 100_000))
def test_the_ratio_is_a_share_whatever_happens(events: list[str], output_tokens: int) -> None:
    forecast = Forecast(4096)
    for event in events:
        if event == "finished":
            forecast.finished(output_tokens, 50)
        else:
            getattr(forecast, event)()
        assert 1 <= forecast.ratio <= UNIT


@pytest.mark.parametrize("allowed", [0, 1, 7, 4095, 4096, 10**9])
def test_one_request_and_many_are_estimated_alike_and_never_as_done(allowed: int) -> None:
    forecast = Forecast(4096)
    assert forecast.remaining_tokens(np.array([allowed])).tolist() == [forecast.remaining_of(allowed)]
    assert forecast.remaining_of(allowed) >= 1
