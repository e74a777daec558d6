"""Where the time between a GPU's steps goes: each step's time on the device, the gap before it, and the host's work."""

import itertools
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from sessile.contract.plan import StepPlan, StepResult
from sessile.device.buckets import bucket_of
from sessile.device.gpu_device import GpuDevice
from sessile.device.pending import GpuTicket


@dataclass
class TracedStep:
    """One launched step: how and at which size it ran, and when the device began and ended it."""

    kind: str
    tokens: int
    rows: int
    begin: torch.cuda.Event
    end: torch.cuda.Event
    host_ms: float = 0.0
    """What the host did between the result before and asking for this one: settle, plan and launch a step."""


class TracedTicket:
    """A ticket that notes how long the host worked before it asked."""

    def __init__(self, ticket: GpuTicket, step: TracedStep, device: "TracedDevice") -> None:
        self._ticket, self._step, self._device = ticket, step, device

    def is_done(self) -> bool:
        """Whether the step is done."""
        return self._ticket.is_done()

    def result(self) -> StepResult:
        """Wait for the step and return its result, or raise what the device raised."""
        self._step.host_ms = (time.perf_counter_ns() - self._device.answered_ns) / 1e6
        result: StepResult = self._ticket.result()
        self._device.answered_ns = time.perf_counter_ns()
        return result


class TracedDevice:
    """A GPU device that notes when the device begins and ends each step. Owns what the device owns."""

    def __init__(self, device: GpuDevice) -> None:
        self.facts = device.facts
        self.steps: list[TracedStep] = []
        self.answered_ns = time.perf_counter_ns()
        self._device = device

    def launch(self, plan: StepPlan) -> TracedTicket:
        """Queue a step between two events."""
        asked_ns = time.perf_counter_ns()
        graphs = self._device.graphs_captured
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launching_ns = time.perf_counter_ns()
        ticket = self._device.launch(plan)
        launched_ns = time.perf_counter_ns()
        end.record()
        kind = "captures a graph" if self._device.graphs_captured > graphs else kind_of(plan)
        step = TracedStep(kind, plan.tokens.size, plan.rows.size, begin, end)
        self.steps.append(step)
        # Taking notes is not the host's work.
        self.answered_ns += time.perf_counter_ns() - launched_ns + launching_ns - asked_ns
        return TracedTicket(ticket, step, self)

    def prepare(self) -> bool:
        """What the device does while nothing is in flight."""
        return self._device.prepare()

    def close(self) -> None:
        """Close the device."""
        self._device.close()

    def report(self) -> list[str]:
        """Lines of a table: steps by kind, then how long the device was idle between steps. Clears the notes."""
        torch.cuda.synchronize()
        steps, self.steps = self.steps, []
        if not steps:
            return ["no steps"]
        device_ms = np.array([step.begin.elapsed_time(step.end) for step in steps])
        gaps_ms = np.array([0.0, *(a.end.elapsed_time(b.begin) for a, b in itertools.pairwise(steps))])
        kinds: dict[str, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            kinds[step.kind].append(index)
        kind = "kind, tokens × rows"
        lines = [
            f"{kind:28s} steps  tokens   rows  ms on device    sum  idle before, sum  longest  host, median     mean"
        ]
        for kind in sorted(kinds, key=lambda kind: -device_ms[kinds[kind]].sum()):
            at = kinds[kind]
            tokens = np.mean([steps[index].tokens for index in at])
            rows = np.mean([steps[index].rows for index in at])
            host = [steps[index].host_ms for index in at]
            lines.append(
                f"{kind:28s} {len(at):5d} {tokens:7.1f} {rows:6.1f} {device_ms[at].mean():13.3f} "
                f"{device_ms[at].sum():6.0f} {gaps_ms[at].sum():17.1f} {gaps_ms[at].max():8.2f} "
                f"{np.median(host):13.3f} {np.mean(host):8.3f}"
            )
        wall_ms = steps[0].begin.elapsed_time(steps[-1].end)
        lines.append(
            f"{len(steps)} steps in {wall_ms:.0f} ms; idle between them {gaps_ms.sum() / wall_ms:.2%}; "
            f"the host adds 256 numbers in {addition_us():.2f} µs"
        )
        return lines


def addition_us(rounds: int = 20, additions: int = 1000) -> float:
    """How long numpy takes to add 1 to each of 256 numbers, in µs: the pace that a machine has right now.

    On shared machines it varies by a factor of two, and with it what a host takes for a step.
    """
    numbers, took_ns = np.zeros(256, np.int64), []
    for _ in range(rounds):
        begun_ns = time.perf_counter_ns()
        for _ in range(additions):
            np.add(numbers, 1, out=numbers)
        took_ns.append(time.perf_counter_ns() - begun_ns)
    return float(np.median(took_ns)) / additions / 1e3


def kind_of(plan: StepPlan) -> str:
    """What a step is and the size that it runs at."""
    if not plan.rows.size:
        return "changes of state alone"
    bucket = bucket_of(plan, 1)
    kind = "decode" if plan.tokens.size == plan.rows.size else "mixed"
    return f"{kind}, {bucket.tokens} × {bucket.rows}" if bucket.is_captured else f"{kind}, no graph"
