"""What a trace of a GPU's steps says of them, with moments of our own in the place of a device's events."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sessile.bench.gpu_trace import TracedDevice, TracedStep, addition_us


@dataclass
class Moment:
    """A moment of the device, in ms."""

    at_ms: float

    def elapsed_time(self, later: "Moment") -> float:
        return later.at_ms - self.at_ms


def step(kind: str, tokens: int, begin_ms: float, end_ms: float, host_ms: float) -> TracedStep:
    return TracedStep(kind, tokens, 8, cast(Any, Moment(begin_ms)), cast(Any, Moment(end_ms)), host_ms)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> TracedDevice:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return TracedDevice(cast(Any, SimpleNamespace(facts=None)))


def test_a_report_tells_each_kinds_time_its_waits_and_the_longest_of_them(device: TracedDevice) -> None:
    device.steps = [
        step("mixed, 64 × 8", 64, 0.0, 10.0, 3.0),
        step("decode, 8 × 8", 8, 17.0, 19.0, 0.5),  # The host was late.
        step("decode, 8 × 8", 8, 19.25, 21.0, 0.25),
        step("decode, 8 × 8", 8, 21.0, 23.0, 0.125),
    ]
    heading, mixed, decode, total = device.report()
    assert heading.split()[-6:] == ["before,", "sum", "longest", "host,", "median", "mean"]
    assert mixed.split()[-8:] == ["64.0", "8.0", "10.000", "10", "0.0", "0.00", "3.000", "3.000"]
    assert decode.split()[-9:] == ["3", "8.0", "8.0", "1.917", "6", "7.2", "7.00", "0.250", "0.292"]
    assert len(heading) == len(mixed) == len(decode)
    assert total.startswith("4 steps in 23 ms; idle between them 31.52%; the host adds 256 numbers in ")
    assert device.report() == ["no steps"]


def test_the_pace_of_a_machine_is_a_time() -> None:
    assert 0.01 < addition_us(rounds=3, additions=100) < 1000
