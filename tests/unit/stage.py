"""A machine over the simulator's toy device, driven by hand: what a test sends, what comes back, step by step."""

from collections import defaultdict
from typing import Any

import numpy as np

from sessile.contract.drafting import Drafter
from sessile.contract.grammar import Grammars
from sessile.contract.messages import (
    Batch,
    CloseSession,
    Done,
    GetSession,
    GetStats,
    OpenSession,
    Reply,
    Sampling,
    SessionGone,
    SessionTokens,
    SessionView,
    Stats,
    Submit,
    ToEngine,
    pack_tokens,
    unpack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.sim.reference import Speaker
from sessile.sim.toy import ToyDevice, ToyTicket

SUBMIT_FIELDS = (
    "group",
    "tenant", "priority", "rid", "branch", "expect_tokens", "logprobs", "prompt_logprobs_from", "speculate",
    "drafts_max", "corpora", "remember", "grammar",
)  # fmt: skip
VOCABULARY = 50
FACTS = ModelFacts(vocab_size=VOCABULARY, context_tokens=256, eos_ids=())
STEPS_MAX = 2000


class Stage:
    """One machine, audited after every step, and all that it has said."""

    def __init__(
        self,
        *,
        pages: int = 64,
        page_size: int = 4,
        rows: int = 4,
        chunk: int = 64,
        facts: ModelFacts = FACTS,
        drafter: Drafter | None = None,
        drafts_max: int = 0,
        grammars: Grammars | None = None,
        **limits: Any,
    ) -> None:
        self.page_size = page_size
        self.machine = Machine(
            Limits(
                pages_total=pages, page_size=page_size, rows_max=rows, context_tokens=facts.context_tokens,
                chunk_tokens=chunk, drafts_max=drafts_max, **({"audit_level": 2} | limits),
            ),
            facts,
            drafter=drafter,
            grammars=grammars,
        )  # fmt: skip
        self.device = ToyDevice(
            pages_total=pages, page_size=page_size, rows_max=rows, context_tokens=facts.context_tokens,
            drafts_max=drafts_max, vocab_size=facts.vocab_size,
        )  # fmt: skip
        self.plans: list[StepPlan] = []
        """Every step that was launched."""
        self.output: dict[int, list[int]] = defaultdict(list)
        self.done: dict[int, Done] = {}
        self.gone: list[SessionGone] = []
        """Sessions that ended by themselves."""
        self.queries = 0
        """Query tokens that the device counted."""
        self._in_flight: ToyTicket | None = None
        self._replies: dict[int, Reply] = {}
        self._op = 0

    # -- what a client does ---------------------------------------------------------------------------------------

    def submit(self, key: int, prompt: list[int], *, session: str | None = None, **settings: Any) -> None:
        """A plain request, or a turn; greedy, 4 tokens unless said otherwise. settings: of Submit, then of Sampling."""
        fields = {name: settings.pop(name) for name in SUBMIT_FIELDS if name in settings}
        wish = Sampling(**({"seed": key, "temperature": 0.0, "max_new_tokens": 4} | settings))
        self.send(Submit(key=key, tokens=pack_tokens(prompt), sampling=wish, session=session, **fields))

    def ask(self, operation: type, *arguments: Any, **named: Any) -> Reply:
        """The reply to an operation that is answered at once."""
        self._op += 1
        self.send(operation(op=self._op, **named) if named else operation(self._op, *arguments))
        return self._replies.pop(self._op)

    def open(self, session: str, **settings: Any) -> Reply:
        return self.ask(OpenSession, session=session, **settings)

    def close(self, session: str) -> Reply:
        return self.ask(CloseSession, session)

    def send(self, message: ToEngine) -> None:
        self.machine.receive(message)
        self._gather()

    # -- steps ----------------------------------------------------------------------------------------------------

    def launch(self) -> bool:
        """Plan and launch a step, and settle the one that was in flight; the new one stays in flight."""
        planned = self.machine.plan()
        if planned is not None and planned.late:
            self.settle()
        plan = self.machine.complete(planned) if planned else None
        ticket = self.device.launch(plan) if plan else None
        if plan is not None:
            self.plans.append(plan)
        self.settle()
        self._in_flight = ticket
        return ticket is not None

    def settle(self) -> None:
        """Settle the step in flight, if there is one."""
        if self._in_flight is not None:
            result = self._in_flight.result()
            self.queries += int(result.query_counts.sum())
            self._in_flight = None
            self.machine.settle(result)
            self.machine.look()
        self._gather()

    def step(self, count: int = 1) -> None:
        """Launch and settle: no overlap."""
        for _ in range(count):
            self.launch()
            self.settle()

    def run(self) -> None:
        """Overlapped steps until nothing is left to do."""
        for _ in range(STEPS_MAX):
            if not self.machine.has_work:
                return
            self.launch()
        raise AssertionError(f"work was left after {STEPS_MAX} steps")

    # -- what there is to see -------------------------------------------------------------------------------------

    def history(self, session: str) -> list[int]:
        value: Any = self.ask(SessionTokens, session).value
        return unpack_tokens(value.values["tokens"]).tolist()

    def view(self, session: str) -> SessionView:
        value = self.ask(GetSession, session).value
        assert isinstance(value, SessionView)
        return value

    def stats(self) -> Stats:
        value = self.ask(GetStats).value
        assert isinstance(value, Stats)
        return value

    def _gather(self) -> None:
        batch = self.machine.take_effects()
        if batch is None:
            return
        for key, tokens in deltas_of(batch):
            assert key not in self.done, f"request {key} went on after its end"
            self.output[key] += tokens
        for done in batch.done:
            assert done.key not in self.done, f"request {done.key} ended twice"
            self.done[done.key] = done
        self.gone += batch.gone
        self._replies |= {reply.op: reply for reply in batch.replies}


def deltas_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """(key, new tokens) of each delta."""
    tokens = unpack_tokens(batch.delta_tokens).tolist()
    bounds = np.concatenate(([0], np.cumsum(np.frombuffer(batch.delta_counts, "<i4"))))
    keys = np.frombuffer(batch.delta_keys, "<i8").tolist()
    return [(key, tokens[bounds[i] : bounds[i + 1]]) for i, key in enumerate(keys)]


def expected(context: list[int], count: int = 4, facts: ModelFacts = FACTS) -> list[int]:
    """What the toy model says after a context, greedily, by a path that knows no pages."""
    speaker = Speaker(context, Sampling(seed=0, temperature=0.0), facts)
    said = []
    for _ in range(count):
        said.append(speaker.peek())
        speaker.push(said[-1])
    return said
