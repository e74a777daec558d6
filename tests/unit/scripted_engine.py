"""A machine and a device that do as told and write down who was called when, for tests of the engine around them."""

from dataclasses import dataclass, field

import numpy as np

from sessile.contract.messages import Batch, CancelAll, Done, GetStats, Reply
from sessile.contract.plan import StepPlan, StepResult
from sessile.core.watch import Report
from tests.unit.stats import stats_of_nothing


@dataclass
class ManualClock:
    """Time that moves when told to."""

    time_ns: int = 1

    def now_ns(self) -> int:
        return self.time_ns


@dataclass
class ScriptedPlan:
    step: int
    late: bool = False


@dataclass
class ScriptedMachine:
    """Plans a given number of steps; writes every call into the log that it shares with the device."""

    log: list[str]
    steps_left: int = 0
    late: bool = False
    empties: frozenset[int] = frozenset()
    next_deadline_ns: int | None = None
    stuck: bool = False
    chunk_tokens: list[int] = field(default_factory=list)
    received: list[object] = field(default_factory=list)
    step: int = 0
    unsettled: int = 0
    effects: Batch | None = None
    reports: list[Report] = field(default_factory=list)
    looked: list[bool] = field(default_factory=list)
    """For each look of the rolling audit: whether all effects had been taken."""

    @property
    def has_work(self) -> bool:
        return self.stuck or self.steps_left > 0 or self.unsettled > 0

    def receive(self, message: object) -> None:
        self.received.append(message)
        if isinstance(message, GetStats):
            self.effects = Batch(step=self.step, replies=[Reply(op=message.op, value=stats_of_nothing())])
        if isinstance(message, CancelAll):
            self.steps_left, self.stuck = 0, False

    def take_reports(self) -> list[Report]:
        reports, self.reports = self.reports, []
        return reports

    def event_lines(self) -> list[str]:
        return [f"planned {self.step}"]

    def tick(self, now_ns: int) -> None:
        self.log.append(f"tick {now_ns}")

    def set_chunk_tokens(self, tokens: int) -> None:
        self.chunk_tokens.append(tokens)

    def plan(self) -> ScriptedPlan | None:
        assert self.unsettled <= 1
        if self.steps_left == 0:
            return None
        self.steps_left -= 1
        self.step += 1
        self.log.append(f"plan {self.step}")
        return ScriptedPlan(self.step, self.late)

    def complete(self, planned: ScriptedPlan) -> StepPlan | None:
        if planned.step in self.empties:
            return None
        self.log.append(f"complete {planned.step}")
        self.unsettled += 1
        return StepPlan.empty(planned.step, tokens=np.zeros(64, np.int32))

    def look(self) -> None:
        self.looked.append(self.effects is None)

    def settle(self, result: StepResult) -> None:
        self.log.append(f"settle {result.step}")
        self.unsettled -= 1
        self.effects = Batch(step=result.step, done=[Done(key=result.step, reason="stop")])

    def take_effects(self) -> Batch | None:
        effects, self.effects = self.effects, None
        return effects


@dataclass
class ScriptedDevice:
    """Writes launches and waits into the log; a step takes step_ns of the clock once it is waited for."""

    log: list[str]
    clock: ManualClock
    step_ns: int = 0
    shortages: int = 0
    """How often memory runs out in each step."""
    preparations: int = 0
    """How often there is something to make ready."""

    def launch(self, plan: StepPlan) -> "ScriptedTicket":
        self.log.append(f"launch {plan.step}")
        return ScriptedTicket(self, plan.step)

    def prepare(self) -> bool:
        if not self.preparations:
            return False
        self.preparations -= 1
        self.log.append("prepare")
        return True

    def close(self) -> None:
        self.log.append("close")


@dataclass
class ScriptedTicket:
    device: ScriptedDevice
    step: int
    done: bool = False

    def is_done(self) -> bool:
        return self.done

    def result(self) -> StepResult:
        self.device.clock.time_ns += self.device.step_ns
        none = np.empty(0, np.int32)
        return StepResult(self.step, none, none, none, none, np.empty(0, bool), shortages=self.device.shortages)
