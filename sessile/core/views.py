"""What the core shows of itself: sessions to their owners, figures to the operator. Reads only."""

from heapq import nlargest
from itertools import islice

from sessile.contract.messages import (
    SessionPage,
    SessionView,
    SourceFigures,
    Stats,
    TenantFigures,
)
from sessile.contract.pool import PoolHolder, PoolView
from sessile.core.books import Books
from sessile.core.ledger import LIMBO, QUARANTINE, SCRATCH, TREE
from sessile.core.request import Phase, Request
from sessile.core.session import Session
from sessile.core.tenants import Tenant

_NS = 1_000_000_000
PHASES = ("idle", "queued", "running", "preempted", "closing")


def session_view(books: Books, session: Session) -> SessionView:
    """A session as its owner sees it. Of a branching one: the longest history, and the pages of all its turns."""
    lines = list(session.nodes.values()) if session.branching else [session]
    kv = [_kv_of(books, line) for line in lines]
    committed = max([len(line.history) for line in lines], default=0)
    return SessionView(
        id=session.id,
        tenant=session.tenant.policy.name,
        branching=session.branching,
        phase=_phase(session, _turns_of(books, lines)),
        tokens=committed,
        kv_tokens=max([min(tokens, max(0, committed - 1)) for tokens, _, _ in kv], default=0),
        own_pages=sum([own for _, own, _ in kv]),
        shared_pages=sum([shared for _, _, shared in kv]),
        turns=sum([line.turn is None for line in lines]) if session.branching else session.turns,
        opened_s=session.opened_ns / _NS,
        last_used_s=session.last_used_ns / _NS,
        idle_timeout_s=None if session.idle_timeout_ns is None else session.idle_timeout_ns / _NS,
        tokens_max=session.tokens_max,
        reserved_tokens=session.reserved_pages * books.limits.page_size,
        metadata=session.metadata,
    )


def _turns_of(books: Books, lines: list[Session]) -> list[Request]:
    return [books.requests[line.turn] for line in lines if line.turn is not None]


def _phase(session: Session, turns: list[Request]) -> str:
    """The phase of a session with these turns in flight."""
    if session.closing:
        return "closing"
    if not turns:
        return "idle"
    if any([turn.phase is Phase.RUNNING for turn in turns]):
        return "running"
    return "preempted" if any([turn.preemptions for turn in turns]) else "queued"


def _kv_of(books: Books, line: Session) -> tuple[int, int, int]:
    """(tokens with KV, own pages, shared pages), parked or with the turn that runs."""
    if line.parked is not None:
        return line.parked.tokens, len(line.parked.lease), len(line.parked.pin.pages)
    request = books.requests[line.turn] if line.turn is not None else None
    if request is None or request.lease is None or request.pin is None or request.row is None:
        return 0, 0, 0
    return int(books.rows.settled[request.row]), len(request.lease), len(request.pin.pages)


def session_page(books: Books, tenant: Tenant, after_serial: int, limit: int) -> SessionPage:
    """Up to `limit` of a tenant's sessions opened after the one with that serial, in order of opening."""
    later = (
        session
        for session in books.sessions.values()
        if session.serial > after_serial and session.tenant is tenant
    )
    found = list(islice(later, limit + 1))
    views = [session_view(books, session) for session in found[:limit]]
    return SessionPage(views, len(found) > limit, tenant.sessions)


def sessions_by_phase(books: Books) -> dict[str, int]:
    """How many sessions are in each phase. Looks at requests only: there may be very many idle sessions."""
    turns: dict[int, list[Request]] = {}
    sessions: dict[int, Session] = {}
    for request in books.requests.values():
        if request.session is not None:
            session = request.session.root or request.session
            sessions[session.serial] = session
            turns.setdefault(session.serial, []).append(request)
    phases = dict.fromkeys(PHASES, 0)
    phases["idle"] = len(books.sessions) - len(sessions)
    for serial, session in sessions.items():
        phases[_phase(session, turns[serial])] += 1
    return phases


