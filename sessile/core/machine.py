"""The machine: one ordered stream of events in, plans and effects out; pure and deterministic.

Control flow only. What exists and who holds it is in books.py; what a step runs, in planning.py and assembly.py; what
a result changes, in settling.py; how a request ends, in ending.py.
"""

from collections import deque
from collections.abc import Mapping

from sessile.contract.drafting import Drafter
from sessile.contract.grammar import Grammars
from sessile.contract.messages import (
    Batch,
    Cancel,
    CancelAll,
    CloseSession,
    Done,
    DropTurn,
    Flush,
    ForkSession,
    GetPool,
    GetSession,
    GetStats,
    ListSessions,
    OpenSession,
    Outcome,
    Refusal,
    Reply,
    RestoreSession,
    RewindSession,
    SessionPage,
    SessionTokens,
    SessionView,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    pack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan, StepResult
from sessile.contract.pool import PoolView
from sessile.core import audit, views
from sessile.core.assembly import Flight, are_same, assemble, goes_on, once_more
from sessile.core.books import Books
from sessile.core.cold import or_cold
from sessile.core.containment import abandon_plan, guarded
from sessile.core.drafting import tell_prompts
from sessile.core.ending import close_session, drop_turn, end_request
from sessile.core.entering import enter_plain, enter_turn, open_as_asked, open_session, restore_as_asked
from sessile.core.forking import fork_session, rewind_session
from sessile.core.limits import Limits
from sessile.core.marks import Mark
from sessile.core.planned import Planned
from sessile.core.planning import Planner
from sessile.core.session import Session
from sessile.core.settling import settle_step
from sessile.core.watch import Report, Watch
from sessile.errors import (
    InvalidRequest,
    NotFound,
    NotReady,
    SessionBusy,
    SessionClosed,
    UserError,
)

_NS = 1_000_000_000


class Machine:
    """Requests, sessions, pages and rows of one engine. At most two steps are launched and unsettled at any moment.

    Order of calls: `receive`* `tick` `plan` (`settle`) `complete` (`settle`) `take_effects`, as in engine/loop.py.
    """

    def __init__(
        self, limits: Limits, facts: ModelFacts, *, drafter: Drafter | None = None, grammars: Grammars | None = None
    ) -> None:
        self._limits = limits
        self._facts = facts
        self._books = Books(limits, facts, drafter if limits.drafts_max else None, grammars)
        self._planner = Planner(self._books)
        self._bos = pack_tokens([facts.bos_id or 0])
        self._flights: deque[Flight] = deque()
        self._flushes: list[int] = []
        self._watch = Watch(self._books)

    # -- events -------------------------------------------------------------------------------------------------

    def receive(self, message: ToEngine) -> None:
        """Take one message. A user's mistake becomes a Done or a Reply with an error; state is untouched then."""
        self._books.events.received(message)
        try:
            match message:
                case Submit():
                    self.submit(message)
                case Cancel():
                    self.cancel(message.key, message.message, if_waiting=message.if_waiting)
                case OpenSession():
                    self._reply(message.op, self.open(message))
                case CloseSession():
                    self._reply(message.op, self.close(message.tenant, message.session))
                case ForkSession():
                    self._reply(message.op, self.fork(message))
                case RewindSession():
                    self._reply(message.op, self.rewind(message))
                case RestoreSession():
                    self._reply(message.op, self.restore(message))
                case DropTurn():
                    self._reply(message.op, self.drop_turn(message))
                case GetSession():
                    session = self._session(message.tenant, message.session)
                    self._reply(message.op, views.session_view(self._books, session))
                case ListSessions():
                    self._reply(message.op, self.list_sessions(message.tenant, message.after, message.limit))
                case SessionTokens():
                    self._reply(message.op, self.session_tokens(message.tenant, message.session))
                case CancelAll():
                    self._reply(message.op, self.cancel_all())
                case Flush():
                    self.flush(message.op)
                case GetStats():
                    self._reply(message.op, self.stats())
                case GetPool():
                    self._reply(message.op, views.pool_view(self._books, message.holders))
                case Shutdown():
                    raise AssertionError("shutting down is the engine loop's affair")
        except UserError as error:
            self._refuse(message, error)

    def submit(self, message: Submit) -> None:
        """Enter a plain request or the next turn of a session into the line. Raises UserError, with nothing changed."""
        if message.session is None:
            enter_plain(self._books, message)
        else:
            enter_turn(self._books, message, self._session(message.tenant, message.session))

    def cancel(self, key: int, message: str, *, if_waiting: bool = False) -> None:
        """End a request as an abort; its tokens so far are facts, its turn is rolled back. Unknown keys are ignored.

        if_waiting: leave one alone that was ever admitted, or waits for one of its group that was; refuse any other.
        """
        request = self._books.requests.get(key)
        if request is None or (if_waiting and self._books.groups.has_begun(request)):
            return
        if if_waiting:
            code, status = NotReady.code, NotReady.status
            guarded(
                self._books, request, end_request, self._books, request, "error",
                message=message, status=status, code=code,
            )  # fmt: skip
        else:
            guarded(self._books, request, end_request, self._books, request, "abort", message=message)

    def cancel_all(self) -> Outcome:
        """End every request as an abort."""
        keys = list(self._books.requests)
        for key in keys:
            self.cancel(key, "aborted by the operator")
        return Outcome({"cancelled": len(keys)})

    def open(self, message: OpenSession) -> SessionView:
        """Open a session. Raises UserError, with nothing changed."""
        return views.session_view(self._books, open_as_asked(self._books, message))

    def restore(self, message: RestoreSession) -> SessionView:
        """Open a session with the history that it had in another engine. Raises UserError, with nothing changed."""
        return views.session_view(self._books, restore_as_asked(self._books, message))

    def fork(self, message: ForkSession) -> SessionView:
        """Open a session that begins as an idle one does, sharing its KV. Raises UserError, with nothing changed."""
        parent = self._idle_session(message.tenant, message.session)
        tokens = self._place(parent, message.at_tokens, message.at_turn, "at")
        child = open_session(
            self._books,
            message.child,
            parent.tenant,
            idle_timeout_ns=parent.idle_timeout_ns,
            tokens_max=parent.tokens_max,
            metadata=dict(parent.metadata),
        )
        fork_session(self._books, parent, child, tokens)
        self._books.totals.forks += 1
        return views.session_view(self._books, child)

    def rewind(self, message: RewindSession) -> SessionView:
        """Cut an idle session's history and KV. Raises UserError, with nothing changed."""
        session = self._idle_session(message.tenant, message.session)
        if message.to_tokens is None and message.to_turn is None:
            raise InvalidRequest("give to_tokens or to_turn", param="to_tokens")
        rewind_session(self._books, session, self._place(session, message.to_tokens, message.to_turn, "to"))
        return views.session_view(self._books, session)

    def drop_turn(self, message: DropTurn) -> Outcome:
        """Forget a finished turn of a branching session. Raises UserError, with nothing changed."""
        session = self._session(message.tenant, message.session)
        if not session.branching:
            raise InvalidRequest(f"session {session.id!r} is a streaming session: rewind it to drop turns")
        node = session.nodes.get(message.rid)
        if node is None:
            raise NotFound(f"session {session.id!r} has no turn {message.rid!r}")
        if node.turn is not None:
            raise SessionBusy(f"turn {message.rid!r} has not finished. Wait for it, or abort it.")
        drop_turn(self._books, node)
        return Outcome({})

    def _idle_session(self, tenant: str, session_id: str) -> Session:
        """A streaming session that may be forked or rewound now."""
        session = self._session(tenant, session_id)
        if session.closing:
            raise SessionClosed(f"session {session.id!r}: close was requested")
        if session.branching:
            raise InvalidRequest(f"session {session.id!r} is branching: go on from any of its turns by rid")
        if session.turn is not None:
            raise SessionBusy(f"session {session.id!r} has an active request. Wait for it, or abort it.")
        return session

    def _place(self, session: Session, tokens: int | None, turn: int | None, prefix: str) -> int:
        """The length of history that a fork or rewind means."""
        if tokens is not None and turn is not None:
            raise InvalidRequest(f"give {prefix}_tokens or {prefix}_turn, not both", param=f"{prefix}_turn")
        if turn is not None:
            if not 0 <= turn <= session.turns:
                raise InvalidRequest(
                    f"{prefix}_turn must be from 0 to {session.turns}, the turns of the session", param=f"{prefix}_turn"
                )
            return session.turn_ends[turn - 1] if turn else 0
        length = len(session.history)
        if tokens is not None and not 0 <= tokens <= length:
            raise InvalidRequest(
                f"{prefix}_tokens must be from 0 to {length}, the tokens of the session", param=f"{prefix}_tokens"
            )
        return length if tokens is None else tokens

    def close(self, tenant: str, session_id: str) -> Outcome:
        """Close a session, at the end of its turns if any are in flight (H23). Raises NotFound."""
        session = self._session(tenant, session_id)
        if session.in_flight:
            session.closing = True
            return Outcome({"closed": False, "deferred": True})
        close_session(self._books, session, "closed")
        return Outcome({"closed": True, "deferred": False})

    def list_sessions(self, tenant: str, after: str | None, limit: int) -> SessionPage:
        """A tenant's sessions in order of opening, behind `after`. Raises NotFound if `after` is none."""
        start = 0 if after is None else self._session(tenant, after).serial
        return views.session_page(self._books, self._books.tenants.named(tenant), start, limit)

    def session_tokens(self, tenant: str, session_id: str) -> Outcome:
        """The committed history of a session. Raises NotFound, or InvalidRequest for a branching one."""
        session = self._session(tenant, session_id)
        if session.branching:
            raise InvalidRequest(f"session {session.id!r} is branching: it has no single history")
        history = session.history
        return Outcome({"tokens": history.slice(0, len(history))})

    def flush(self, op: int) -> None:
        """Drop all KV once nothing drains; sessions keep their tokens. Raises InvalidRequest while anything runs."""
        if self._books.requests:
            raise InvalidRequest(f"{len(self._books.requests)} requests are running or waiting: flush when idle")
        self._flushes.append(op)
        self._flush_if_drained()

    def tick(self, now_ns: int) -> None:
        """Time passes: it is an event like any other, and never runs backwards. Sessions idle too long expire."""
        books = self._books
        books.now_ns = max(books.now_ns, now_ns)
        deadline = books.next_deadline_ns()
        while deadline is not None and deadline <= books.now_ns:
            close_session(books, books.idle_deadlines[0][2], "expired")
            deadline = books.next_deadline_ns()

    def set_chunk_tokens(self, tokens: int) -> None:
        """Set the token budget of a step, 1 ≤ tokens ≤ limits.chunk_tokens: how the engine keeps steps short."""
        assert 1 <= tokens <= self._limits.chunk_tokens
        self._planner.budget_tokens = tokens

    def preempt(self, key: int) -> None:
        """Make a running request give way as if pages were short: it waits, and resumes. Others are left alone."""
        request = self._books.requests.get(key)
        if request is not None and request.row is not None and self._books.rows.plannable[request.row]:
            self._planner.preempt(request)

    def demote(self, tenant: str, session_id: str) -> int:
        """Let go of the KV that a session holds while no turn of it runs; returns its own pages. Raises NotFound."""
        session = self._session(tenant, session_id)
        pages = 0 if session.parked is None else len(session.parked.lease)
        or_cold(self._books, (session,), self._books.drop_parked, session)
        self._books.totals.demoted_pages += pages
        return pages

    # -- steps --------------------------------------------------------------------------------------------------

    def plan(self) -> Planned | None:
        """The early part of the next step; None if nothing can run now. At most one launched step may be unsettled."""
        assert len(self._flights) <= 1, "two steps are in flight already"
        self._watch.planning()
        self._flush_if_drained()
        if self._flushes:
            return None  # A flush waits for the last rows to drain; what arrived behind it waits for the flush.
        planned = self._planned()
        for request in self._planner.ended:
            end_request(self._books, request, "length")
        self._planner.ended.clear()
        return planned

    def _planned(self) -> Planned | None:
        """What the planner plans; if that fails and violations are contained, once more without whom it concerned."""
        try:
            return self._planner.plan()
        except Exception as error:
            if not self._limits.contain_violations:
                raise
            failure = f"{type(error).__name__}: {error}"
        # Outside of the handler: until it is left, the failed call's frames hold leases.
        self._books.failures.append(("plan", failure))
        if self._planner.unfinished is not None:
            abandon_plan(self._books, self._planner.unfinished)
        self._watch.planning()
        return self._planner.plan()

    def complete(self, planned: Planned) -> StepPlan | None:
        """The late part: what to launch. None if every row ended meanwhile. A late plan needs all steps settled."""
        assert not (planned.late and self._flights), "a late plan was completed before the step in flight settled"
        flight = self._flight_of(planned)
        if flight is None:
            # Nothing will run under this number, so nothing can touch what was stamped with it.
            self._books.settled_step = planned.step
            self._books.drain()
            return None
        self._flights.append(flight)
        self._books.events.planned(flight.plan)
        return flight.plan

    def _flight_of(self, planned: Planned) -> Flight | None:
        """The arrays of a step, from those of the one in flight where it only goes on."""
        if not self._flights or not goes_on(self._books, planned, self._flights[-1]):
            return assemble(self._books, planned)
        flight = once_more(planned, self._flights[-1])
        if self._limits.audit_level >= 2:
            anew = assemble(self._books, planned)
            assert anew is not None and are_same(flight, anew), f"step {planned.step} does not just go on"
        return flight

    def settle(self, result: StepResult) -> None:
        """Apply the result of the oldest launched step."""
        assert self._flights, "a step settled that was never launched"
        self._books.events.settled(result)
        settle_step(self._books, self._flights[0], result)
        self._flights.popleft()
        self._watch.settled()

    def look(self) -> None:
        """What can be done once a step, when nobody waits for its effects any more: the rolling audit, at level 1, and
        what drafts will be looked up in."""
        if self._flights:
            tell_prompts(self._books, self._flights[-1].parts)
        self._watch.look()

    def take_effects(self) -> Batch | None:
        """Everything to be told to the world since the last call, once; None if nothing."""
        return self._books.effects.take(self._books.settled_step)

    # -- views --------------------------------------------------------------------------------------------------

    @property
    def next_deadline_ns(self) -> int | None:
        """When `tick` has something to do even if no message comes."""
        return self._books.next_deadline_ns()

    @property
    def has_work(self) -> bool:
        """Whether anything runs, waits or drains, or a copy is due: its pages are not free before a plan carried it."""
        books = self._books
        return bool(books.requests or books.draining or self._flights or self._flushes or books.copies)

    def stats(self) -> Stats:
        """Live figures and totals."""
        return views.stats(self._books)

    @property
    def marks(self) -> Mapping[Mark, int]:
        """How often each rare branch was taken; read only."""
        return self._books.marks

    def audit(self) -> None:
        """Check everything against everything; raises AuditError."""
        audit.check(self._books)

    def take_reports(self) -> list[Report]:
        """Violations that were contained since the last call, for the log."""
        return self._watch.take_reports()

    def event_lines(self) -> list[str]:
        """The last events, oldest first, one line each: what to log when the machine has failed."""
        return self._books.events.lines()

    # -- answers ------------------------------------------------------------------------------------------------

    def _session(self, tenant: str, session_id: str) -> Session:
        """A session of this tenant: another's is not found (H55)."""
        session = self._books.sessions.get((tenant, session_id))
        if session is None:
            raise NotFound(f"session {session_id!r} does not exist", param="session_params.id")
        return session

    def _reply(self, op: int, value: SessionView | SessionPage | Stats | PoolView | Outcome) -> None:
        self._books.effects.reply(Reply(op, value))

    def _refuse(self, message: ToEngine, error: UserError) -> None:
        if isinstance(message, Submit):
            self._books.totals.finished["error"] += 1
            self._books.effects.done(
                Done(
                    key=message.key,
                    reason="error",
                    status=error.status,
                    code=error.code,
                    message=error.message,
                    param=error.param,
                )
            )
        else:
            assert not isinstance(message, Cancel | Shutdown)
            refusal = Refusal(error.status, error.code, error.message, error.param)
            self._books.effects.reply(Reply(message.op, None, refusal))

    def _flush_if_drained(self) -> None:
        books = self._books
        if not self._flushes or self._flights or books.draining:
            return
        before = books.ledger.free_pages + books.ledger.limbo_pages
        for session in books.lines():
            if session.turn is None:
                or_cold(books, (session,), books.drop_parked, session)
        books.reclaim(self._limits.pages_total)
        freed = books.ledger.free_pages + books.ledger.limbo_pages - before
        for op in self._flushes:
            self._reply(op, Outcome({"pages": freed}))
        self._flushes.clear()
