"""What the core shows of itself: sessions to their owners, figures to the operator. Reads only."""

from heapq import nlargest
from itertools import islice

from sessile.contract.messages import PoolHolder, PoolView, SessionPage, SessionView, Stats
from sessile.core.books import Books
from sessile.core.ledger import LIMBO, QUARANTINE, SCRATCH, TREE
from sessile.core.request import Phase
from sessile.core.session import Session

_NS = 1_000_000_000


def session_phase(books: Books, session: Session) -> str:
    """"idle", "queued", "running", "preempted" or "closing"."""
    request = books.requests[session.turn] if session.turn is not None else None
    if session.closing:
        return "closing"
    if request is None:
        return "idle"
    if request.phase is Phase.RUNNING:
        return "running"
    return "preempted" if request.preemptions else "queued"


def session_view(books: Books, session: Session) -> SessionView:
    """A session as its owner sees it."""
    request = books.requests[session.turn] if session.turn is not None else None
    phase = session_phase(books, session)
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
        audit_violations_total=dict(totals.violations),
        quarantined_pages_total=totals.quarantined_pages,
    )


def pool_view(books: Books, holders_max: int) -> PoolView:
    """Every page and row by owner. Costs a walk over tree, requests and sessions: for an operator, not for a scraper."""
    ledger, tree, rows = books.ledger, books.tree, books.rows
    parked = sum(len(node.pages) for node in tree.walk() if node.soft and not node.hard)
    holders = _holders(books)
    named = nlargest(holders_max, holders, key=lambda holder: holder.own_pages)
    requests = sum(request.lease is not None for request in books.requests.values())
    named_requests = sum(holder.key is not None for holder in named)
    return PoolView(
        page_size=books.limits.page_size,
        pages_total=ledger.pages_total,
        free=ledger.free_pages,
        limbo=sorted((step, len(pages)) for step, pages in ledger.limbo_by_step()),
        tree_pinned=tree.hard_pages,
        tree_parked=parked,
        tree_unpinned=tree.unpinned_pages - parked,
        scratch=ledger.balance(SCRATCH),
        quarantine=ledger.balance(QUARANTINE),
        rows_total=rows.rows_max,
        rows_running=rows.held_rows - len(books.draining),
        rows_draining=len(books.draining),
        holders=named,
        rest_requests=requests - named_requests,
        rest_sessions=len(holders) - requests - (len(named) - named_requests),
        rest_own_pages=sum(holder.own_pages for holder in holders) - sum(holder.own_pages for holder in named),
    )


def _holders(books: Books) -> list[PoolHolder]:
    holders = [
        PoolHolder(
            key=request.key,
            session=None if request.session is None else request.session.id,
            phase="running",
            own_pages=len(request.lease),
            shared_pages=len(request.pin.pages),
            row=request.row,
        )
        for request in books.requests.values()
        if request.lease is not None and request.pin is not None
    ]
    holders += [
        PoolHolder(
            session=session.id,
            phase=session_phase(books, session),
            own_pages=len(session.parked.lease),
            shared_pages=len(session.parked.pin.pages),
        )
        for session in books.sessions.values()
        if session.parked is not None
    ]
    return holders
