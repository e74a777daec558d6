"""The exact check: tags against balances, and both against what every holder holds, page by page and row by row.

It compares identities, not sums: a total stays right while one page has two owners (H06). `check` looks at everything
and is for tests and audit level 2; `RollingAudit` looks at a few holders a step and covers all of them in turn.
"""

from array import array

import numpy as np

from sessile.contract.plan import SCRATCH_PAGE
from sessile.core.books import Books
from sessile.core.history import TOKEN_BYTES
from sessile.core.ledger import FREE, LIMBO, QUARANTINE, SCRATCH, TREE, Lease
from sessile.core.prefix import Node, Pin
from sessile.core.request import Phase, Request
from sessile.core.session import Session
from sessile.errors import AuditError
from sessile.units import Account

_HOLDERS_A_LOOK = 1


def check(books: Books) -> None:
    """Raise AuditError naming the first account, page, pin or row about which books and holders differ."""
    books.totals.audit_checks += 1
    try:
        _check_pages(books)
        _check_pins(books)
        _check_rows(books)
        _check_lengths(books)
        _check_sessions(books)
        _check_tenants(books)
    except AuditError:
        books.totals.audit_failures += 1
        raise


def _holdings(books: Books) -> list[tuple[Account, str, "array[int]"]]:
    """(account, holder's name, pages) of everybody who holds pages, QUARANTINE and SCRATCH aside."""
    ledger = books.ledger
    held: list[tuple[Account, str, array[int]]] = [(FREE, "the free list", ledger.free_stack)]
    held.extend((LIMBO, f"limbo until step {step}", pages) for step, pages in ledger.limbo_by_step())
    held.extend((TREE, f"tree node {node.serial}", node.pages) for node in books.tree.walk())
    for request in books.requests.values():
        if request.lease is not None:
            held.append((request.lease.account, f"request {request.key}", request.lease.pages))
    for session in books.lines():
        if session.parked is not None:
            held.append((session.parked.lease.account, f"session {session.id!r}", session.parked.lease.pages))
        if session.reserve is not None:
            held.append((session.reserve.account, f"the reserve of session {session.id!r}", session.reserve.pages))
    return held


def _check_pages(books: Books) -> None:
    ledger = books.ledger
    if ledger.lost:
        raise AuditError(f"a lease was lost: {ledger.lost[0]}")
    held = _holdings(books)
    tags = ledger.tags
    if tags[SCRATCH_PAGE] != SCRATCH:
        raise AuditError(f"page {SCRATCH_PAGE} should be SCRATCH but is tagged {ledger.name(int(tags[SCRATCH_PAGE]))}")
    counts = np.bincount(tags & 0xFFFFF, minlength=5)
    for fixed in (FREE, TREE, LIMBO, SCRATCH, QUARANTINE):
        if counts[fixed] != ledger.balance(fixed):
            raise AuditError(f"{ledger.name(fixed)} has a balance of {ledger.balance(fixed)} but {counts[fixed]} tags")
    accounts: dict[int, str] = {}
    joined, owed = array("i"), array("I")
    for account, holder, pages in held:
        joined.extend(pages)
        owed.extend(array("I", (account,)) * len(pages))
        if account > QUARANTINE:
            if account in accounts:
                raise AuditError(f"{holder} and {accounts[account]} hold the same account {account:#x}")
            accounts[account] = holder
            if ledger.balance(account) != len(pages):
                raise AuditError(f"{holder} holds {len(pages)} pages, its account says otherwise")
    for account, balance in ledger.open_accounts():
        if account not in accounts:
            raise AuditError(f"{ledger.name(account)} owns {balance} pages but nobody holds it")
    every, owners = np.frombuffer(joined, np.int32), np.frombuffer(owed, np.uint32)
    found = tags[every]
    if np.count_nonzero(found != owners):
        index = int(np.argmax(found != owners))
        raise AuditError(
            f"page {every[index]} is held by {ledger.name(int(owners[index]))} but tagged "
            f"{ledger.name(int(found[index]))}"
        )
    times = np.bincount(every, minlength=ledger.pages_total)
    # No holder's tag is SCRATCH or QUARANTINE, so if nothing is held twice and the count is right, all is held once.
    apart = int(counts[SCRATCH] + counts[QUARANTINE])
    if np.count_nonzero(times > 1) or len(every) + apart != ledger.pages_total:
        times[(tags == SCRATCH) | (tags == QUARANTINE)] += 1
        page = int(np.argmax(times != 1))
        raise AuditError(f"page {page} ({ledger.name(int(tags[page]))}) is held {times[page]} times")
    parked = sum(len(session.parked.lease) for session in books.lines() if session.parked is not None)
    if parked != books.parked_pages:
        raise AuditError(f"parked sessions hold {parked} pages, the running counter says {books.parked_pages}")