def stats(books: Books) -> Stats:
    """Every figure of this moment, and all totals."""
    ledger, tree, totals = books.ledger, books.tree, books.totals
    running = [request for request in books.requests.values() if request.phase is Phase.RUNNING]
    phases = sessions_by_phase(books)
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
        pages_sessions=books.parked_pages + sum(len(each.reserve) for each in books.reserving if each.reserve),
        pages_quarantine=ledger.balance(QUARANTINE),
        pages_scratch=ledger.balance(SCRATCH),
        page_size=books.limits.page_size,
        sessions_open=len(books.sessions),
        sessions_idle=phases["idle"],
        sessions_by_phase=phases,
        session_tokens=sum(tenant.held_tokens for tenant in books.tenants.all),
        tenants=[
            TenantFigures(each.policy.name, each.requests, each.tokens, each.sessions, each.held_tokens)
            for each in books.tenants.all
            if each.policy.name
        ],
        finished_total=dict(totals.finished),
        turns_committed_total=totals.turns_committed,
        turns_rolled_back_total=totals.turns_rolled_back,
        turns_replayed_total=totals.turns_replayed,
        forks_total=totals.forks,
        rewinds_total=totals.rewinds,
        pages_reserved=books.reserved_pages,
        prompt_tokens_total=totals.prompt_tokens,
        cached_tokens_total=totals.cached_tokens,
        computed_tokens_total=totals.computed_tokens,
        generated_tokens_total=totals.generated_tokens,
        preemptions_total=totals.preemptions,
        recomputed_tokens_total=totals.recomputed_tokens,
        reclaimed_tokens_total=totals.reclaimed_tokens,
        evicted_pages_total=totals.evicted_pages,
        demoted_pages_total=totals.demoted_pages,
        drafts_offered_total=totals.drafts_offered,
        drafts_accepted_total=totals.drafts_accepted,
        verifications_total=totals.verifications,
        sources=[SourceFigures(source, *figures) for source, figures in sorted(totals.sources.items())],
        audit_checks_total=totals.audit_checks,
        audit_failures_total=totals.audit_failures,
        audit_violations_total=dict(totals.violations),
        quarantined_pages_total=totals.quarantined_pages,
    )


def pool_view(books: Books, holders_max: int) -> PoolView:
    """Every page and row by owner. Walks over tree, requests and sessions: for an operator, not for a scraper."""
    ledger, tree = books.ledger, books.tree
    parked = sum(len(node.pages) for node in tree.walk() if node.soft and not node.hard)
    holders = _holders(books)
    named = nlargest(holders_max, holders, key=lambda holder: holder.own_pages)
    running = [holder for holder in holders if holder.key is not None]
    request_pages = sum(holder.own_pages for holder in running)
    owned_pages = sum(holder.own_pages for holder in holders)
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
        request_pages=request_pages,
        session_pages=owned_pages - request_pages,
        rows_total=books.rows.rows_max,
        requests_running=len(running),
        requests_waiting=len(books.waiting),
        requests_draining=len(books.draining),
        sessions_open=len(books.sessions),
        sessions_idle=sessions_by_phase(books)["idle"],
        session_tokens=sum(tenant.held_tokens for tenant in books.tenants.all),
        holders=named,
        rest_requests=len(running) - named_requests,
        rest_sessions=len(holders) - len(running) - (len(named) - named_requests),
        rest_own_pages=owned_pages - sum(holder.own_pages for holder in named),
    )


def _holders(books: Books) -> list[PoolHolder]:
    holders = [
        PoolHolder(
            key=request.key,
            session=None if request.session is None else request.session.id,
            tenant=request.tenant.policy.name,
            phase="running",
            own_pages=len(request.lease),
            shared_pages=len(request.pin.pages),
            row=request.row,
        )
        for request in books.requests.values()
        if request.lease is not None and request.pin is not None
    ]
    for line in books.lines():
        parked = line.parked
        reserve = 0 if line.reserve is None else len(line.reserve)
        if parked is not None or reserve:
            holders.append(
                PoolHolder(
                    session=line.id,
                    tenant=line.tenant.policy.name,
                    phase=_phase(line, _turns_of(books, [line])),
                    own_pages=reserve + (0 if parked is None else len(parked.lease)),
                    shared_pages=0 if parked is None else len(parked.pin.pages),
                    reserve_pages=reserve,
                )
            )
    return holders


