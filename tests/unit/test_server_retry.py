"""What a client that met a limit is told to wait."""

import pytest

from sessile.server.retry import WAIT_S_MAX, RetryAdvice


class Time:
    """Stands for the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("sessile.server.retry.time.monotonic", lambda: self.now_s)


def advised(monkeypatch: pytest.MonkeyPatch, gap_s: float, in_flight: int) -> int:
    """The advice after many ends, so far apart."""
    clock = Time(monkeypatch)
    advice = RetryAdvice()
    for _ in range(100):
        clock.now_s += gap_s
        advice.note_end()
    return advice.seconds(in_flight)


def test_half_of_the_line_has_gone_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advised(monkeypatch, 0.5, 40) == 10


@pytest.mark.parametrize(("gap_s", "in_flight", "wait_s"), [(0.001, 10, 1), (10.0, 4000, WAIT_S_MAX), (1.0, 0, 1)])
def test_the_advice_is_a_whole_number_within_bounds(
    monkeypatch: pytest.MonkeyPatch, gap_s: float, in_flight: int, wait_s: int
) -> None:
    assert advised(monkeypatch, gap_s, in_flight) == wait_s


def test_before_anything_has_ended_a_second_will_do() -> None:
    assert RetryAdvice().seconds(1000) == 1


def test_a_night_without_requests_is_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    advice = RetryAdvice()
    clock.now_s += 30_000
    advice.note_start(0)
    clock.now_s += 1
    advice.note_end()
    assert advice.seconds(10) == 1