def _pins(books: Books) -> list[Pin]:
    pins = [request.pin for request in books.requests.values() if request.pin is not None]
    pins.extend(session.parked.pin for session in books.lines() if session.parked is not None)
    return pins


def _check_pins(books: Books) -> None:
    """Every lock in the tree has a known receipt, at any time, idle or not (H03, H21)."""
    hard: dict[int, int] = {}
    soft: dict[int, int] = {}
    for pin in _pins(books):
        counts = hard if pin.hard else soft
        pages: list[Node] = list(pin.path())
        for node in pages:
            counts[node.serial] = counts.get(node.serial, 0) + 1
        path = array("i")
        for node in reversed(pages):
            path.extend(node.pages)
        if path != pin.pages:
            raise AuditError(f"a receipt names pages {pin.pages[:8].tolist()}… but its path holds {path[:8].tolist()}…")
    hard_pages = nodes = 0
    for node in books.tree.walk():
        nodes += 1
        if node.hard != hard.get(node.serial, 0) or node.soft != soft.get(node.serial, 0):
            raise AuditError(
                f"tree node {node.serial} counts {node.hard} hard and {node.soft} soft pins, "
                f"its receipts are {hard.get(node.serial, 0)} and {soft.get(node.serial, 0)}"
            )
        if len(node.tokens) != len(node.pages) * books.limits.page_size * TOKEN_BYTES or not node.pages:
            raise AuditError(
                f"tree node {node.serial} has {len(node.tokens) // TOKEN_BYTES} tokens for {len(node.pages)} pages"
            )
        if node.hard:
            hard_pages += len(node.pages)
    if hard_pages != books.tree.hard_pages or nodes != books.tree.nodes:
        raise AuditError(
            f"the tree counts {books.tree.hard_pages} pinned pages in {books.tree.nodes} nodes; "
            f"there are {hard_pages} in {nodes}"
        )


def _check_rows(books: Books) -> None:
    rows = books.rows
    owners: dict[int, Request] = {}
    for request in (*books.requests.values(), *books.draining):
        if request.row is not None:
            if request.row in owners:
                raise AuditError(f"requests {request.key} and {owners[request.row].key} hold row {request.row}")
            owners[request.row] = request
            if rows.occupants[request.row] is not request:
                raise AuditError(f"request {request.key} holds row {request.row}, which has another occupant")
    free = sorted(rows.free_list)
    if len(free) + len(owners) != rows.rows_max or sorted((*free, *owners)) != list(range(rows.rows_max)):
        raise AuditError(f"{len(free)} rows are free and {len(owners)} held, of {rows.rows_max}")
    for request in books.requests.values():
        running = request.phase is Phase.RUNNING
        if running != (request.row is not None) or running != (request.lease is not None):
            raise AuditError(f"request {request.key} is {request.phase.name} with row {request.row}")
        if (request.phase is Phase.QUEUED) != (request in books.waiting):
            raise AuditError(f"request {request.key} is {request.phase.name} but the waiting line says otherwise")


