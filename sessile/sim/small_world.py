"""A world small enough to be explored to its last state: two clients, two turns each, a few pages.

Each client has a session and two turns of two tokens in and two out. Whatever comes next is chosen from outside: a
client sends its next turn or commits one of its faults, the loop makes a turn (plans and launches a step, then settles
the one before), or the step in flight settles alone. Between any two of these, every check of the simulator is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sessile.contract import messages as wire
from sessile.contract.model import ModelFacts
from sessile.contract.plan import decode_plan, encode_plan
from sessile.core import machine as core
from sessile.core.limits import Limits
from sessile.sim.books import Books
from sessile.sim.canonical import Form
from sessile.sim.checkers import check_empty, check_plan, check_stats
from sessile.sim.records import SessionBook, check
from sessile.sim.reference import Chain
from sessile.sim.toy import ToyDevice, ToyTicket
from sessile.sim.world import World, make_world

TURN, SETTLE, SEND = "turn", "settle", "send"
FAULTS = ("cancel", "disconnect", "close", "retract", "fork", "rewind", "demote")
"""What a client may commit once. A disconnect is a cancel as far as the core can see, so it comes after one."""
FORK_AT = (None, 3)
"""At the end, where the client goes on in the child, and within the first turn, where it stays with the parent."""
REWIND_TO = (2, 3)
TURNS = 2
INPUT_TOKENS = OUTPUT_TOKENS = 2
_VOCAB_SIZE = 64
_FIRST_INPUT = (5, 6)
"""Both clients begin with the same words, so that they share a page of the tree when it holds no more."""


@dataclass(frozen=True)
class Shape:
    """The size of a world. pages: those that sequences can use, beside the scratch page.

    prompt: a client sends its next turn before the loop takes another one, and a step settles only within the loop.
    Far fewer orders are left, so far more faults can be tried.
    """

    pages: int
    page_size: int
    clients: int = 2
    prompt: bool = False

    def __str__(self) -> str:
        clients = f"2 {'prompt ' if self.prompt else ''}clients" if self.clients == 2 else "1 client"
        return f"{clients}, {self.pages} pages of {self.page_size} tokens"


@dataclass(frozen=True)
class Action:
    """What happens next. client: whose doing it is; place: where a fork or rewind cuts."""

    kind: str
    client: int = -1
    place: int | None = None

    @property
    def is_fault(self) -> bool:
        """Whether it uses up one of the client's faults."""
        return self.kind in FAULTS

    def __str__(self) -> str:
        who = f" {'AB'[self.client]}" if self.client >= 0 else ""
        return f"{self.kind}{who}" + (f" at {self.place}" if self.place is not None else "")


@dataclass
class _Client:
    """What a client still intends. session: "" once it has closed it."""

    session: str
    turns_left: int = TURNS
    key: int = 0
    """Of its turn in flight; 0: none is."""


