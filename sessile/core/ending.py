"""The one way a request ends: finished, aborted, refused after all, failed (H09, H33).

Only "stop" and "length" commit a turn; every other end rolls the session back to where it was (H26, H27). Whatever the
reason and the phase, the session's right to be in flight goes back, pages go to their next holder or to LIMBO, and
exactly one Done goes out.
"""

from sessile.contract.messages import Done, SessionGone
from sessile.core.books import Books
from sessile.core.request import Phase, Request
from sessile.core.session import Session

COMMITS = ("stop", "length")


def end_request(
    books: Books,
    request: Request,
    reason: str,
    *,
    matched: int | bytes | None = None,
    kept_bytes: int = -1,
    message: str = "",
    status: int = 200,
) -> None:
    """End a request that is queued or running, commit or roll back its turn, and send its Done."""
    session = request.session
    commits = reason in COMMITS
    if request.phase is Phase.RUNNING:
        books.collect_output(request)
    if session is not None and commits:
        # History and KV length change together, here and nowhere else (H18, H26).
        session.history.append(request.delta + request.output.tobytes())
        session.turn_ends.append(len(session.history))
    if session is not None:
        assert session.turn == request.key, "a session's turn was ended by another request (H25)"
        session.turn = None
        session.last_used_ns = books.now_ns
    _take_kv(books, request, commits)
    _send_done(books, request, reason, matched, kept_bytes, message, status)
    del books.requests[request.key]
    if commits:
        books.forecast.finished(request.output_tokens, request.goal_tokens - request.prompt_tokens)
    if session is not None:
        if session.closing:
            close_session(books, session, "closed")
        else:
            books.start_idle_timer(session)


def _take_kv(books: Books, request: Request, commits: bool) -> None:
    """Move KV where it belongs after the end: a session keeps what its committed history covers, less one token."""
    session = request.session
    keep_tokens = max(0, len(session.history) - 1) if session is not None else 0
    if request.phase is Phase.QUEUED:
        books.dequeue(request)
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


def _send_done(
    books: Books, request: Request, reason: str, matched: int | bytes | None, kept_bytes: int, message: str, status: int
) -> None:
    session = request.session
    totals = books.totals
    totals.finished[reason] += 1
    if session is not None:
        totals.turns_committed += reason in COMMITS
        totals.turns_rolled_back += reason not in COMMITS
    books.events.ended(request.key, reason, request.output_tokens, message)
    cached = max(0, request.cached_tokens)
    totals.prompt_tokens += request.prompt_tokens
    totals.cached_tokens += cached
    books.effects.done(
        Done(
            key=request.key,
            reason=reason,
            matched=matched,
            kept_bytes=kept_bytes,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=cached,
            computed_tokens=request.computed_tokens,
            completion_tokens=request.output_tokens,
            preemptions=request.preemptions,
            session_tokens=len(session.history) if session is not None and reason in COMMITS else -1,
            status=status,
            message=message,
        )
    )


def close_session(books: Books, session: Session, reason: str) -> None:
    """Release all that a session holds and forget it; no turn may be in flight."""
    assert session.turn is None
    books.drop_parked(session)
    del books.sessions[session.id]
    if session.closing or reason == "expired":
        books.effects.gone(SessionGone(session.id, reason))
