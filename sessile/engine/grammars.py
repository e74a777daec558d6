"""Requests with a grammar on their way to the machine: compiled beside the step loop, so that no step waits (H57)."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from llguidance import LLMatcher

from sessile.contract.messages import Cancel, Done, Grammar, Submit
from sessile.engine.clock import Clock
from sessile.errors import InvalidRequest, LimitReached, NotReady, UserError
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars, Key, key_of

log = logging.getLogger("sessile.engine")

THREADS = 2
COMPILE_NS_MAX = 900_000_000
"""A grammar that takes longer, once a thread has begun with it, is refused."""
WAITING_MAX = 256
"""Most requests that wait for a grammar; one more is refused. Of one tenant no more than there is room left, so that
whoever has the most never takes the last."""


@dataclass(slots=True)
class _Job:
    """One grammar that is being compiled, for all who wait for it."""

    grammar: Grammar
    waiting: list[Submit] = field(default_factory=list)
    begun_ns: int = 0
    """When its thread began with it; 0 before."""
    outcome: LLMatcher | UserError | None = None


class GrammarDesk:
    """Takes requests in and lets them go when their grammar is ready, both on the loop's thread.

    Threads of its own compile. Does not own the store of grammars, but is the only one that puts something there.
    """

    def __init__(self, compiler: GrammarCompiler, grammars: CompiledGrammars, clock: Clock) -> None:
        self._compiler = compiler
        self._grammars = grammars
        self._clock = clock
        self._jobs: dict[Key, _Job] = {}
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._finished: deque[_Job] = deque()
        self._refused: list[Done] = []
        self._threads: list[threading.Thread] = []

    @property
    def waiting(self) -> int:
        """Requests that wait for their grammar; the loop should not wait for long while there are any."""
        return sum([len(job.waiting) for job in self._jobs.values()])

    def receive(self, message: Submit) -> bool:
        """Whether the machine may have this request now. If not, it comes with `take_ready`, or is refused there."""
        grammar = message.grammar
        assert grammar is not None
        if grammar in self._grammars:
            return True
        if (refusal := self._refusal_of(message.tenant)) is not None:
            self._refuse(message, refusal)
            return False
        job = self._jobs.get(key_of(grammar))
        if job is None:
            job = self._jobs[key_of(grammar)] = _Job(grammar)
            self._begin(job)
        job.waiting.append(message)
        return False

    def cancel(self, message: Cancel) -> None:
        """End a request that waits here: as an abort, or refused if it was only to wait no longer."""
        for job in self._jobs.values():
            for request in [request for request in job.waiting if request.key == message.key]:
                job.waiting.remove(request)
                if message.if_waiting:
                    self._refuse(request, NotReady(message.message))
                else:
                    self._refused.append(Done(key=message.key, reason="abort", message=message.message))

    def cancel_all(self) -> None:
        """End all requests that wait here."""
        for job in self._jobs.values():
            for request in list(job.waiting):
                self.cancel(Cancel(request.key, "aborted by the operator"))

    def take_ready(self) -> Iterator[Submit]:
        """The requests whose grammar has been compiled since the last call; the machine must get each at once.

        To be taken to the end.
        """
        while self._finished:
            job = self._finished.popleft()
            del self._jobs[key_of(job.grammar)]
            if isinstance(job.outcome, LLMatcher):
                self._grammars.put(job.grammar, job.outcome)
                yield from job.waiting  # Before the next one is put: what is kept is bounded.
                continue
            assert job.outcome is not None
            for request in job.waiting:
                self._refuse(request, self._named(job.outcome, job.grammar, request))
        now_ns = self._clock.now_ns()
        for job in self._jobs.values():
            if job.begun_ns and now_ns - job.begun_ns > COMPILE_NS_MAX:
                # The thread goes on, within the compiler's own bounds; who asks again then finds it ready.
                for request in job.waiting:
                    self._refuse(request, _too_slow(request))
                job.waiting.clear()

    def take_refusals(self) -> list[Done]:
        """The ends of requests that came no further, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def _refusal_of(self, tenant: str) -> LimitReached | None:
        """Why one more request of a tenant cannot wait; None: it can. Without a name there is no other tenant."""
        waiting = self.waiting
        if waiting >= WAITING_MAX:
            return LimitReached(f"{WAITING_MAX} requests wait for their grammars: try again later")
        own = sum([request.tenant == tenant for job in self._jobs.values() for request in job.waiting]) if tenant else 0
        if own >= WAITING_MAX - waiting:
            return LimitReached(f"{own} requests of this key wait for their grammars: try again later")
        return None

    def _begin(self, job: _Job) -> None:
        while len(self._threads) < THREADS:
            thread = threading.Thread(target=self._compile, name=f"grammar-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._queue.put(job)

    def _compile(self) -> None:
        while True:
            job = self._queue.get()
            try:
                self._compiler.prepare()
                job.begun_ns = self._clock.now_ns()
                job.outcome = self._compiler.compile(job.grammar)
            except UserError as error:
                job.outcome = error
            except Exception:  # whatever it is, it concerns one grammar: the thread and the loop go on
                log.exception("a grammar could not be compiled")
                job.outcome = InvalidRequest("grammar: it cannot be compiled", param="grammar")
            self._finished.append(job)

    def _named(self, error: UserError, compiled: Grammar, request: Submit) -> UserError:
        """A refusal with the field that this request's grammar came in: others may have sent it in another one."""
        assert request.grammar is not None
        ours, theirs = _field_of(request.grammar), _field_of(compiled)
        if ours == theirs or error.param != theirs:
            return error
        return type(error)(error.message.replace(theirs, ours, 1), param=ours)

    def _refuse(self, request: Submit, error: UserError) -> None:
        self._refused.append(
            Done(
                key=request.key, reason="error", status=error.status, code=error.code, message=error.message,
                param=error.param,
            )
        )  # fmt: skip


def _field_of(grammar: Grammar) -> str:
    return grammar.field or grammar.kind


def _too_slow(request: Submit) -> UserError:
    assert request.grammar is not None
    name = _field_of(request.grammar)
    return InvalidRequest(f"{name}: not compiled within {COMPILE_NS_MAX / 1e9:g} s; make it simpler", param=name)
