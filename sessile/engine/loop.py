"""The step loop: plan and launch step k+1 while the device runs step k, then settle k."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sessile.contract.corpora import CorpusOperation
from sessile.contract.messages import (
    Batch,
    Cancel,
    CancelAll,
    Done,
    GetStats,
    OpenSession,
    Refusal,
    Reply,
    Shutdown,
    Submit,
    ToEngine,
)
from sessile.contract.plan import StepPlan
from sessile.core.machine import Machine
from sessile.core.planned import Planned
from sessile.core.watch import Report
from sessile.engine.clock import Clock
from sessile.engine.drafting import TimedDrafter
from sessile.engine.executor import Executor, Ticket
from sessile.engine.garbage import IdleCollector
from sessile.engine.grammars import GrammarDesk
from sessile.engine.inbox import Inbox
from sessile.engine.launch_time import LaunchTime
from sessile.engine.metrics import StepTimes
from sessile.engine.outbox import Outbox
from sessile.engine.pace import Pace
from sessile.errors import NotReady

if TYPE_CHECKING:
    from sessile.engine.corpora import CorpusDesk

log = logging.getLogger("sessile.engine")

IDLE_WAIT_NS_MAX = 500_000_000
"""Longest wait of an idle loop, so that a signal is noticed and garbage is collected soon."""
STUCK_WAIT_NS_MAX = 10_000_000
"""Longest wait while there is work that could not be planned: some of it waits for a number of plans to pass."""
LOADING_WAIT_NS_MAX = 5_000_000
"""Longest wait while a corpus is read or a grammar compiled beside the loop."""
SHUTDOWN_OP = -1
"""Operation number of the loop's own CancelAll; no server uses it."""


@dataclass(slots=True)  # As with a plan: not frozen, for speed only.
class StepInFlight:
    """A launched step that is not settled."""

    ticket: Ticket
    plan: StepPlan
    launched_ns: int


