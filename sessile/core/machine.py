"""The machine: one ordered stream of events in, plans and effects out; pure and deterministic.

Control flow only. What exists and who holds it is in books.py; what a step runs, in planning.py and assembly.py; what
a result changes, in settling.py; how a request ends, in ending.py.
"""

from collections import deque

import numpy as np

from sessile.contract.messages import (
    Batch,
    Cancel,
    CancelAll,
    CloseSession,
    Done,
    Flush,
    ForkSession,
    GetPool,
    GetSession,
    GetStats,
    ListSessions,
    OpenSession,
    Outcome,
    PoolView,
    Refusal,
    Reply,
    RewindSession,
    SessionPage,
    SessionTokens,
    SessionView,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    pack_tokens,
    unpack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan, StepResult
from sessile.core import audit, views
from sessile.core.assembly import Flight, assemble
from sessile.core.books import Books
from sessile.core.containment import guarded
from sessile.core.ending import close_session, end_request
from sessile.core.forking import fork_session, rewind_session
from sessile.core.history import NO_HISTORY, TOKEN_BYTES, History, Packed
from sessile.core.limits import Limits
from sessile.core.planning import Drafter, Planned, Planner
from sessile.core.request import Request
from sessile.core.session import Session
from sessile.core.settling import settle_step
from sessile.core.watch import Report, Watch
from sessile.errors import (
    DuplicateSession,
    HistoryMismatch,
    InvalidRequest,
    LimitReached,
    NotFound,
    SessionBusy,
    SessionClosed,
    TooLong,
    UserError,
)
from sessile.units import RequestKey

_NS = 1_000_000_000


class Machine:
    """Requests, sessions, pages and rows of one engine. At most two steps are launched and unsettled at any moment.

    Order of calls: `receive`* `tick` `plan` (`settle`) `complete` (`settle`) `take_effects`, as in engine/loop.py.
    """

    def __init__(self, limits: Limits, facts: ModelFacts, *, drafter: Drafter | None = None) -> None:
        self._limits = limits
        self._facts = facts
        self._books = Books(limits, facts)
        self._planner = Planner(self._books, drafter)
        self._drafter = drafter
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
                    self.append(message) if message.session is not None else self.submit(message)
                case Cancel():
                    self.cancel(message.key, message.message)
                case OpenSession():
                    self._reply(message.op, self.open(message))
                case CloseSession():
                    self._reply(message.op, self.close(message.session))
                case ForkSession():
                    self._reply(message.op, self.fork(message))
                case RewindSession():
                    self._reply(message.op, self.rewind(message))
                case GetSession():
                    self._reply(message.op, views.session_view(self._books, self._session(message.session)))
                case ListSessions():
                    self._reply(message.op, self.list_sessions(message.after, message.limit))
                case SessionTokens():
                    self._reply(message.op, self.session_tokens(message.session))
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
        """Enter a plain request into the line. Raises UserError, with nothing changed."""
        tokens = message.tokens
        if not tokens:
            raise InvalidRequest("the prompt is empty: send at least one token", param="input_ids")
        self._enter(message, NO_HISTORY, tokens, None)

    def append(self, message: Submit) -> None:
        """Enter the next turn of a session into the line. Raises UserError, with nothing changed."""
        assert message.session is not None
        session = self._session(message.session)
        if session.closing:
            raise SessionClosed(f"session {session.id!r}: close was requested", param="session_params.id")
        if session.turn is not None:
            raise SessionBusy(
                f"session {session.id!r} already has an active request. Wait for it, or abort it.",
                param="session_params.id",
            )
        if message.expect_tokens not in (-1, len(session.history)):
            raise HistoryMismatch(
                f"session {session.id!r} has {len(session.history)} tokens, not {message.expect_tokens}",
                param="session_params.expect_tokens",
            )
        tokens = message.tokens
        if len(session.history) and self._facts.bos_id is not None and tokens.startswith(self._bos):
            tokens = tokens[TOKEN_BYTES:]
        if not len(session.history) and not tokens:
            raise InvalidRequest("the first turn of a session cannot be empty", param="input_ids")
        request = self._enter(message, session.history, tokens, session)
        session.turn = RequestKey(request.key)
        if session.parked is not None:
            self._books.rank_parked(session)

    def cancel(self, key: int, message: str) -> None:
        """End a request as an abort; its tokens so far are facts, its turn is rolled back. Unknown keys are ignored."""
        request = self._books.requests.get(key)
        if request is not None:
            guarded(self._books, request, end_request, self._books, request, "abort", message=message)

    def cancel_all(self) -> Outcome:
        """End every request as an abort."""
        keys = list(self._books.requests)
        for key in keys:
            self.cancel(key, "aborted by the operator")
        return Outcome({"cancelled": len(keys)})

    def open(self, message: OpenSession) -> SessionView:
        """Open a streaming session. Raises UserError, with nothing changed."""
        timeout_s = message.idle_timeout_s
        if timeout_s is not None and not 0 < timeout_s <= 1e9:
            raise InvalidRequest("idle_timeout_s must be above 0 and at most 1e9 seconds", param="timeout")
        context = self._limits.context_tokens
        if message.tokens_max is not None and not 2 <= message.tokens_max <= context:
            raise InvalidRequest(f"max_tokens must be from 2 to {context}, the context length", param="max_tokens")
        longest = self._limits.sequence_tokens_max
        session = self._open(
            message.session,
            idle_timeout_ns=None if timeout_s is None else int(timeout_s * _NS),
            tokens_max=min(message.tokens_max or longest, longest),
            metadata=dict(message.metadata),
        )
        return views.session_view(self._books, session)

    def _open(
        self, session_id: str, *, idle_timeout_ns: int | None, tokens_max: int, metadata: dict[str, str]
    ) -> Session:
        books = self._books
        if session_id in books.sessions:
            raise DuplicateSession(f"session {session_id!r} already exists", param="session_id")
        if len(books.sessions) >= self._limits.sessions_max:
            raise LimitReached(f"{self._limits.sessions_max} sessions are open, which is the limit: close some first")
        books.session_serials += 1
        session = Session(
            session_id,
            books.session_serials,
            now_ns=books.now_ns,
            idle_timeout_ns=idle_timeout_ns,
            tokens_max=tokens_max,
            metadata=metadata,
        )
        books.sessions[session.id] = session
        books.start_idle_timer(session)
        return session

    def fork(self, message: ForkSession) -> SessionView:
        """Open a session that begins as an idle one does, sharing its KV. Raises UserError, with nothing changed."""
        parent = self._idle_session(message.session)
        tokens = self._place(parent, message.at_tokens, message.at_turn, "at")
        child = self._open(
            message.child,
            idle_timeout_ns=parent.idle_timeout_ns,
            tokens_max=parent.tokens_max,
            metadata=dict(parent.metadata),
        )
        fork_session(self._books, parent, child, tokens)
        return views.session_view(self._books, child)

    def rewind(self, message: RewindSession) -> SessionView:
        """Cut an idle session's history and KV. Raises UserError, with nothing changed."""
        session = self._idle_session(message.session)
        if message.to_tokens is None and message.to_turn is None:
            raise InvalidRequest("give to_tokens or to_turn", param="to_tokens")
        rewind_session(self._books, session, self._place(session, message.to_tokens, message.to_turn, "to"))
        return views.session_view(self._books, session)

    def _idle_session(self, session_id: str) -> Session:
        session = self._session(session_id)
        if session.closing:
            raise SessionClosed(f"session {session.id!r}: close was requested")
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

    def close(self, session_id: str) -> Outcome:
        """Close a session, at the end of its turn if one is in flight (H23). Raises NotFound."""
        session = self._session(session_id)
        if session.turn is not None:
            session.closing = True
            return Outcome({"closed": False, "deferred": True})
        close_session(self._books, session, "closed")
        return Outcome({"closed": True, "deferred": False})

    def list_sessions(self, after: str | None, limit: int) -> SessionPage:
        """Sessions in order of opening, behind `after`. Raises NotFound if `after` is none."""
        start = 0 if after is None else self._session(after).serial
        return views.session_page(self._books, start, limit)

    def session_tokens(self, session_id: str) -> Outcome:
        """The committed history of a session. Raises NotFound."""
        history = self._session(session_id).history
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

    # -- steps --------------------------------------------------------------------------------------------------

    def plan(self) -> Planned | None:
        """The early part of the next step; None if nothing can run now. At most one launched step may be unsettled."""
        assert len(self._flights) <= 1, "two steps are in flight already"
        self._flush_if_drained()
        if self._flushes:
            return None  # A flush waits for the last rows to drain; what arrived behind it waits for the flush.
        planned = self._planner.plan()
        for request in self._planner.ended:
            end_request(self._books, request, "length")
        self._planner.ended.clear()
        return planned

    def complete(self, planned: Planned) -> StepPlan | None:
        """The late part: what to launch. None if every row ended meanwhile. A late plan needs all steps settled."""
        assert not (planned.late and self._flights), "a late plan was completed before the step in flight settled"
        flight = assemble(self._books, planned, self._drafter)
        if flight is None:
            # Nothing will run under this number, so nothing can touch what was stamped with it.
            self._books.settled_step = planned.step
            self._books.drain()
            return None
        self._flights.append(flight)
        self._books.events.planned(flight.plan)
        return flight.plan

    def settle(self, result: StepResult) -> None:
        """Apply the result of the oldest launched step."""
        assert self._flights, "a step settled that was never launched"
        self._books.events.settled(result)
        settle_step(self._books, self._flights[0], result)
        self._flights.popleft()
        self._watch.settled()

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
        """Whether anything runs, waits or drains."""
        return bool(self._books.requests or self._books.draining or self._flights or self._flushes)

    def stats(self) -> Stats:
        """Live figures and totals."""
        return views.stats(self._books)

    def audit(self) -> None:
        """Check everything against everything; raises AuditError."""
        audit.check(self._books)

    def take_reports(self) -> list[Report]:
        """Violations that were contained since the last call, for the log."""
        return self._watch.take_reports()

    def event_lines(self) -> list[str]:
        """The last events, oldest first, one line each: what to log when the machine has failed."""
        return self._books.events.lines()

    # -- entering -----------------------------------------------------------------------------------------------

    def _session(self, session_id: str) -> Session:
        session = self._books.sessions.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id!r} does not exist", param="session_params.id")
        return session

    def _enter(self, message: Submit, base: History, tokens: Packed, session: Session | None) -> Request:
        """Check a request against every limit, then put it into the line."""
        books, limits = self._books, self._limits
        assert message.key not in books.requests, f"request key {message.key} is in use"
        self._check_tokens(tokens)
        longest = min(limits.sequence_tokens_max, session.tokens_max if session is not None else limits.context_tokens)
        new_tokens = len(tokens) // TOKEN_BYTES
        prompt = len(base) + new_tokens
        wanted = message.sampling.max_new_tokens
        if prompt + (0 if wanted == 0 else 1) > longest:
            raise TooLong(
                f"the input has {prompt} tokens, history included; with one token of output it exceeds the context "
                f"length of {longest} tokens",
                param="input_ids",
            )
        if len(books.waiting) >= limits.queue_max:
            raise LimitReached(f"{limits.queue_max} requests are waiting, which is the limit: try again later")
        if books.waiting_tokens + new_tokens > limits.queue_tokens_max:
            raise LimitReached(f"{books.waiting_tokens} tokens are waiting, which is the limit: try again later")
        goal = prompt + min(longest - prompt, longest if wanted is None else wanted)
        eos = () if message.sampling.ignore_eos else self._facts.eos_ids
        stop_ids = tuple(dict.fromkeys((*eos, *message.sampling.stop_token_ids)))
        request = Request(message, base, tokens, goal_tokens=goal, stop_ids=stop_ids, session=session)
        books.rows.provide_for(stop_ids, message.logprobs)
        books.arrivals += 1
        request.arrival = books.arrivals
        books.requests[request.key] = request
        books.enqueue(request)
        return request

    def _check_tokens(self, packed: Packed) -> None:
        tokens = unpack_tokens(packed)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._facts.vocab_size:
            wrong = int(tokens[np.argmax((tokens < 0) | (tokens >= self._facts.vocab_size))])
            raise InvalidRequest(
                f"token id {wrong} is outside the vocabulary of {self._facts.vocab_size} tokens", param="input_ids"
            )

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
        for session in books.sessions.values():
            if session.turn is None:
                books.drop_parked(session)
        books.reclaim(self._limits.pages_total)
        freed = books.ledger.free_pages + books.ledger.limbo_pages - before
        for op in self._flushes:
            self._reply(op, Outcome({"pages": freed}))
        self._flushes.clear()
