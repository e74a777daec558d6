"""Grammars in the engine: compiled beside the loop, whatever they cost; requests wait for theirs and no other."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sessile.contract.messages import Cancel, CancelAll, Done, Grammar, Sampling, Shutdown, Submit, pack_tokens
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.engine.clock import MonotonicClock
from sessile.engine.grammars import COMPILE_NS_MAX, WAITING_MAX, GrammarDesk
from sessile.engine.inbox import LocalInbox
from sessile.engine.loop import EngineLoop
from sessile.engine.outbox import LocalOutbox
from sessile.errors import InvalidRequest
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars
from sessile.sim.toy import ToyDevice
from tests.unit.test_grammar import EOS, FACTS

PATIENCE_S = 30.0


class HeldCompiler(GrammarCompiler):
    """Compiles when it is let; a source of "bad" is refused."""

    def __init__(self) -> None:
        super().__init__(FACTS)
        self.may_go_on = threading.Event()
        self.begun = threading.Event()

    def compile(self, grammar: Grammar) -> Any:
        self.begun.set()
        assert self.may_go_on.wait(PATIENCE_S)
        if grammar.source == "bad":
            raise InvalidRequest(f"{grammar.field}: bad at 1", param=grammar.field)
        return super().compile(grammar)


class SetClock(MonotonicClock):
    """The time, and as much later as a test says."""

    ahead_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.ahead_ns


class Running:
    """A loop over the toy device with a compiler that waits to be let."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.compiler = HeldCompiler()
        grammars = CompiledGrammars(FACTS.vocab_size, threads=1)
        self.desk = GrammarDesk(self.compiler, grammars, self.clock)
        limits = Limits(pages_total=64, page_size=4, rows_max=4, context_tokens=100, chunk_tokens=64)
        device = ToyDevice(
            pages_total=64, page_size=4, rows_max=4, context_tokens=100, drafts_max=0, vocab_size=FACTS.vocab_size
        )
        self.inbox, self.outbox = LocalInbox(), LocalOutbox()
        machine = Machine(limits, FACTS, grammars=grammars)
        self.loop = EngineLoop(machine, device, self.inbox, self.outbox, self.clock, grammars=self.desk)
        self.done: dict[int, Done] = {}

    def submit(self, key: int, grammar: Grammar | None, tokens: int = 8, tenant: str = "") -> None:
        sampling = Sampling(seed=key, temperature=0.0, max_new_tokens=tokens, ignore_eos=grammar is None)
        prompt = pack_tokens([1, 2, 3])
        self.inbox.put(Submit(key=key, tokens=prompt, sampling=sampling, grammar=grammar, tenant=tenant))

    def turn(self) -> None:
        self.loop.turn()
        for batch in self.outbox.take():
            self.done |= {done.key: done for done in batch.done}

    def until(self, *keys: int) -> None:
        """Turn until these have ended."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.done.keys() >= set(keys):
            assert time.monotonic() < deadline_s, f"only {list(self.done)} ended"
            self.turn()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.compiler.may_go_on.set()


def ab(field: str = "regex") -> Grammar:
    return Grammar("regex", "ab", field)


def test_h57_steps_go_on_while_a_grammar_is_compiled(running: Running) -> None:
    running.submit(1, ab())
    running.submit(2, None)
    running.until(2)
    assert running.compiler.begun.wait(PATIENCE_S) and 1 not in running.done
    running.compiler.may_go_on.set()
    running.until(1)
    assert (running.done[1].reason, running.done[1].matched, running.done[1].completion_tokens) == ("stop", EOS, 3)


def test_h57_what_takes_too_long_is_refused_in_time_and_by_the_name_of_its_field(running: Running) -> None:
    running.submit(1, ab("response_format"))
    running.turn()
    assert running.compiler.begun.wait(PATIENCE_S)
    running.clock.ahead_ns = COMPILE_NS_MAX + 1
    running.until(1)
    done = running.done[1]
    assert (done.reason, done.status, done.param) == ("error", 400, "response_format") and "0.9 s" in done.message
    running.submit(2, ab())
    running.until(2)
    assert running.done[2].status == 400
    running.compiler.may_go_on.set()
    while running.desk._jobs:
        running.turn()
    running.submit(3, ab())
    running.until(3)
    assert running.done[3].reason == "stop"


def test_requests_with_one_grammar_wait_for_one_compilation_each_under_its_own_field(running: Running) -> None:
    running.submit(1, Grammar("regex", "bad", "regex"))
    running.submit(2, Grammar("regex", "bad", "sampling_params.regex"))
    running.turn()
    assert len(running.desk._jobs) == 1
    running.compiler.may_go_on.set()
    running.until(1, 2)
    told = {key: (done.message, done.param, done.status) for key, done in running.done.items()}
    assert told == {
        1: ("regex: bad at 1", "regex", 400), 2: ("sampling_params.regex: bad at 1", "sampling_params.regex", 400)
    }  # fmt: skip


def test_a_grammar_that_is_there_is_not_compiled_again(running: Running) -> None:
    running.compiler.may_go_on.set()
    running.submit(1, ab())
    running.until(1)
    running.compiler.begun.clear()
    running.submit(2, ab("ebnf"))
    running.until(2)
    assert running.done[2].reason == "stop" and not running.compiler.begun.is_set()


def test_a_request_that_waits_for_its_grammar_can_be_cancelled(running: Running) -> None:
    running.submit(1, ab())
    running.submit(2, ab())
    running.turn()
    running.inbox.put(Cancel(1))
    running.until(1)
    assert running.done[1].reason == "abort"
    running.inbox.put(CancelAll(7))
    running.until(2)
    assert (running.done[2].reason, running.desk.waiting) == ("abort", 0)


def test_no_more_than_so_many_requests_wait_for_grammars(running: Running) -> None:
    for key in range(WAITING_MAX + 1):
        running.submit(key, ab())
    running.until(WAITING_MAX)
    assert running.done[WAITING_MAX].status == 429 and len(running.done) == 1


def test_h77_one_tenant_does_not_take_all_places_of_those_who_wait(running: Running) -> None:
    for key in range(WAITING_MAX):
        running.submit(key, ab(), tenant="ada")
    running.until(WAITING_MAX - 1)
    refused = sorted(running.done)
    assert refused == list(range(WAITING_MAX // 2, WAITING_MAX)) and running.done[refused[0]].status == 429
    assert "of this key" in running.done[refused[0]].message
    running.submit(1000, ab(), tenant="bob")
    running.turn()
    assert 1000 not in running.done
    running.compiler.may_go_on.set()
    running.until(0, 1000)
    assert running.done[1000].reason == "stop"


def test_a_request_that_waits_too_long_for_its_grammar_is_refused_and_not_aborted(running: Running) -> None:
    running.submit(1, ab())
    running.submit(2, ab())
    running.turn()
    running.inbox.put(Cancel(1, "waited too long", if_waiting=True))
    running.until(1)
    done = running.done[1]
    assert (done.reason, done.status, done.code, done.message) == ("error", 503, "not_ready", "waited too long")
    running.compiler.may_go_on.set()
    running.until(2)
    assert running.done[2].reason == "stop", "who waits for the same grammar waits on"


def test_a_shutdown_waits_for_grammars_and_ends_what_is_left(running: Running) -> None:
    running.submit(1, ab())
    running.turn()
    running.inbox.put(Shutdown(drain_s=1.0))
    running.turn()
    assert not running.loop.stopped
    running.clock.ahead_ns = 2_000_000_000
    running.until(1)
    while not running.loop.stopped:
        running.turn()
    assert running.done[1].reason in ("abort", "error")
