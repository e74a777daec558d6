"""What the core shows of itself: sessions to their owners, figures to the operator. Reads only."""

from itertools import islice

from sessile.contract.messages import SessionPage, SessionView, Stats
from sessile.core.books import Books
from sessile.core.ledger import LIMBO, QUARANTINE, SCRATCH, TREE
from sessile.core.request import Phase
from sessile.core.session import Session

_NS = 1_000_000_000


def session_view(books: Books, session: Session) -> SessionView:
    """A session as its owner sees it."""
    request = books.requests[session.turn] if session.turn is not None else None
    if session.closing:
        phase = "closing"
    elif request is None:
        phase = "idle"
    elif request.phase is Phase.RUNNING:
        phase = "running"
    else:
        phase = "preempted" if request.preemptions else "queued"
    committed = len(session.history)
    kv_tokens = own_pages = shared_pages = 0
    if session.parked is not None:
        parked = session.parked
        kv_tokens, own_pages, shared_pages = parked.tokens, len(parked.lease), len(parked.pin.pages)
    elif request is not None and request.lease is not None and request.pin is not None and request.row is not None:
        kv_tokens = int(books.rows.settled[request.row])
        own_pages, shared_pages = len(request.lease), len(request.pin.pages)
    return SessionView(
        id=session.id,
        phase=phase,
        tokens=committed,
        kv_tokens=min(kv_tokens, max(0, committed - 1)),
        own_pages=own_pages,
        shared_pages=shared_pages,
        turns=session.turns,
        opened_s=session.opened_ns / _NS,
        last_used_s=session.last_used_ns / _NS,
        idle_timeout_s=None if session.idle_timeout_ns is None else session.idle_timeout_ns / _NS,
        tokens_max=session.tokens_max,
        metadata=session.metadata,
    )


def session_page(books: Books, after_serial: int, limit: int) -> SessionPage:
    """Up to `limit` sessions opened after the one with that serial, in order of opening."""
    later = (session for session in books.sessions.values() if session.serial > after_serial)
    found = list(islice(later, limit + 1))
    views = [session_view(books, session) for session in found[:limit]]
    return SessionPage(views, len(found) > limit, len(books.sessions))


def stats(books: Books) -> Stats:
    """Every figure of this moment, and all totals."""
    ledger, tree, totals = books.ledger, books.tree, books.totals
    running = [request for request in books.requests.values() if request.phase is Phase.RUNNING]
    return Stats(
        steps_total=books.planned_step,
        settled_steps_total=books.settled_step,
        time_s=books.now_ns / _NS,
        rows_total=books.rows.rows_max,
        rows_held=books.rows.held_rows,
        requests_running=len(running),
        requests_waiting=len(books.waiting),
        requests_draining=len(books.draining),
        pages_total=ledger.pages_total,
        pages_free=ledger.free_pages,
        pages_limbo=ledger.balance(LIMBO),
        pages_tree=ledger.balance(TREE),
        pages_tree_pinned=tree.hard_pages,
        pages_requests=sum(len(request.lease) for request in running if request.lease is not None),
        pages_sessions=books.parked_pages,
        pages_quarantine=ledger.balance(QUARANTINE),
        pages_scratch=ledger.balance(SCRATCH),
        page_size=books.limits.page_size,
        sessions_open=len(books.sessions),
        sessions_idle=sum(session.turn is None for session in books.sessions.values()),
        session_tokens=sum(len(session.history) for session in books.sessions.values()),
        finished_total=dict(totals.finished),
        turns_committed_total=totals.turns_committed,
        turns_rolled_back_total=totals.turns_rolled_back,
        prompt_tokens_total=totals.prompt_tokens,
        cached_tokens_total=totals.cached_tokens,
        computed_tokens_total=totals.computed_tokens,
        generated_tokens_total=totals.generated_tokens,
        preemptions_total=totals.preemptions,
        recomputed_tokens_total=totals.recomputed_tokens,
        evicted_pages_total=totals.evicted_pages,
        demoted_pages_total=totals.demoted_pages,
        drafts_offered_total=totals.drafts_offered,
        drafts_accepted_total=totals.drafts_accepted,
        audit_checks_total=totals.audit_checks,
        audit_failures_total=totals.audit_failures,
    )
