"""The estimate of the future: the peak against a simulation, and what the forecast learns from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.core.admission import Forecast, peak_pages

rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)


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


def learned(output_tokens: int, allowed_tokens: int, cap_tokens: int = 4096) -> Forecast:
    """A forecast that has seen nothing but such requests."""
    forecast = Forecast(cap_tokens)
    for _ in range(64):
        forecast.finished(output_tokens, allowed_tokens)
    return forecast


def expected(forecast: Forecast, output_tokens: int, allowed_tokens: int, requests: int = 64) -> list[int]:
    """What is expected of so many requests in the same position, in ascending order."""
    arrivals = np.arange(requests)
    outputs, allowances = np.full(requests, output_tokens), np.full(requests, allowed_tokens)
    return sorted(forecast.remaining_tokens(outputs, allowances, arrivals).tolist())


@pytest.mark.parametrize(("output_tokens", "remaining"), [(0, 40), (25, 15)])
def test_h67_outputs_are_expected_to_be_as_long_as_they_were(output_tokens: int, remaining: int) -> None:
    found = expected(learned(40, 4000), output_tokens, 4000)
    assert remaining <= found[0] <= found[-1] <= remaining + 4  # shares are in 1/1024 of the allowance


def test_an_exact_limit_that_was_always_used_is_always_expected_to_be() -> None:
    forecast = learned(100, 100)
    assert [expected(forecast, output, 100)[0] for output in (0, 30, 99)] == [100, 70, 1]


def test_h67_before_anything_has_ended_an_unset_limit_means_a_typical_output_and_a_small_one_is_used() -> None:
    unset, small = expected(Forecast(4096), 0, 4096), expected(Forecast(4096), 0, 8)
    assert 60 < sum(unset) / len(unset) < 250 and unset[-1] > 4 * unset[len(unset) // 2]
    assert sum(small) / len(small) > 7


def test_tight_limits_say_nothing_about_unset_ones() -> None:
    forecast = learned(64, 64)
    assert expected(forecast, 0, 4096) == expected(Forecast(4096), 0, 4096)


def test_requests_side_by_side_are_expected_to_end_as_differently_as_those_before_them() -> None:
    forecast = Forecast(4096)
    for _ in range(16):
        for output in (40, 80, 400, 800):
            forecast.finished(output, 4096)
    found = expected(forecast, 0, 4096)
    assert [found[index] for index in (8, 24, 40, 56)] == [40, 80, 400, 800]
    late = expected(forecast, 100, 4096)  # Two of the four got that far.
    assert [late[index] for index in (16, 48)] == [300, 700]


def test_who_got_further_than_anybody_before_is_expected_to_go_on_as_long_as_the_longest() -> None:
    assert expected(learned(40, 4096), 1000, 4096)[0] == 40


def test_the_same_request_is_expected_to_end_at_the_same_place_while_nothing_is_learned() -> None:
    forecast = Forecast(4096)
    ends = [forecast.remaining_of(0, 4096, arrival) for arrival in range(20)]
    moved = [forecast.remaining_of(0, 4096, arrival) for arrival in range(20)]
    assert ends == moved and len(set(ends)) > 8


def test_h67_a_huge_allowance_counts_up_to_the_cap() -> None:
    assert expected(Forecast(100), 0, 10**9) == expected(Forecast(100), 0, 100)


def test_a_preemption_widens_the_margin_at_once_and_quiet_steps_narrow_it_slowly() -> None:
    forecast = learned(400, 4096)
    before = forecast.remaining_of(0, 4096, 1)
    forecast.preempted()
    jumped = forecast.remaining_of(0, 4096, 1)
    for _ in range(100):
        forecast.stepped()
    assert before < forecast.remaining_of(0, 4096, 1) < jumped
    for _ in range(20_000):
        forecast.stepped()
    assert forecast.remaining_of(0, 4096, 1) == before


def test_the_margin_narrows_only_while_nothing_is_preempted() -> None:
    forecast = learned(4000, 4096)
    for _ in range(7):
        forecast.stepped()
    forecast.preempted()
    jumped = forecast.remaining_of(0, 10**6, 1)
    for _ in range(7):
        forecast.stepped()
    assert forecast.remaining_of(0, 10**6, 1) == jumped


events = st.lists(st.tuples(st.sampled_from(["finished", "preempted", "stepped"]), st.integers(0, 9000)), max_size=60)


@given(events, st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 10**6))
def test_at_least_one_token_is_expected_and_never_more_than_is_allowed(
    events: list[tuple[str, int]], output_tokens: int, remaining: int, arrival: int
) -> None:
    forecast = Forecast(4096)
    for event, output in events:
        forecast.finished(output, 5000) if event == "finished" else getattr(forecast, event)()
    allowed = output_tokens + remaining
    found = forecast.remaining_of(output_tokens, allowed, arrival)
    assert 1 <= found <= max(1, remaining)


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 10**6)), max_size=12))
def test_one_request_and_many_are_estimated_alike(requests: list[tuple[int, int, int]]) -> None:
    forecast = Forecast(4096)
    table = np.array(requests, np.int64).reshape(-1, 3)
    together = forecast.remaining_tokens(*table.T)
    assert together.tolist() == [forecast.remaining_of(*request) for request in requests]