def _check_lengths(books: Books) -> None:
    """settled ≤ planned ≤ allocated, and KV ≤ tokens - 1, for every running request."""
    rows, size = books.rows, books.limits.page_size
    for request in books.requests.values():
        row = request.row
        if row is None:
            continue
        assert request.pin is not None and request.lease is not None
        known = request.known_tokens + int(rows.filled[row])
        settled, planned = int(rows.settled[row]), int(rows.planned[row])
        pages = len(request.pin.pages) + len(request.lease)
        if not settled <= planned <= pages * size or settled > known - 1:
            raise AuditError(
                f"request {request.key}: settled {settled}, planned {planned}, allocated {pages * size}, known {known}"
            )
        if int(rows.pages[row]) != pages or int(rows.pinned[row]) != len(request.pin.pages):
            raise AuditError(f"request {request.key} has {pages} pages, its row says {int(rows.pages[row])}")
        if int(rows.known[row]) != known or len(request.pin.pages) * size > settled:
            raise AuditError(f"request {request.key} knows {known} tokens, its row {rows.known[row]}")


def _check_sessions(books: Books) -> None:
    size = books.limits.page_size
    for session in books.lines():
        turn = books.requests.get(session.turn) if session.turn is not None else None
        if session.turn is not None and (turn is None or turn.session is not session):
            raise AuditError(f"session {session.id!r} is busy with request {session.turn}, which is not its own")
        parked = session.parked
        if parked is None:
            continue
        if turn is not None and turn.phase is Phase.RUNNING:
            raise AuditError(f"session {session.id!r} holds KV while its turn runs")
        tokens = len(session.history) if turn is None else turn.known_tokens
        pages = len(parked.pin.pages) + len(parked.lease)
        if not 0 < parked.tokens <= tokens - 1 or not (pages - 1) * size < parked.tokens <= pages * size:
            raise AuditError(
                f"session {session.id!r} has KV of {parked.tokens} tokens on {pages} pages for {tokens} tokens"
            )


def _check_tenants(books: Books) -> None:
    """What each tenant has in flight and holds equals what its requests and sessions say."""
    counted = [[0, 0, 0, 0] for _ in books.tenants.all]
    for request in books.requests.values():
        figures = counted[request.tenant.index]
        figures[0] += 1
        figures[1] += request.input_tokens
    for session in books.lines():
        figures = counted[session.tenant.index]
        figures[2] += session.root is None
        figures[3] += len(session.history)
    for tenant, found in zip(books.tenants.all, counted, strict=True):
        noted = [tenant.requests, tenant.tokens, tenant.sessions, tenant.held_tokens]
        if noted != found:
            raise AuditError(f"tenant {tenant.policy.name!r} counts {noted} requests, tokens, sessions, held tokens; "
                             f"there are {found}")
    in_flight = sum(session.turns_in_flight for session in books.sessions.values())
    if in_flight != sum(session.root is not None and session.turn is not None for session in books.lines()):
        raise AuditError("branching sessions count other turns in flight than they have")
    if books.node_count != sum(len(session.nodes) for session in books.sessions.values()):
        raise AuditError(f"{books.node_count} turns of branching sessions are counted, there are others")
    if books.reserved_pages != sum(session.reserved_pages for session in books.reserving):
        raise AuditError(f"{books.reserved_pages} pages are reserved in all, sessions say otherwise")


def _lease(holder: Request | Session) -> Lease | None:
    if isinstance(holder, Request):
        return holder.lease
    return None if holder.parked is None else holder.parked.lease


class RollingAudit:
    """Audit level 1: a few holders a step, all of them in turn, at a cost that does not depend on their number."""

    def __init__(self) -> None:
        self._queue: list[Request | Session] = []

    def look(self, books: Books) -> None:
        """Check the next few holders' pages against the tags. Raises AuditError."""
        if not self._queue:
            self._queue = [*books.requests.values(), *books.lines()]
            books.totals.audit_checks += 1
        for _ in range(min(_HOLDERS_A_LOOK, len(self._queue))):
            holder = self._queue.pop()
            lease = _lease(holder)
            if lease is None or not len(lease):
                continue
            if not books.ledger.owns_all(lease):
                books.totals.audit_failures += 1
                raise AuditError(f"{books.ledger.name(lease.account)} holds pages that are tagged otherwise")
