"""The one way a request ends: finished, aborted, refused after all, failed (H09, H33).

Only "stop" and "length" commit a turn; every other end rolls the session back to where it was (H26, H27). Whatever the
reason and the phase, the session's right to be in flight goes back, pages go to their next holder or to LIMBO, and
exactly one Done goes out.
"""

from sessile.contract.messages import Done, SessionGone
from sessile.core.books import Books
from sessile.core.cold import or_cold
from sessile.core.drafting import end_line, remember
from sessile.core.marks import Mark
from sessile.core.request import Phase, Request
from sessile.core.reserving import release_reserve
from sessile.core.session import Session

COMMITS = ("stop", "length")
_ROLL_BACKS = {Phase.RUNNING: Mark.ROLLED_BACK_RUNNING, Phase.QUEUED: Mark.ROLLED_BACK_QUEUED}


def end_request(
    books: Books,
    request: Request,
    reason: str,
    *,
    matched: int | bytes | None = None,
    kept_bytes: int = -1,
    message: str = "",
    status: int = 200,
    code: str = "",
    keep: bool = False,
) -> None:
    """End a request that is queued or running, commit or roll back its turn, and send its Done.

    keep: commit what was delivered whatever the reason, because another turn goes on from it.
    """
    session = request.session
    commits = reason in COMMITS or keep
    if request.phase is Phase.RUNNING:
        books.collect_output(request)
    if session is not None:
        assert session.turn == request.key, "a session's turn was ended by another request (H25)"
        session.turn = None
        session.last_used_ns = books.now_ns
        if commits:
            _commit(books, request, session)
    phase = request.phase
    _take_kv(books, request, commits)
    if session is not None and not commits:
        books.totals.turns_rolled_back += 1
        books.marks[_ROLL_BACKS[phase]] += 1
    done = _done(request, reason, matched, kept_bytes, message, status, code, commits=commits)
    if request.drafts.line is not None:
        done = end_line(books, request, done)
    if request.drafts.remembered and reason in COMMITS:
        remember(books, request)
    _send(books, request, done, commits)
    del books.requests[request.key]
    books.groups.leave(request)
    books.tenants.leave(request.tenant, request.input_tokens)
    if reason in COMMITS:
        books.forecast.finished(request.output_tokens, request.goal_tokens - request.prompt_tokens)
    if session is not None:
        _leave_session(books, session, commits)


def _commit(books: Books, request: Request, session: Session) -> None:
    """History and KV length change together, here and nowhere else (H18, H26)."""
    session.history.append(request.delta + request.output.tobytes())
    session.turn_ends.append(len(session.history))
    session.input_end = request.prompt_tokens
    session.tenant.held_tokens += len(session.history) - request.base_tokens
    books.totals.turns_committed += 1


def _take_kv(books: Books, request: Request, commits: bool) -> None:
    """Move KV where it belongs after the end: a session keeps what its committed history covers, less one token."""
    session = request.session
    keep_tokens = max(0, len(session.history) - 1) if session is not None else 0
    if request.phase is Phase.QUEUED:
        books.waiting.leave(request)
        request.phase = Phase.ENDED
        if session is not None:
            books.cut_parked(session, keep_tokens)
            if session.parked is not None:
                books.rank_parked(session)
        return
    assert request.phase is Phase.RUNNING and request.row is not None
    if request.lease is not None:  # Who is expelled has none: see containment.py.
        settled = min(int(books.rows.settled[request.row]), request.known_tokens - 1)
        books.vacate(request, settled, keep_tokens, publish=commits)
    books.leave_row(request)


def _done(
    request: Request,
    reason: str,
    matched: int | bytes | None,
    kept_bytes: int,
    message: str,
    status: int,
    code: str,
    *,
    commits: bool,
) -> Done:
    session = request.session
    return Done(
        key=request.key,
        reason=reason,
        matched=matched,
        kept_bytes=kept_bytes,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=max(0, request.cached_tokens),
        computed_tokens=request.computed_tokens,
        completion_tokens=request.output_tokens,
        preemptions=request.preemptions,
        session_tokens=len(session.history) if session is not None and commits else -1,
        status=status,
        code=code,
        message=message,
    )


def _send(books: Books, request: Request, done: Done, commits: bool) -> None:
    """Count the end, send it, and keep the reply of a committed turn that has a name (H59)."""
    totals, session = books.totals, request.session
    totals.finished[done.reason] += 1
    totals.prompt_tokens += done.prompt_tokens
    totals.cached_tokens += done.cached_tokens
    if request.cached_tokens >= 0:
        totals.reclaimed_tokens += max(0, request.base_tokens - 1 - request.cached_tokens)
    books.events.ended(request.key, done.reason, done.completion_tokens, done.message)
    books.effects.done(done)
    if session is not None and commits:
        session.reply = request.stored_reply(done) if request.rid else None


def _leave_session(books: Books, session: Session, commits: bool) -> None:
    """What the end of a turn means for its session: it may close now, or begins to be idle."""
    root = session.root
    if root is not None:
        root.turns_in_flight -= 1
        root.last_used_ns = books.now_ns
        if not commits:
            _discard(books, session)
        session = root
    if session.in_flight:
        return
    if session.closing:
        close_session(books, session, "closed")
    else:
        books.start_idle_timer(session)


def discard_turns(books: Books, session: Session, origin: Session | None) -> None:
    """Drop every turn of a branching session that descends from `origin`, or all of them; what runs is aborted."""
    for node in [node for node in session.nodes.values() if origin is None or _descends(node, origin)]:
        if node.turn is not None:
            end_request(books, books.requests[node.turn], "abort", message="replaced by another turn")
        else:
            _discard(books, node)


def drop_turn(books: Books, node: Session) -> None:
    """Forget one finished turn of a branching session. Its children have all of its tokens: they go on from above.

    A child may have begun with more of this turn's tokens than this turn has in common with its own parent.
    """
    assert node.root is not None
    for child in node.root.nodes.values():
        if child.parent is node:
            child.parent, child.base_tokens = node.parent, min(child.base_tokens, node.base_tokens)
    _discard(books, node)


def _descends(node: Session, origin: Session) -> bool:
    above = node.parent
    while above is not None and above is not origin:
        above = above.parent
    return above is origin


def _discard(books: Books, node: Session) -> None:
    """Forget a node and all that it holds; no turn of it may be in flight."""
    assert node.turn is None and node.root is not None
    or_cold(books, (node,), books.drop_parked, node)
    node.index = None
    node.tenant.held_tokens -= len(node.history)
    del node.root.nodes[node.rid]
    books.node_count -= 1


def _let_go(books: Books, session: Session) -> None:
    books.drop_parked(session)
    release_reserve(books, session)


def close_session(books: Books, session: Session, reason: str) -> None:
    """Release all that a session holds and forget it; no turn may be in flight."""
    assert not session.in_flight
    discard_turns(books, session, None)
    or_cold(books, (session,), _let_go, books, session)
    _let_go(books, session)  # Where that failed, of the empty reserve of a session that is cold now.
    session.index = None
    del books.sessions[session.key]
    session.tenant.sessions -= 1
    session.tenant.held_tokens -= len(session.history)
    if session.closing or reason == "expired":
        books.effects.gone(SessionGone(session.id, reason, session.tenant.policy.name))