class SmallWorld:
    """One machine, one device and two clients in one state."""

    def __init__(self, shape: Shape) -> None:
        self._world = _world_of(shape)
        self._prompt = shape.prompt
        limits = self._world.limits
        self._books = Books(self._world)
        self._machine = core.Machine(limits, self._world.facts)
        self._device = ToyDevice(
            pages_total=limits.pages_total, page_size=limits.page_size, rows_max=limits.rows_max,
            context_tokens=limits.context_tokens, drafts_max=0, vocab_size=_VOCAB_SIZE,
        )  # fmt: skip
        self._in_flight: ToyTicket | None = None
        self._clients = [_Client("AB"[index]) for index in range(shape.clients)]
        self._names = 0
        """Keys and operations so far."""
        for client in self._clients:
            self._tell(wire.OpenSession(op=self._name(), session=client.session))
        self._look()

    # -- what may happen ------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        """All that may happen now, faults included, whether or not they were used up."""
        if self._machine.has_work and not (self._prompt and self._waiting()):
            yield Action(TURN)
        if self._in_flight and not self._prompt:
            yield Action(SETTLE)
        for index, client in enumerate(self._clients):
            if client.session:
                yield from self._actions_of(index, client, self._books.sessions[client.session])

    def _actions_of(self, index: int, client: _Client, session: SessionBook) -> Iterator[Action]:
        if client.key:
            yield Action("cancel", index)
            request = self._machine._books.requests[client.key]
            if request.row is not None and self._machine._books.rows.plannable[request.row]:
                yield Action("retract", index)
        elif client.turns_left and not (self._prompt and index != self._waiting()[0]):
            yield Action(SEND, index)
        yield Action("close", index)
        if self._machine._books.sessions["", session.id].parked is not None:
            yield Action("demote", index)
        if client.key:
            return
        for place in FORK_AT:
            if (place or 1) < len(session.history) or (place is None and session.history):
                yield Action("fork", index, place)
        for place in REWIND_TO:
            if place < len(session.history):
                yield Action("rewind", index, place)

    def default(self) -> Action | None:
        """What happens if no client commits a fault any more; None: all is done."""
        waiting = self._waiting()
        if self._machine.has_work and not (self._prompt and waiting):
            return Action(TURN)
        return Action(SEND, waiting[0]) if waiting else None

    def _waiting(self) -> list[int]:
        """Clients that have a turn to send and none in flight."""
        clients = enumerate(self._clients)
        return [index for index, client in clients if client.session and client.turns_left and not client.key]

    def do(self, action: Action) -> None:
        """Let it happen; raises what the core, the device or a check raises."""
        if action.kind == TURN:
            self._turn()
        elif action.kind == SETTLE:
            self._settle()
        else:
            client = self._clients[action.client]
            _DEEDS[action.kind](self, client, action)
        self._look()

    def digest(self) -> bytes:
        """Stands for the state: see canonical.py."""
        result = None if self._in_flight is None else self._in_flight.outcome
        form = Form(self._machine, self._device, result, self._books)
        intents = [(c.session, c.turns_left, c.key and form.request(c.key)) for c in self._clients]
        return form.digest(intents)

    # -- the loop -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        planned = self._machine.plan()
        if planned is None:
            self._settle()
            return
        plan = self._machine.complete(planned)
        launched = None
        if plan is not None:
            launched = self._device.launch(decode_plan(encode_plan(plan)))
            check_plan(plan, self._world, self._books, self._device, self._world.limits.chunk_tokens)
        self._settle()
        self._in_flight = launched

    def _settle(self) -> None:
        if self._in_flight is not None:
            ticket, self._in_flight = self._in_flight, None
            self._machine.settle(ticket.result())

    def _look(self) -> None:
        """Take all effects, make every check, and spoil what nobody owns."""
        batch = self._machine.take_effects()
        if batch is not None:
            stats = self._machine.stats()
            self._books.note_batch(batch, stats.evicted_pages_total + stats.demoted_pages_total, set())
            for done in batch.done:
                self._note_end(done)
        self._books.check_settled()
        self._machine.audit()
        check_stats(self._machine.stats(), self._world, self._books, self._books.totals)
        self._check_contents()
        held = self._machine._books
        self._device.scramble(held.ledger.free_stack, held.rows.free_list)

    def _check_contents(self) -> None:
        """KV at rest is what its session says, wherever no copy is still due."""
        books = self._machine._books
        for session in books.sessions.values():
            parked = session.parked
            if parked is None or session in books.copying:
                continue
            text = [*self._books.sessions[session.id].history]
            if session.turn is not None:
                turn = self._books.live[session.turn]
                text = [*turn.prompt, *turn.output]
            found = self._device.digest_of([*parked.pin.pages, *parked.lease.pages], parked.tokens)
            check(found == Chain(text[: parked.tokens]).digest, "content",
                  f"{parked.tokens} tokens of KV of session {session.id!r} are not its own")

    def _note_end(self, done: wire.Done) -> None:
        request = self._books.requests.pop(done.key)
        del self._books.by_seed[request.submit.sampling.seed]
        for client in self._clients:
            if client.key == done.key:
                client.key = 0
                client.turns_left -= done.reason == "length"
                if client.session not in self._books.sessions:
                    client.session = ""

    # -- what clients do ------------------------------------------------------------------------------------------

    def _name(self) -> int:
        self._names += 1
        return self._names

    def _tell(self, message: wire.ToEngine) -> None:
        self._books.note_sent(message, 0)
        self._machine.receive(message)

    def _send(self, client: _Client, action: Action) -> None:
        client.key = self._name()
        first = not self._books.sessions[client.session].history
        turn = TURNS - client.turns_left
        tokens = _FIRST_INPUT if first else (10 + 20 * action.client + 2 * turn, 11 + 20 * action.client)
        seed = 1 + 10 * action.client + turn
        self._submit(client.key, client.session, tokens, seed, OUTPUT_TOKENS)

    def _submit(self, key: int, session: str, tokens: tuple[int, ...], seed: int, output_tokens: int) -> None:
        sampling = wire.Sampling(seed=seed, temperature=0.7, max_new_tokens=output_tokens, ignore_eos=True)
        self._tell(wire.Submit(key=key, session=session, tokens=wire.pack_tokens(tokens), sampling=sampling))

    def _cancel(self, client: _Client, action: Action) -> None:
        self._tell(wire.Cancel(client.key, "client disconnected"))

    def _close(self, client: _Client, action: Action) -> None:
        self._tell(wire.CloseSession(self._name(), client.session))
        if not client.key:
            client.session = ""
        client.turns_left = 0

    def _retract(self, client: _Client, action: Action) -> None:
        self._books.live[client.key].ran_as_oldest = False
        self._machine.preempt(client.key)

    def _fork(self, client: _Client, action: Action) -> None:
        child = client.session + ("'" if action.place is None else '"')
        self._tell(wire.ForkSession(op=self._name(), session=client.session, child=child, at_tokens=action.place))
        if action.place is None:
            client.session = child

    def _rewind(self, client: _Client, action: Action) -> None:
        self._tell(wire.RewindSession(op=self._name(), session=client.session, to_tokens=action.place))

    def _demote(self, client: _Client, action: Action) -> None:
        self._machine.demote("", client.session)

    # -- the end --------------------------------------------------------------------------------------------------

    def wind_down(self) -> None:
        """All is done: every session that is left answers once more, from whatever KV it has; then nothing may be left.

        So KV that was shared, copied or cut is read once more by whoever holds it.
        """
        for number, session in enumerate(list(self._books.sessions.values())):
            if len(session.history) + 2 <= self._world.limits.sequence_tokens_max:
                self._submit(self._name(), session.id, (60,), 50 + number, 1)
                self._run_out()
        for session_id in list(self._books.sessions):
            self._tell(wire.CloseSession(self._name(), session_id))
        self._tell(wire.Flush(self._name()))
        self._run_out()
        check(not self._books.live, "liveness", f"requests {list(self._books.live)} have not ended")
        check_empty(self._machine.stats())

    def _run_out(self) -> None:
        turns = 0
        while self._machine.has_work:
            self._turn()
            self._look()
            turns += 1
            check(turns < 100, "liveness", "the last turns do not end")


_DEEDS: dict[str, Callable[[SmallWorld, Any, Action], None]] = {
    SEND: SmallWorld._send,
    "cancel": SmallWorld._cancel,
    "close": SmallWorld._close,
    "retract": SmallWorld._retract,
    "fork": SmallWorld._fork,
    "rewind": SmallWorld._rewind,
    "demote": SmallWorld._demote,
}


def _world_of(shape: Shape) -> World:
    longest = TURNS * (INPUT_TOKENS + OUTPUT_TOKENS) + 2
    facts = ModelFacts(vocab_size=_VOCAB_SIZE, context_tokens=longest, eos_ids=())
    limits = Limits(
        pages_total=shape.pages + 1,
        page_size=shape.page_size,
        rows_max=shape.clients,
        context_tokens=longest,
        chunk_tokens=4,
        audit_level=0,
        overtakes_max=2,
        share_wait_steps=2,
        output_estimate_tokens=1,
    )
    quiet = make_world(0, frozenset())
    return replace(quiet, limits=limits, facts=facts, overlap=True, strict=True)
