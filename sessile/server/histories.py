"""What the server holds of open sessions, so that they outlive the engine: how they were opened, and their tokens.

All of it passes by on its way to the engine or back: a turn's input when it is sent, its output as it comes, and its
end, which says whether it was committed. What an engine had and what is held here differ in nothing that a client was
told. Where they might, a session is held no longer: after a restart it is lost, and says so, instead of going on from a
wrong history.
"""

import asyncio
import itertools
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from sessile.contract.messages import (
    Batch,
    CloseSession,
    CommittedTurn,
    Done,
    DropTurn,
    ForkSession,
    GetSession,
    OpenSession,
    Outcome,
    Refusal,
    Reply,
    RestoreSession,
    RewindSession,
    SessionTokens,
    SessionView,
    Submit,
    ToEngine,
)
from sessile.errors import NotReady, UserError
from sessile.server.branches import Branches

log = logging.getLogger(__name__)

TOKEN_BYTES = 4
SESSION_BYTES = 1024
"""What a session counts as beside its tokens."""
LOST_MAX = 100_000
"""Most ids of lost sessions that are kept to say so; the oldest are unknown then."""
PORTION_BYTES = 4 << 20
"""Restored at once, before the engine has answered: as much as it takes in in one turn."""
LOST = "session {!r} was lost when the engine was restarted: open a new one and send its history again"

Place = tuple[str, str]
"""A tenant's name and a session's id."""
Operation = OpenSession | ForkSession | RewindSession | CloseSession | DropTurn
"""What changes which sessions there are, or their histories."""
Ask = Callable[[Callable[[int], ToEngine]], Awaitable[Any]]


@dataclass(eq=False, slots=True)
class Held:
    """An open session. tokens: packed, or None once they are held no longer; a branching one has branches instead."""

    opening: OpenSession
    tokens: bytearray | None
    branches: Branches | None = None
    turn_ends: "array[int]" = field(default_factory=lambda: array("q"))
    last: CommittedTurn | None = None
    last_rid: str = ""
    """The name of the last committed turn: the same again repeats its reply."""
    closing: bool = False

    @property
    def bytes(self) -> int:
        """What it counts as."""
        if self.tokens is None:
            return SESSION_BYTES
        kept = len(self.last.input) if self.last else 0
        branches = self.branches.bytes if self.branches else 0
        return SESSION_BYTES + len(self.tokens) + kept + 8 * len(self.turn_ends) + branches


@dataclass(eq=False, slots=True)
class Turn:
    """A turn in flight. number: its place among all messages."""

    number: int
    place: Place
    submit: Submit
    output: bytearray = field(default_factory=bytearray)
    is_overtaken: bool = False
    """Whether a later turn was committed while this one may still have waited in the engine for its grammar."""

    @property
    def may_wait(self) -> bool:
        """Whether messages behind it may have come to the engine's sessions before it."""
        return self.submit.grammar is not None and not self.output


