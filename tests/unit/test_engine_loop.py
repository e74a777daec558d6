"""The step loop, driven with a scripted machine and device that write down who was called when."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from sessile.contract.messages import Cancel, CancelAll, GetStats, OpenSession, Sampling, Shutdown, Submit
from sessile.contract.plan import StepPlan
from sessile.core.watch import Report
from sessile.engine.build import CPU_CHUNK_TOKENS_MIN
from sessile.engine.inbox import LocalInbox
from sessile.engine.launch_time import LaunchTime
from sessile.engine.loop import IDLE_WAIT_NS_MAX, STUCK_WAIT_NS_MAX, EngineLoop
from sessile.engine.outbox import LocalOutbox
from sessile.engine.pace import Pace
from tests.unit.scripted_engine import ManualClock, ScriptedDevice, ScriptedMachine, ScriptedPlan, ScriptedTicket


class WatchedInbox(LocalInbox):
    """Notes how long the loop was willing to wait."""

    def __init__(self, messages: tuple[object, ...] = ()) -> None:
        super().__init__(messages)  # type: ignore[arg-type]
        self.waits_ns: list[int] = []

    def take(self, wait_ns: int) -> list[object]:  # type: ignore[override]
        self.waits_ns.append(wait_ns)
        return super().take(wait_ns)  # type: ignore[return-value]


@dataclass
class Rig:
    """A loop with everything around it scripted."""

    log: list[str]
    machine: ScriptedMachine
    device: ScriptedDevice
    clock: ManualClock
    inbox: WatchedInbox
    outbox: LocalOutbox
    loop: EngineLoop

    def calls(self) -> list[str]:
        return [line for line in self.log if not line.startswith("tick")]


def rig(
    *messages: object, overlap: bool = True, step_ns: int = 0, pace: Pace | None = None,
    launch_time: LaunchTime | None = None, **script: object,
) -> Rig:  # fmt: skip
    log: list[str] = []
    machine, clock = ScriptedMachine(log, **script), ManualClock()  # type: ignore[arg-type]
    device, inbox, outbox = ScriptedDevice(log, clock, step_ns), WatchedInbox(messages), LocalOutbox()
    loop = EngineLoop(
        machine, device, inbox, outbox, clock, overlap=overlap, pace=pace, launch_time=launch_time  # type: ignore[arg-type]
    )  # fmt: skip
    return Rig(log, machine, device, clock, inbox, outbox, loop)


def submit(key: int) -> Submit:
    return Submit(key=key, tokens=b"", sampling=Sampling(seed=0))


def test_the_next_step_is_launched_before_the_one_in_flight_is_settled() -> None:
    r = rig(steps_left=2)
    for _ in range(3):
        r.loop.turn()
    assert r.calls() == ["plan 1", "complete 1", "launch 1", "plan 2", "complete 2", "launch 2", "settle 1", "settle 2"]


def test_without_overlap_a_step_is_settled_before_the_next_is_planned() -> None:
    r = rig(steps_left=2, overlap=False)
    for _ in range(2):
        r.loop.turn()
    assert r.calls() == ["plan 1", "complete 1", "launch 1", "settle 1", "plan 2", "complete 2", "launch 2", "settle 2"]


def test_a_late_plan_is_completed_after_the_step_in_flight_is_settled() -> None:
    r = rig(steps_left=2, late=True)
    for _ in range(2):
        r.loop.turn()
    assert r.calls() == ["plan 1", "complete 1", "launch 1", "plan 2", "settle 1", "complete 2", "launch 2"]


@pytest.mark.parametrize(("masks", "told"), [(0, [(2, 5_000)]), (1, [])])
def test_h50_a_drafter_is_told_of_steps_that_are_late_for_its_sake_alone(
    masks: int, told: list[tuple[int, int]]
) -> None:
    """Where a grammar has masks filled, a step is late whether anybody drafts or not."""
    r, late = rig(steps_left=2, late=True), list[tuple[int, int]]()
    r.loop._drafter = SimpleNamespace(observe_late=lambda *seen: late.append(seen))  # type: ignore[assignment]

    def complete(planned: ScriptedPlan) -> StepPlan:
        r.clock.time_ns += 5_000
        r.machine.unsettled += 1
        rows, places = np.arange(2, dtype=np.int32), np.zeros(masks, np.int32)
        return StepPlan.empty(planned.step, tokens=np.zeros(2, np.int32), rows=rows, mask_queries=places)

    r.machine.complete = complete  # type: ignore[method-assign]
    r.loop.turn()
    assert late == []  # Nothing was in flight: it waited for nothing.
    r.loop.turn()
    assert late == told


def test_a_plan_that_lost_all_its_rows_is_not_launched() -> None:
    r = rig(steps_left=2, empties=frozenset({2}))
    for _ in range(3):
        r.loop.turn()
    assert "launch 2" not in r.log
    assert r.calls()[-1] == "settle 1"


def test_effects_of_a_step_go_out_in_the_turn_that_settled_it() -> None:
    r = rig(steps_left=1)
    r.loop.turn()
    assert r.outbox.take() == []
    r.loop.turn()
    assert [batch.done[0].key for batch in r.outbox.take()] == [1]


def test_h07_the_rolling_audit_looks_once_a_turn_when_the_effects_have_been_sent() -> None:
    r = rig(steps_left=2)
    for _ in range(5):
        r.loop.turn()
    assert r.machine.looked == [True, True, True]


def test_the_loop_does_not_wait_for_messages_while_anything_turns() -> None:
    r = rig(steps_left=1)
    for _ in range(4):
        r.loop.turn()
    # Idle at first; then a step was planned, then one was settled, and only then nothing happened.
    assert [wait > 0 for wait in r.inbox.waits_ns] == [True, False, False, True]


def test_h70_an_idle_loop_waits_until_the_next_timer_and_no_longer() -> None:
    r = rig(next_deadline_ns=5_000_001)
    r.loop.turn()
    assert r.inbox.waits_ns == [5_000_000]


def test_h70_a_timer_that_is_overdue_is_not_waited_for() -> None:
    r = rig(next_deadline_ns=0)
    r.loop.turn()
    assert r.inbox.waits_ns == [0]


def test_without_timers_an_idle_loop_still_wakes_to_see_signals() -> None:
    r = rig()
    r.loop.turn()
    assert r.inbox.waits_ns == [IDLE_WAIT_NS_MAX]


def test_work_that_cannot_be_planned_now_is_tried_again_soon() -> None:
    r = rig(stuck=True)
    r.loop.turn()
    assert r.inbox.waits_ns == [STUCK_WAIT_NS_MAX]


def test_h70_time_is_told_to_the_machine_after_the_wait() -> None:
    r = rig(Cancel(7))
    taken_at_ns = 99

    def take_late(wait_ns: int) -> list[object]:
        r.clock.time_ns = taken_at_ns
        return [Cancel(7)]

    r.inbox.take = take_late  # type: ignore[method-assign,assignment]
    r.loop.turn()
    assert r.log == [f"tick {taken_at_ns}"]


def test_stats_carry_the_wall_time_of_steps() -> None:
    r = rig(steps_left=2, step_ns=3_000_000)
    for _ in range(3):
        r.loop.turn()
    r.outbox.take()
    r.inbox.put(GetStats(op=5))
    r.loop.turn()
    (batch,) = r.outbox.take()
    stats = batch.replies[0].value
    assert stats.step_wall_s_total == pytest.approx(0.006)  # type: ignore[union-attr]


def test_stats_carry_how_often_the_device_ran_out_of_memory() -> None:
    r = rig(steps_left=3)
    r.device.shortages = 2
    for _ in range(4):
        r.loop.turn()
    r.outbox.take()
    r.inbox.put(GetStats(op=5))
    r.loop.turn()
    (batch,) = r.outbox.take()
    assert batch.replies[0].value.memory_shortages_total == 6  # type: ignore[union-attr]


def test_the_pace_lowers_the_budget_after_a_step_that_took_too_long() -> None:
    r = rig(steps_left=1, step_ns=1_000_000_000, pace=Pace(250, 512, CPU_CHUNK_TOKENS_MIN))
    for _ in range(2):
        r.loop.turn()
    assert r.machine.chunk_tokens == [64, 16]


def test_a_shutdown_finishes_what_runs_and_refuses_what_is_new() -> None:
    r = rig(Shutdown(drain_s=10), submit(9), OpenSession(op=4, session="s"), steps_left=3)
    r.loop.run()
    assert r.calls()[-1] == "settle 3"
    batches = r.outbox.take()
    refused = [(done.key, done.status) for batch in batches for done in batch.done if done.reason == "error"]
    assert refused == [(9, 503)]
    assert [(reply.op, reply.error.status) for b in batches for reply in b.replies if reply.error] == [(4, 503)]
    assert r.machine.received == []


def test_cancels_still_reach_the_machine_while_it_drains() -> None:
    r = rig(Shutdown(drain_s=10), Cancel(1), steps_left=1)
    r.loop.run()
    assert r.machine.received == [Cancel(1)]


def test_a_shutdown_without_drain_aborts_what_runs() -> None:
    r = rig(Shutdown(), steps_left=1_000)
    r.loop.run()
    assert [type(message) for message in r.machine.received] == [CancelAll]
    assert r.machine.steps_left == 0 and r.machine.unsettled == 0


def test_a_drain_that_takes_too_long_ends_in_an_abort() -> None:
    r = rig(Shutdown(drain_s=0.01), steps_left=1_000, step_ns=3_000_000)
    r.loop.run()
    assert 3 <= r.machine.step <= 6
    assert isinstance(r.machine.received[-1], CancelAll)


def test_an_idle_loop_has_the_device_make_ready_before_it_waits_and_takes_in_between_what_comes() -> None:
    r = rig()
    r.device.preparations = 3
    r.loop.turn()
    r.inbox.put(submit(1))
    for _ in range(3):
        r.loop.turn()
    assert r.calls().count("prepare") == 3
    assert r.inbox.waits_ns == [0, 0, 0, IDLE_WAIT_NS_MAX]
    assert [message.key for message in r.machine.received if isinstance(message, Submit)] == [1]


def test_nothing_is_made_ready_while_steps_run() -> None:
    r = rig(steps_left=3)
    r.device.preparations = 9
    r.loop.turn()  # Idle until here: one preparation.
    for _ in range(3):
        r.loop.turn()
    assert r.calls().count("prepare") == 1
    assert r.inbox.waits_ns == [0] * 4
    r.loop.turn()
    r.loop.turn()
    assert r.calls().count("prepare") >= 2


def test_a_failing_step_ends_the_loop_with_the_devices_own_error() -> None:
    r = rig(steps_left=5)

    def launch(plan: StepPlan) -> "ScriptedTicket":
        raise MemoryError("the pool is gone")

    r.device.launch = launch  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="the pool is gone"):
        r.loop.run()


def test_h07_a_contained_violation_is_one_line_in_the_log_with_the_events_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    r = rig(steps_left=2, reports=[Report(["pages: page 7 is held twice"], 3, ["planned 1", "settled 1"])])
    for _ in range(3):
        r.loop.turn()
    (line,) = [record for record in caplog.records if record.name == "sessile.engine"]
    assert "whoever it names was ended" in line.getMessage()
    fields = vars(line)
    assert (fields["found"], fields["quarantined_pages"]) == (["pages: page 7 is held twice"], 3)
    assert fields["events"] == ["planned 1", "settled 1"]


# -- just in time -------------------------------------------------------------------------------------------------

STEP_NS = 2_000_000
POLL_NS = 100_000


class PolledInbox(WatchedInbox):
    """A clock moves on each time that somebody looks; what is to come comes at its time."""

    def __init__(self, clock: ManualClock, log: list[str]) -> None:
        super().__init__()
        self.coming: list[tuple[int, object]] = []
        self._clock, self._log = clock, log

    def take(self, wait_ns: int) -> list[object]:  # type: ignore[override]
        self._clock.time_ns += POLL_NS
        here = [message for time_ns, message in self.coming if time_ns <= self._clock.time_ns]
        self.coming = [(time_ns, message) for time_ns, message in self.coming if time_ns > self._clock.time_ns]
        self._log.extend("take" for _ in here)
        return [*super().take(wait_ns), *here]


def rig_in_time(**script: object) -> tuple[Rig, PolledInbox]:
    """A loop that plans just in time; a step takes 2 ms, and the clock stands still but for looks and results."""
    r = rig(launch_time=LaunchTime(), step_ns=STEP_NS, **script)
    inbox = PolledInbox(r.clock, r.log)
    r.loop._inbox = inbox  # type: ignore[assignment]
    return r, inbox


def test_who_comes_while_a_step_runs_is_there_when_the_next_one_is_planned() -> None:
    r, inbox = rig_in_time(steps_left=6)
    for _ in range(3):
        r.loop.turn()
    begun_ns = r.clock.time_ns
    inbox.coming = [(begun_ns + STEP_NS // 2, submit(1)), (begun_ns + STEP_NS, submit(2))]
    del r.log[:]
    r.loop.turn()
    assert r.calls()[:3] == ["take", "plan 4", "complete 4"]  # The second came when it was time to plan.
    assert [message.key for message in r.machine.received] == [1]  # type: ignore[attr-defined]
    r.loop.turn()
    assert [message.key for message in r.machine.received] == [1, 2]  # type: ignore[attr-defined]


def test_a_step_that_ends_sooner_than_expected_ends_the_wait() -> None:
    r, inbox = rig_in_time(steps_left=6)
    for _ in range(3):
        r.loop.turn()
    looks, ticket = len(inbox.waits_ns), r.loop._in_flight.ticket  # type: ignore[union-attr]
    ticket.done = True  # type: ignore[attr-defined]
    r.loop.turn()
    assert len(inbox.waits_ns) - looks == 1


def test_steps_of_a_size_that_was_not_seen_are_followed_at_once() -> None:
    r, inbox = rig_in_time(steps_left=2)
    for _ in range(2):
        r.loop.turn()
    assert len(inbox.waits_ns) == 2
    assert r.calls() == ["plan 1", "complete 1", "launch 1", "plan 2", "complete 2", "launch 2", "settle 1"]


def test_without_overlap_nothing_is_put_off() -> None:
    r, inbox = rig_in_time(steps_left=5, overlap=False)
    for _ in range(4):
        r.loop.turn()
    assert len(inbox.waits_ns) == 4
