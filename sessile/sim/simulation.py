"""One seed, from its first message to the empty pool: the engine's loop in virtual time, with every checker looking."""

import hashlib
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import msgspec

from sessile.contract import messages as wire
from sessile.contract.plan import StepPlan, decode_plan, encode_plan
from sessile.core import machine as core
from sessile.sim.books import Books
from sessile.sim.checkers import Readers, check_empty, check_indexes, check_plan, check_stats, check_sums
from sessile.sim.drafter import ToyDrafter
from sessile.sim.grammar import ToyGrammars
from sessile.sim.narrate import Event, narrate
from sessile.sim.records import CheckFailed, Failure, Report, Script, check
from sessile.sim.toy import ToyDevice, ToyTicket
from sessile.sim.workload import Workload
from sessile.sim.world import World

EVENTS_KEPT = 60
"""Last events that a failure shows."""
TURNS_PER_STEP_MAX = 20
"""Turns of the loop that a wanted step may take before the workload counts as exhausted."""


class Simulation:
    """One machine, one toy device and the clients of one world. Runs once."""

    def __init__(self, world: World, script: Script | None = None) -> None:
        limits, facts, temper = world.limits, world.facts, world.temper
        self._world = world
        self._books = Books(world)
        self._workload = Workload(world, self._books)
        self._script = script
        self._sent: dict[int, Sequence[wire.ToEngine]] = {}
        self._drafter = ToyDrafter(world, self._books) if limits.drafts_max else None
        self._machine = core.Machine(
            limits, facts, drafter=self._drafter, grammars=ToyGrammars(facts.vocab_size)
        )
        device_dice = Random(f"device {world.seed}")
        self._device = ToyDevice(
            pages_total=limits.pages_total,
            page_size=limits.page_size,
            rows_max=limits.rows_max,
            context_tokens=limits.context_tokens,
            drafts_max=limits.drafts_max,
            vocab_size=facts.vocab_size,
            strict=world.strict,
            is_late=lambda: device_dice.random() < temper.late_rate,
            is_faulty=lambda: temper.faulty_rate > 0 and device_dice.random() < temper.faulty_rate,
        )
        self._readers = Readers(world) if limits.tenants else None
        self._timing = Random(f"timing {world.seed}")
        self._in_flight: ToyTicket | None = None
        self._chunk_tokens = limits.chunk_tokens
        self._audited = False
        """Whether the machine audited itself after all that this turn did."""
        self._turn = 0
        self._steps = 0
        self._now_ns = 0
        self._trace = hashlib.sha256()
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)

    def run(self, steps: int) -> Report:
        """Simulate until `steps` steps were launched and everything has ended; never raises for what it finds."""
        return self._run_while(lambda: self._steps < steps and self._turn < steps * TURNS_PER_STEP_MAX)

    def run_script(self) -> Report:
        """The same until everything that the script sends was sent and has ended."""
        last_turn = max(self._script or {0: ()})
        return self._run_while(lambda: self._turn <= last_turn)

    def _run_while(self, goes_on: Callable[[], bool]) -> Report:
        failure = None
        try:
            while goes_on():
                self._loop_once(self._messages())
            self._wind_down()
        except Exception as error:  # Whatever the core raises is a finding: it is reported with its seed and step.
            failure = self._failure(error)
        totals = self._books.totals
        totals["steps"] = self._steps
        for mark, count in self._machine.marks.items():
            totals[f"mark: {mark.value}"] = count
        return Report(self._world.seed, self._steps, self._trace.hexdigest(), totals, failure, self._sent)

    # -- the loop -------------------------------------------------------------------------------------------------

    def _loop_once(self, messages: Sequence[wire.ToEngine]) -> bool:
        """One turn of the engine's loop; returns whether a step was launched or settled."""
        self._turn += 1
        for message in messages:
            self._send(message)
        self._tick()
        if self._in_flight and self._timing.random() < self._world.temper.delay_rate:
            self._collect()
            return True
        planned = self._machine.plan()
        moved = planned is not None or self._in_flight is not None
        if planned is None or planned.late:
            self._settle()
        plan = self._machine.complete(planned) if planned else None
        launched = self._launch(plan) if plan else None
        self._audited = False
        self._settle()
        self._in_flight = launched
        if not self._world.overlap:
            self._settle()
        self._collect()
        if moved or messages:
            if not self._audited and self._turn % self._world.audit_turns == 0:
                self._machine.audit()
            check_stats(self._machine.stats(), self._world, self._books, self._books.totals)
            if self._drafter is not None:
                check_indexes(self._machine, self._books, self._drafter.indexes)
        return moved

    def _messages(self) -> Sequence[wire.ToEngine]:
        if self._script is not None:
            return self._script.get(self._turn, ())
        messages = self._workload.messages()
        if messages:
            self._sent[self._turn] = messages
        return messages

    def _send(self, message: wire.ToEngine) -> None:
        self._note("sent", message)
        # Who waits is among the live: while those are few, nobody needs to be asked.
        may_be_crowded = isinstance(message, wire.Submit) and len(self._books.live) >= self._world.limits.queue_max
        self._books.note_sent(message, self._machine.stats().requests_waiting if may_be_crowded else 0)
        self._machine.receive(message)
        if self._books.is_unsure or self._timing.random() < self._world.temper.chatty:
            self._collect()

    def _tick(self) -> None:
        temper = self._world.temper
        self._now_ns += self._timing.randint(1, temper.tick_ns_max)
        if self._timing.random() < temper.pace_rate:
            self._chunk_tokens = self._timing.randint(1, self._world.limits.chunk_tokens)
            self._machine.set_chunk_tokens(self._chunk_tokens)
        self._collect()
        self._books.now_ns = self._now_ns
        self._machine.tick(self._now_ns)

    def _launch(self, plan: StepPlan) -> ToyTicket:
        packed = encode_plan(plan)
        self._trace.update(packed.tobytes())
        self._events.append((self._turn, "launched", plan))
        self._steps += len(plan.rows) > 0
        ticket = self._device.launch(decode_plan(packed))
        check_plan(plan, self._world, self._books, self._device, self._chunk_tokens)
        if self._readers is not None:
            self._readers.check_plan(plan, self._books, self._device)
        self._books.totals["drafts offered"] += sum(plan.draft_counts.tolist())
        self._books.totals["copies"] += len(plan.copies)
        return ticket

    def _settle(self) -> None:
        if self._in_flight is None:
            return
        ticket, self._in_flight = self._in_flight, None
        result = ticket.result()
        self._events.append((self._turn, "settled", result))
        self._books.totals["drafts accepted"] += sum([count - 1 for count in result.emitted.tolist() if count])
        self._machine.settle(result)
        self._audited = self._world.limits.audit_level >= 2

    def _collect(self) -> None:
        """Take all effects and check them; after that nobody may wait for what is decided at once."""
        batch = self._machine.take_effects()
        if batch is not None:
            self._note("took", batch)
            self._books.note_batch(batch, self._reclaims() if batch.done else 0, self._device.faulty_seeds)
        self._books.check_settled()

    def _reclaims(self) -> int:
        totals = self._machine._books.totals  # The whole of `stats` costs a tenth of a simulation.
        return totals.evicted_pages + totals.demoted_pages

    def _note(self, verb: str, message: wire.ToEngine | wire.Batch) -> None:
        self._trace.update(msgspec.msgpack.encode(message))
        self._events.append((self._turn, verb, message))

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, CheckFailed):
            checker, message = error.checker, str(error)
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            checker = type(error).__name__
            message = f"{error or place.line} ({Path(place.filename).name}:{place.lineno})"
        events = tuple(map(narrate, self._events))
        return Failure(self._world.seed, self._steps, checker, message, self._is_balanced(), events)

    def _is_balanced(self) -> bool:
        try:
            check_sums(self._machine.stats())
        except CheckFailed:
            return False
        return True

    # -- the end --------------------------------------------------------------------------------------------------

    def _wind_down(self) -> None:
        """No more messages: everything in flight has to end in bounded time, and then nothing may be left."""
        tokens = sum(len(r.prompt) + r.output_limit for r in self._books.live.values())
        turns_max = 200 + self._world.limits.share_wait_steps + 40 * tokens
        quiet_turns = 0
        while self._machine.has_work or self._in_flight:
            quiet_turns = 0 if self._loop_once(()) else quiet_turns + 1
            check(quiet_turns <= self._world.limits.share_wait_steps + 2, "liveness", "work is left, none is planned")
            turns_max -= 1
            check(turns_max > 0, "liveness", f"requests {list(self._books.live)} do not end")
        check(not self._books.live, "liveness", f"nothing to do, but {list(self._books.live)} have not ended")
        ops = iter(range(1 << 40, 1 << 41))
        closes = [wire.CloseSession(next(ops), each.id, each.tenant) for each in self._books.sessions.values()]
        self._loop_once([*closes, wire.Flush(next(ops)), wire.GetStats(next(ops))])
        while self._machine.has_work or self._in_flight:
            self._loop_once(())
            turns_max -= 1
            check(turns_max > 0, "liveness", "the last flush does not end")
        check_empty(self._machine.stats())
        if self._drafter is not None:
            check(not self._drafter.indexes, "leak", f"{len(self._drafter.indexes)} draft indexes are left")