class Histories:
    """All open sessions of one server. Its only writer is the event loop.

    Beyond bytes_max the tokens of those that were used longest ago are let go of.
    """

    def __init__(self, bytes_max: int = 0, *, bos_id: int | None = None) -> None:
        """bos_id: the model's, which the engine leaves out in front of further input."""
        self.bytes = 0
        """What all sessions count as."""
        self.restored_total = 0
        self.lost_total = 0
        self._bytes_max = bytes_max
        self._bos_id = bos_id
        self._sessions: dict[Place, Held] = {}
        self._held: dict[Place, None] = {}
        """Those of them whose tokens are held, in the order of last use."""
        self._turns: dict[int, Turn] = {}
        """By key of the request."""
        self._collecting: dict[int, Turn] = {}
        self._operations: dict[int, tuple[int, Operation]] = {}
        """Unanswered ones by their `op`, with the place of each among all messages."""
        self.on_lost: Callable[[Place], None] = lambda place: None
        """Called for each session that is lost."""
        self._numbers = itertools.count()
        self._lost: dict[Place, None] = {}

    @property
    def held(self) -> int:
        """Sessions that would come back after a restart."""
        return len(self._held)

    @property
    def collecting(self) -> "dict[int, Turn]":
        """Turns in flight whose output is wanted, by key: those of sessions that are not known to be held no longer."""
        return self._collecting

    # -- what passes by -------------------------------------------------------------------------------------------

    def refusal(self, message: ToEngine) -> Refusal | None:
        """Why a message need not be sent: it names a session that was lost."""
        if not self._lost or not isinstance(message, Submit | ForkSession | RewindSession | GetSession | SessionTokens):
            return None
        if message.session is None or (message.tenant, message.session) not in self._lost:
            return None
        return Refusal(410, "session_lost", LOST.format(message.session), "session_params.id")

    def note_sent(self, message: ToEngine) -> None:
        """A message is on its way to the engine."""
        if isinstance(message, Submit):
            if message.session is not None:
                place = (message.tenant, message.session)
                turn = self._turns[message.key] = Turn(next(self._numbers), place, message)
                if place not in self._sessions or place in self._held:
                    self._collecting[message.key] = turn
        elif isinstance(message, Operation):
            assert message.op not in self._operations, f"operation {message.op} is on its way already"
            self._operations[message.op] = next(self._numbers), message
            self._note_understood(message)

    def follow(self, operation: DropTurn | CloseSession) -> None:
        """No engine has answered this, and none will: what is wanted no more does not come back with the next one."""
        self._note_understood(operation)
        place = (operation.tenant, operation.session)
        if isinstance(operation, DropTurn):
            self._drop(place, operation.rid)
        else:
            self._remove(place)

    def _note_understood(self, operation: Operation) -> None:
        """Whoever opens or closes a session need not be told any more that one of that name was lost."""
        if not isinstance(operation, DropTurn):
            session = operation.child if isinstance(operation, ForkSession) else operation.session
            self._lost.pop((operation.tenant, session), None)

    def note_batch(self, batch: Batch) -> None:
        """Turns have ended, operations were answered, sessions ended by themselves; the output of turns is in already.

        What concerns one session happened in the order in which it was asked for, whatever the order of the batch.
        """
        outcomes: list[tuple[int, Turn | Operation, Done | Reply]] = []
        for done in batch.done:
            self._collecting.pop(done.key, None)
            if (turn := self._turns.pop(done.key, None)) is not None:
                outcomes.append((turn.number, turn, done))
        for reply in batch.replies:
            numbered = self._operations.pop(reply.op, None)
            if numbered is not None and reply.error is None:
                outcomes.append((*numbered, reply))
        for _, asked, outcome in sorted(outcomes, key=itemgetter(0)):
            if isinstance(asked, Turn):
                assert isinstance(outcome, Done)
                self._note_end(asked, outcome)
            else:
                assert isinstance(outcome, Reply)
                self._apply(asked, outcome)
        for gone in batch.gone:
            session = self._sessions.get((gone.tenant, gone.session))
            # One that was closed and then opened anew, all in one batch, is another one.
            if session is not None and (session.closing or gone.reason != "closed"):
                self._remove((gone.tenant, gone.session))

    def _note_end(self, turn: Turn, done: Done) -> None:
        """A committed turn becomes history."""
        session = self._sessions.get(turn.place)
        if session is None or session.tokens is None:
            return
        if session.branches is not None:
            self._note_branch_end(turn, session, session.branches, done)
            return
        if done.session_tokens < 0:
            return
        base = len(session.tokens) // TOKEN_BYTES
        if turn.submit.rid and turn.submit.rid == session.last_rid:
            return  # The reply of the last turn was said again.
        new = done.prompt_tokens - base
        sent = len(turn.submit.tokens) // TOKEN_BYTES
        # A beginning-of-sequence token in front of further input is left out by the engine.
        if new not in (sent, sent - 1) or base + new + len(turn.output) // TOKEN_BYTES != done.session_tokens:
            self._let_go(turn.place, session)
            return
        self.bytes -= session.bytes
        session.tokens += turn.submit.tokens[(sent - new) * TOKEN_BYTES :] + turn.output
        session.turn_ends.append(done.session_tokens)
        session.last, session.last_rid = _named(turn.submit, done), turn.submit.rid
        self.bytes += session.bytes
        self._note_use(turn.place)

    def _note_branch_end(self, turn: Turn, session: Held, branches: Branches, done: Done) -> None:
        if turn.submit.rid in branches:
            return  # The reply of that turn was said again, or the name refused.
        before_bytes, is_right = branches.bytes, True
        if done.prompt_tokens:  # else it was refused or ended before it came in, and has replaced nothing
            branches.drop(branches.replaced_by(turn.submit.branch, turn.number))
            is_right = not (turn.is_overtaken and turn.submit.branch is not None and turn.submit.branch.replace)
        beside = [other for other in self._turns.values() if other.place == turn.place]
        if done.session_tokens >= 0 and is_right:
            told = _named(turn.submit, done)
            is_right = branches.commit(turn.number, turn.submit, bytes(turn.output), done, self._bos_id, told)
            for other in beside:
                other.is_overtaken |= other.number < turn.number and other.may_wait
        if not beside:
            branches.forget_dropped()
        self.bytes += branches.bytes - before_bytes
        if is_right:
            self._note_use(turn.place)
        else:
            self._let_go(turn.place, session)

    def _note_use(self, place: Place) -> None:
        del self._held[place]
        self._held[place] = None
        self._make_room()

    def _apply(self, operation: Operation, reply: Reply) -> None:
        place = (operation.tenant, operation.session)
        if isinstance(operation, OpenSession):
            self._add(place, Held(operation, bytearray(), Branches() if operation.branching else None))
        elif isinstance(operation, DropTurn):
            self._drop(place, operation.rid)
        elif isinstance(operation, CloseSession):
            assert isinstance(reply.value, Outcome)
            if reply.value.values["closed"]:
                self._remove(place)
            elif place in self._sessions:
                self._sessions[place].closing = True
        elif isinstance(operation, ForkSession):
            assert isinstance(reply.value, SessionView)
            self._fork(operation, self._sessions.get(place), reply.value)
        elif (session := self._sessions.get(place)) is not None:
            assert isinstance(reply.value, SessionView)
            self._cut(place, session, reply.value.tokens)

    def _drop(self, place: Place, rid: str) -> None:
        session = self._sessions.get(place)
        if session is None or session.branches is None:
            return
        self.bytes -= session.bytes
        session.branches.drop_one(rid)
        if not any(turn.place == place for turn in self._turns.values()):
            session.branches.forget_dropped()
        self.bytes += session.bytes

    def _fork(self, operation: ForkSession, parent: Held | None, view: SessionView) -> None:
        opening = OpenSession(
            op=0,
            session=operation.child,
            tenant=operation.tenant,
            idle_timeout_s=view.idle_timeout_s,
            tokens_max=view.tokens_max,
            metadata=view.metadata,
        )
        child = Held(opening, None)
        if parent is not None and parent.tokens is not None and len(parent.tokens) >= view.tokens * TOKEN_BYTES:
            child.tokens = parent.tokens[: view.tokens * TOKEN_BYTES]
            child.turn_ends = _ends_within(parent.turn_ends, view.tokens)
        self._add((operation.tenant, operation.child), child)

    def _cut(self, place: Place, session: Held, tokens: int) -> None:
        if session.tokens is None:
            return
        if len(session.tokens) < tokens * TOKEN_BYTES:
            self._let_go(place, session)
            return
        self.bytes -= session.bytes
        del session.tokens[tokens * TOKEN_BYTES :]
        session.turn_ends = _ends_within(session.turn_ends, tokens)
        session.last, session.last_rid = None, ""
        self.bytes += session.bytes

    # -- room -----------------------------------------------------------------------------------------------------

    def _add(self, place: Place, session: Held) -> None:
        self._remove(place)
        self._sessions[place] = session
        self.bytes += session.bytes
        if session.tokens is not None:
            self._held[place] = None
        self._make_room()

    def _remove(self, place: Place) -> None:
        session = self._sessions.pop(place, None)
        self._held.pop(place, None)
        if session is not None:
            self.bytes -= session.bytes

    def _make_room(self) -> None:
        """Let go of what was used longest ago until the rest fits. How many are open is the engine's limit."""
        while self.bytes > self._bytes_max and self._held:
            place = next(iter(self._held))
            self._let_go(place, self._sessions[place])

    def _let_go(self, place: Place, session: Held) -> None:
        log.debug("session held no longer", extra={"session": place[1], "tenant": place[0] or None})
        del self._held[place]
        self.bytes -= session.bytes
        session.tokens, session.branches = None, None
        session.turn_ends, session.last = array("q"), None
        self.bytes += session.bytes
        for key in [key for key, turn in self._collecting.items() if turn.place == place]:
            self._collecting.pop(key).output.clear()

    # -- another engine -------------------------------------------------------------------------------------------

    def note_engine_gone(self) -> None:
        """What was in flight is over, and nothing of it was committed as far as any client knows."""
        self._turns.clear()
        self._collecting.clear()
        operations, self._operations = self._operations, {}
        for _, operation in operations.values():
            if isinstance(operation, DropTurn | CloseSession):
                self.follow(operation)
        for place in [place for place, session in self._sessions.items() if session.closing]:
            self._remove(place)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore, nor to call lost."""
        return not self._sessions

    async def restore(self, ask: Ask) -> None:
        """Open every session again in a new engine, oldest use first; those that are not held, or refused, are lost.

        ask: sends an operation to the engine and returns its reply's value, or raises UserError. Raises NotReady if
        that engine is gone as well: nothing is lost for that, the next one can be asked.
        """
        for place in [place for place in self._sessions if place not in self._held]:
            self._lose(place, "its history was not held")
        restored = 0
        for portion in _portions([(place, self._sessions[place]) for place in self._held]):
            for place, error in await _ask_all(ask, portion):
                if error is None:
                    restored += 1
                elif isinstance(error, NotReady):
                    raise error
                elif place in self._held:  # else it was closed meanwhile
                    self._lose(place, error.message)
        self.restored_total += restored
        log.warning("sessions restored", extra={"sessions": restored, "lost": len(self._lost)})

    def _lose(self, place: Place, reason: str) -> None:
        self._remove(place)
        self.lost_total += 1
        self._lost[place] = None
        while len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]
        self.on_lost(place)
        log.warning("session lost", extra={"session": place[1], "tenant": place[0] or None, "reason": reason})


def _named(submit: Submit, done: Done) -> CommittedTurn | None:
    """The turn as it would be answered again; None if no client knows a name of it, or it said more than tokens."""
    if not submit.rid or submit.rid_drawn or submit.logprobs >= 0 or submit.prompt_logprobs_from >= 0:
        return None
    return CommittedTurn(rid=submit.rid, input=submit.tokens, done=done)


def _ends_within(ends: "array[int]", tokens: int) -> "array[int]":
    return array("q", [end for end in ends if end <= tokens])


def _portions(sessions: list[tuple[Place, Held]]) -> Iterator[list[tuple[Place, Held]]]:
    """Runs of sessions of about PORTION_BYTES."""
    portion: list[tuple[Place, Held]] = []
    portion_bytes = 0
    for place, session in sessions:
        portion.append((place, session))
        portion_bytes += session.bytes
        if portion_bytes >= PORTION_BYTES:
            yield portion
            portion, portion_bytes = [], 0
    if portion:
        yield portion


async def _ask_all(ask: Ask, portion: list[tuple[Place, Held]]) -> list[tuple[Place, UserError | None]]:
    """Send one portion, then wait for each reply; the error of each session, if it was refused."""
    replies = await asyncio.gather(*(ask(_restoring(held)) for _, held in portion), return_exceptions=True)
    outcomes: list[tuple[Place, UserError | None]] = []
    for (place, _), reply in zip(portion, replies, strict=True):
        if isinstance(reply, BaseException) and not isinstance(reply, UserError):
            raise reply
        outcomes.append((place, reply if isinstance(reply, UserError) else None))
    return outcomes


def _restoring(held: Held) -> Callable[[int], ToEngine]:
    assert held.tokens is not None
    tokens, turn_ends = bytes(held.tokens), tuple(held.turn_ends)
    nodes = held.branches.restoring() if held.branches else ()
    return lambda op: RestoreSession(
        op=op, opening=held.opening, tokens=tokens, turn_ends=turn_ends, last=held.last, nodes=nodes
    )