class EngineLoop:
    """Drives one machine and one executor; owns neither. Holds the step in flight and whether the end was asked for.

    Not thread-safe but for `begin_shutdown`, which a signal handler may call.
    """

    def __init__(
        self,
        machine: Machine,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        clock: Clock,
        *,
        overlap: bool = True,
        pace: Pace | None = None,
        collector: IdleCollector | None = None,
        drafter: TimedDrafter | None = None,
        corpora: "CorpusDesk | None" = None,
        grammars: GrammarDesk | None = None,
        launch_time: LaunchTime | None = None,
    ) -> None:
        """drafter: the machine's, if it has one: it says how long it took, and is told how late steps are for its sake.
        corpora: what it drafts from; None where nobody drafts, and nobody asks for corpora then. grammars: where
        requests wait for theirs; None where the machine follows none, and says so. launch_time: learns when steps must
        be planned; None: at once.
        """
        self._machine = machine
        self._executor = executor
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._overlap = overlap
        self._pace = pace
        self._collector = collector
        self._corpora = corpora
        self._grammars = grammars
        self._launch_time = launch_time if overlap else None
        self._times = StepTimes(drafter)
        self._drafter = drafter
        self._in_flight: StepInFlight | None = None
        self._settled_ns = 0
        self._turned = False
        self._drain_until_ns: int | None = None
        self.stopped = False
        if pace:
            machine.set_chunk_tokens(pace.chunk_tokens)

    def run(self) -> None:
        """Turn until a shutdown is complete. Raises what the machine or the device raises: there is no going on."""
        while not self.stopped:
            self.turn()

    def turn(self) -> None:
        """Take in what comes, plan and launch a step while the last one runs, settle that, send all effects.

        A plan with a late part (drafts) waits for the tokens of the step in flight: settle first, then launch.
        """
        self._take_in()
        if self._launch_time and self._in_flight:
            self._take_in_until_due(self._launch_time, self._in_flight)
        begun_ns = self._clock.now_ns()
        self._machine.tick(begun_ns)  # After the wait: stamps what was just taken in (H70).
        planned = self._machine.plan()
        self._times.plan_ns_total += self._clock.now_ns() - begun_ns
        self._turned = planned is not None or self._in_flight is not None
        before = self._in_flight
        if planned is None or planned.late:
            self._settle()
        launched = self._launch(planned)
        if before and launched:
            self._note_host(before, launched, begun_ns)
        self._settle()
        self._in_flight = launched
        if not self._overlap:
            self._settle()
        for report in self._machine.take_reports():
            log_report(report)
        if effects := self._machine.take_effects():
            self._outbox.send(self._times.stamp(effects))
        self._swap_corpora()
        if self._turned:
            self._machine.look()
        self._finish_shutdown()

    def _note_host(self, before: StepInFlight, launched: StepInFlight, begun_ns: int) -> None:
        """Note how long the host took for a step behind another one, from begun_ns on, or from the end of that one."""
        now_ns = self._clock.now_ns()
        if self._in_flight is None:
            if self._drafter and not launched.plan.mask_queries.size:  # With masks it would be late anyway.
                self._drafter.observe_late(launched.plan.rows.size, now_ns - self._settled_ns)
        elif self._launch_time:
            self._launch_time.observe_host(before.plan, now_ns - begun_ns)

    def begin_shutdown(self, drain_s: float) -> None:
        """Refuse new work from now on and stop when all is done, or when drain_s have passed: then the rest is aborted.

        A second call may only shorten the time.
        """
        until_ns = self._clock.now_ns() + int(drain_s * 1e9)
        self._drain_until_ns = until_ns if self._drain_until_ns is None else min(until_ns, self._drain_until_ns)

    def _take_in(self) -> None:
        """Pass on what has come; with nothing to do, wait for it, until the machine's next timer at the latest.

        Before it waits the device makes ready for steps to come, a little each turn: a request comes in between.
        """
        is_idle = not (self._turned or self._in_flight)
        messages = self._inbox.take(0 if is_idle and self._executor.prepare() else self._wait_ns())
        if self._collector:
            # Who only looks, as a watchdog does all the time, does not keep the loop from being idle.
            is_used = self._turned or any(not isinstance(message, GetStats) for message in messages)
            note = self._collector.note_use if is_used else self._collector.note_idle
            note(self._clock.now_ns())
        self._receive_all(messages)

    def _take_in_until_due(self, launch_time: LaunchTime, step: StepInFlight) -> None:
        """Take in what comes until the step in flight is so near its end that the next one must be planned.

        Or at its end, if that is sooner than expected. The thread does not sleep: it would wake too late for steps of
        a millisecond.
        """
        due_ns = launch_time.due_ns(step.plan, max(step.launched_ns, self._settled_ns))
        while self._clock.now_ns() < due_ns and not step.ticket.is_done():
            if messages := self._inbox.take(0):
                self._receive_all(messages)

    def _receive_all(self, messages: list[ToEngine]) -> None:
        """Pass messages on to the machine, and with them requests whose grammar has become ready."""
        for message in messages:
            self._receive(message)
        if self._grammars:
            for request in self._grammars.take_ready():
                self._machine.receive(request)
            if refused := self._grammars.take_refusals():
                self._outbox.send(Batch(step=0, done=refused))

    def _wait_ns(self) -> int:
        """How long this turn may wait for messages: not at all while steps are planned or settled."""
        if self._turned or self._in_flight:
            return 0
        longest = STUCK_WAIT_NS_MAX if self._machine.has_work else IDLE_WAIT_NS_MAX
        if (self._corpora and self._corpora.is_loading) or self._is_compiling:
            longest = LOADING_WAIT_NS_MAX
        deadline_ns = self._machine.next_deadline_ns
        if deadline_ns is None:
            return longest
        return min(longest, max(0, deadline_ns - self._clock.now_ns()))

    def _receive(self, message: ToEngine) -> None:
        """Pass a message on to the machine, unless it is about the end of this engine or would prolong its life."""
        if isinstance(message, Shutdown):
            self.begin_shutdown(message.drain_s)
        elif self._drain_until_ns is not None and isinstance(message, Submit | OpenSession):
            self._outbox.send(refused_while_stopping(message))
        elif isinstance(message, CorpusOperation):
            assert self._corpora, "an engine that drafts from no corpora is sent none"
            self._corpora.receive(message)
        elif self._grammars is None or self._may_pass(self._grammars, message):
            self._machine.receive(message)

    def _may_pass(self, desk: GrammarDesk, message: ToEngine) -> bool:
        """Whether a message is the machine's now: all but requests whose grammar is not ready."""
        if isinstance(message, Cancel):
            desk.cancel(message)
        elif isinstance(message, CancelAll):
            desk.cancel_all()
        return not isinstance(message, Submit) or message.grammar is None or desk.receive(message)

    @property
    def _is_compiling(self) -> bool:
        return self._grammars is not None and self._grammars.waiting > 0

    def _launch(self, planned: Planned | None) -> StepInFlight | None:
        """Complete and launch a planned step; None if there is none, or none of its rows is left."""
        if planned is None:
            return None
        started_ns = self._clock.now_ns()
        plan = self._machine.complete(planned)
        launched_ns = self._clock.now_ns()
        self._times.plan_ns_total += launched_ns - started_ns
        return StepInFlight(self._executor.launch(plan), plan, launched_ns) if plan else None

    def _settle(self) -> None:
        """Wait for the step in flight, if there is one, and let the machine settle it."""
        step = self._in_flight
        if step is None:
            return
        self._in_flight = None
        result = step.ticket.result()
        done_ns = self._clock.now_ns()
        # The device begins a step when it is launched or when the one before it is done, whichever is later.
        step_ns = done_ns - max(step.launched_ns, self._settled_ns)
        self._machine.settle(result)
        self._settled_ns = done_ns
        if self._launch_time:
            self._launch_time.observe_step(step.plan, step_ns)
        self._times.step_ns_total += step_ns
        self._times.shortages_total += result.shortages
        self._times.plan_ns_total += self._clock.now_ns() - done_ns
        if self._pace:
            self._machine.set_chunk_tokens(self._pace.observe(step.plan.tokens.size, step_ns / 1e6))

    def _swap_corpora(self) -> None:
        """Between two steps: the next one drafts from what is on the shelf now."""
        if self._corpora and (replies := self._corpora.take_replies()):
            self._outbox.send(Batch(step=0, replies=replies))

    def _finish_shutdown(self) -> None:
        """Stop once nothing is left to do; past the drain time, abort what is left."""
        if self._drain_until_ns is None:
            return
        has_work = self._machine.has_work or self._is_compiling
        if has_work and self._clock.now_ns() >= self._drain_until_ns:
            self._receive(CancelAll(SHUTDOWN_OP))
        elif not has_work and self._in_flight is None:
            self.stopped = True


def log_report(report: Report) -> None:
    """A violation was contained: one line, with the last events of the machine before it."""
    log.error(
        "an invariant was violated; whoever it names was ended, everybody else is served on",
        extra={"found": report.found, "quarantined_pages": report.quarantined_pages, "events": report.events},
    )


def refused_while_stopping(message: Submit | OpenSession) -> Batch:
    """The answer to a message that asks a stopping engine for new work."""
    refusal = NotReady("the server is shutting down; try again on another one or later")
    if isinstance(message, Submit):
        done = Done(
            key=message.key, reason="error", status=refusal.status, code=refusal.code, message=refusal.message
        )
        return Batch(step=0, done=[done])
    error = Refusal(status=refusal.status, code=refusal.code, message=refusal.message)
    return Batch(step=0, replies=[Reply(op=message.op, error=error)])
