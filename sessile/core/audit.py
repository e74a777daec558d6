"""The exact check: tags against balances, and both against what every holder holds, page by page and row by row.

It compares identities, not sums: a total stays right while one page has two owners (H06). `check` looks at everything
and is for tests and audit level 2; level 1 looks at a few places a step: see rolling.py. What is sound takes array
operations; who is at fault is looked for, holder by holder, only when they have found that something is wrong.
"""

from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sessile.contract.plan import SCRATCH_PAGE
from sessile.core.books import Books
from sessile.core.history import TOKEN_BYTES
from sessile.core.ledger import FREE, LIMBO, QUARANTINE, SCRATCH, TREE
from sessile.core.prefix import Node, Pin
from sessile.core.request import Phase, Request
from sessile.core.session import ParkedKv, Session
from sessile.errors import AuditError
from sessile.units import Account

_RUN_PAGES = 1 << 14


def check(books: Books) -> None:
    """Raise AuditError naming the first account, page, pin or row about which books and holders differ."""
    books.totals.audit_checks += 1
    try:
        nodes, lines = list(books.tree.walk()), list(books.lines())
        parked = [line.parked for line in lines if line.parked is not None]
        _check_pages(books, nodes, parked)
        _check_pins(books, nodes, parked)
        _check_rows(books)
        for request in books.requests.values():
            if request.row is not None:
                check_lengths(books, request)
        _check_sessions(books, lines)
        _check_indexes(books, lines)
        _check_tenants(books, lines)
    except AuditError:
        books.totals.audit_failures += 1
        raise


# -- pages --------------------------------------------------------------------------------------------------------


class Holding(NamedTuple):
    """Some pages that a holder lists. keys, sessions, nodes: the holder, as in AuditError."""

    account: Account
    holder: str
    pages: "array[int]"
    keys: tuple[int, ...] = ()
    sessions: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()


def holdings(books: Books) -> list[Holding]:
    """Everybody who holds pages, SCRATCH aside."""
    ledger = books.ledger
    held = [Holding(FREE, "the free list", ledger.free_stack)]
    held.append(Holding(QUARANTINE, "the quarantine", ledger.quarantined))
    held.extend(Holding(LIMBO, f"limbo until step {step}", pages) for step, pages in ledger.limbo_by_step())
    held.extend(
        Holding(TREE, f"tree node {node.serial}", node.pages, nodes=(node.serial,)) for node in books.tree.walk()
    )
    for request in books.requests.values():
        if request.lease is not None:
            lease = request.lease
            held.append(Holding(lease.account, f"request {request.key}", lease.pages, keys=(request.key,)))
    for session in books.lines():
        named = (session.serial,)
        if session.parked is not None:
            lease = session.parked.lease
            held.append(Holding(lease.account, f"session {session.id!r}", lease.pages, sessions=named))
        if session.reserve is not None:
            lease = session.reserve
            held.append(Holding(lease.account, f"the reserve of session {session.id!r}", lease.pages, sessions=named))
    return held


def _check_pages(books: Books, nodes: list[Node], parked: list[ParkedKv]) -> None:
    """Every page is listed by whom its tag names, and by nobody else, and every balance is the length of its lists."""
    ledger = books.ledger
    if ledger.lost:
        raise AuditError(f"a lease was lost: {ledger.lost[0]}")
    if not _pages_are_right(books, nodes, parked):
        held = holdings(books)
        _name_wrong_account(books, held)
        _name_wrong_page(books, held)
        raise AssertionError("the two ways to check pages disagree")
    pages = sum([len(kv.lease) for kv in parked])
    if pages != books.parked_pages:
        raise AuditError(
            f"parked sessions hold {pages} pages, the running counter says {books.parked_pages}", "counters"
        )


def _pages_are_right(books: Books, nodes: list[Node], parked: list[ParkedKv]) -> bool:
    """Whether every list holds pages of its account's tag, as many as its balance says, and all of them are the pool.

    nodes: all of the tree; parked: the KV of all sessions. If all pages but SCRATCH are listed, in as many listings as
    there are pages, each is listed once.
    """
    ledger = books.ledger
    leases = [request.lease for request in books.requests.values() if request.lease is not None]
    leases += [kv.lease for kv in parked]
    leases += [session.reserve for session in books.reserving if session.reserve is not None]
    sequences = {lease.account: lease.pages for lease in leases}
    limbo = [pages for _, pages in ledger.limbo_by_step()]
    lists = [ledger.free_stack, ledger.quarantined, *limbo, *[node.pages for node in nodes], *sequences.values()]
    accounts = [FREE, QUARANTINE, *[LIMBO] * len(limbo), *[TREE] * len(nodes), *sequences]
    counts = [len(pages) for pages in lists]
    first_node = 2 + len(limbo)
    first_lease = first_node + len(nodes)
    return (
        len(sequences) == len(leases)
        and sum(counts) == ledger.pages_total - 1 == ledger.balances_total - 1
        and (counts[0], counts[1]) == (ledger.balance(FREE), ledger.balance(QUARANTINE))
        and sum(counts[2:first_node]) == ledger.balance(LIMBO)
        and sum(counts[first_node:first_lease]) == ledger.balance(TREE)
        and ledger.balance(SCRATCH) == 1
        and counts[first_lease:] == [ledger.balance(account) for account in sequences]
        and _are_tagged(ledger.tags, accounts, lists)
    )


def _are_tagged(tags: npt.NDArray[np.uint32], accounts: list[Account], lists: "list[array[int]]") -> bool:
    """Whether all pages of each list have the tag of its account, and all of them but SCRATCH are listed."""
    seen = np.zeros(len(tags), np.bool_)
    seen[SCRATCH_PAGE] = tags[SCRATCH_PAGE] == SCRATCH
    # In runs that the processor's caches hold, and for which no memory has to be asked of the system.
    owners: list[Account] = []
    run: list[array[int]] = []
    room = _RUN_PAGES
    for account, pages in zip(accounts, lists, strict=True):
        for start in range(0, len(pages), _RUN_PAGES):
            part = pages[start : start + _RUN_PAGES] if len(pages) > _RUN_PAGES else pages
            owners.append(account)
            run.append(part)
            room -= len(part)
            if room <= 0:
                if not _run_is_tagged(tags, owners, run, seen):
                    return False
                owners, run, room = [], [], _RUN_PAGES
    return _run_is_tagged(tags, owners, run, seen) and bool(seen.all())


def _run_is_tagged(
    tags: npt.NDArray[np.uint32], owners: list[Account], run: "list[array[int]]", seen: npt.NDArray[np.bool_]
) -> bool:
    indices = np.frombuffer(b"".join(run), np.int32).astype(np.intp)
    seen[indices] = True
    expected = np.repeat(np.array(owners, np.uint32), [len(pages) for pages in run])
    return np.array_equal(tags[indices], expected)


def _name_wrong_account(books: Books, held: list[Holding]) -> None:
    """Raise AuditError about the first account that differs from its holder or from the tags, if one does."""
    ledger = books.ledger
    tags = ledger.tags
    if tags[SCRATCH_PAGE] != SCRATCH:
        raise AuditError(f"page {SCRATCH_PAGE} should be SCRATCH but is tagged {ledger.name(int(tags[SCRATCH_PAGE]))}")
    accounts: dict[int, Holding] = {}
    for each in held:
        if each.account > QUARANTINE:
            other = accounts.setdefault(each.account, each)
            if other is not each:
                raise AuditError(
                    f"{each.holder} and {other.holder} hold the same account {each.account:#x}",
                    keys=(*each.keys, *other.keys), sessions=(*each.sessions, *other.sessions),
                )  # fmt: skip
            if ledger.balance(each.account) != len(each.pages):
                raise AuditError(
                    f"{each.holder} holds {len(each.pages)} pages, its account says otherwise",
                    keys=each.keys, sessions=each.sessions,
                )  # fmt: skip
    for account, balance in ledger.open_accounts():
        if account not in accounts:
            raise AuditError(f"{ledger.name(account)} owns {balance} pages but nobody holds it")
    counts = np.bincount(tags & 0xFFFFF, minlength=5)
    for fixed in (FREE, TREE, LIMBO, SCRATCH, QUARANTINE):
        if counts[fixed] != ledger.balance(fixed):
            raise AuditError(f"{ledger.name(fixed)} has a balance of {ledger.balance(fixed)} but {counts[fixed]} tags")


def _name_wrong_page(books: Books, held: list[Holding]) -> None:
    """Raise AuditError about the first page that is listed by whom its tag does not name, or not exactly once."""
    ledger = books.ledger
    tags = ledger.tags
    for each in held:
        for page in each.pages:
            if tags[page] != each.account:
                raise AuditError(
                    f"page {page} is held by {ledger.name(each.account)} but tagged {ledger.name(int(tags[page]))}",
                    keys=each.keys, sessions=each.sessions, nodes=each.nodes,
                )  # fmt: skip
    times = np.bincount(np.concatenate([np.array(each.pages, np.int64) for each in held]), minlength=len(tags))
    times[SCRATCH_PAGE] += 1
    if (times != 1).any():
        page = int(np.argmax(times != 1))
        holders = [each for each in held if page in each.pages]
        raise AuditError(
            f"page {page} ({ledger.name(int(tags[page]))}) is held {times[page]} times",
            keys=tuple(key for each in holders for key in each.keys),
            sessions=tuple(serial for each in holders for serial in each.sessions),
            nodes=tuple(serial for each in holders for serial in each.nodes),
        )


# -- pins ---------------------------------------------------------------------------------------------------------


def readers(books: Books, pin: Pin) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keys of the requests and serials of the sessions that hold a pin."""
    keys = tuple(key for key, request in books.requests.items() if request.pin is pin)
    parked = ((session.serial, session.parked) for session in books.lines())
    return keys, tuple(serial for serial, kv in parked if kv is not None and kv.pin is pin)


def _check_pins(books: Books, nodes: list[Node], parked: list[ParkedKv]) -> None:
    """Every lock in the tree has a known receipt, at any time, idle or not (H03, H21)."""
    hard: dict[int, int] = {}
    soft: dict[int, int] = {}
    receipts = [request.pin for request in books.requests.values() if request.pin is not None]
    receipts += [kv.pin for kv in parked]
    for pin in receipts:
        node = pin.node
        if node is None or not _is_path(node, pin.pages):
            keys, sessions = readers(books, pin)
            raise AuditError(_receipt_fault(pin), "pins", keys=keys, sessions=sessions)
        counts = hard if pin.hard else soft
        counts[node.serial] = counts.get(node.serial, 0) + 1
    # Children before their parents: a node is locked by the receipts that end at it and by all that end below it.
    size = books.limits.page_size * TOKEN_BYTES
    hard_pages = 0
    for node in reversed(nodes):
        serial, parent = node.serial, node.parent
        locked, marked = hard.get(serial, 0), soft.get(serial, 0)
        if node.hard != locked or node.soft != marked:
            raise AuditError(
                f"tree node {serial} counts {node.hard} hard and {node.soft} soft pins, "
                f"its receipts are {locked} and {marked}",
                "pins",
            )
        count = len(node.pages)
        if len(node.tokens) != count * size or not count:
            tokens = len(node.tokens) // TOKEN_BYTES
            raise AuditError(f"tree node {serial} has {tokens} tokens for {count} pages", "pins", nodes=(serial,))
        assert parent is not None
        if locked:
            hard_pages += count
            hard[parent.serial] = hard.get(parent.serial, 0) + locked
        if marked:
            soft[parent.serial] = soft.get(parent.serial, 0) + marked
    hard_pins = sum([pin.hard for pin in receipts])
    if hard_pins != books.tree.hard_pins:
        raise AuditError(f"the tree counts {books.tree.hard_pins} hard pins, there are {hard_pins}", "counters")
    if hard_pages != books.tree.hard_pages or len(nodes) != books.tree.nodes:
        raise AuditError(
            f"the tree counts {books.tree.hard_pages} pinned pages in {books.tree.nodes} nodes; "
            f"there are {hard_pages} in {len(nodes)}",
            "counters",
        )


def _is_path(node: Node, pages: "array[int]") -> bool:
    """Whether these are the pages from the root to a node."""
    end = len(pages)
    above = node
    while above.parent is not None:
        start = end - len(above.pages)
        if start < 0 or pages[start:end] != above.pages:
            return False
        end = start
        above = above.parent
    return end == 0


def _receipt_fault(pin: Pin) -> str:
    if pin.node is None:
        return "a receipt was given back and is still held"
    path = array("i")
    for node in reversed(list(pin.path())):
        path.extend(node.pages)
    return f"a receipt names pages {pin.pages[:8].tolist()}… but its path holds {path[:8].tolist()}…"


# -- rows, lengths, sessions --------------------------------------------------------------------------------------


def _check_rows(books: Books) -> None:
    rows = books.rows
    owners: dict[int, Request] = {}
    for request in (*books.requests.values(), *books.draining):
        if request.row is not None:
            if request.row in owners:
                raise AuditError(f"requests {request.key} and {owners[request.row].key} hold row {request.row}", "rows")
            owners[request.row] = request
            if rows.occupants[request.row] is not request:
                raise AuditError(f"request {request.key} holds row {request.row}, which has another occupant", "rows")
    free = sorted(rows.free_list)
    if len(free) + len(owners) != rows.rows_max or sorted((*free, *owners)) != list(range(rows.rows_max)):
        raise AuditError(f"{len(free)} rows are free and {len(owners)} held, of {rows.rows_max}", "rows")
    for request in books.requests.values():
        running = request.phase is Phase.RUNNING
        if running != (request.row is not None) or running != (request.lease is not None):
            raise AuditError(f"request {request.key} is {request.phase.name} with row {request.row}", "rows")
        if (request.phase is Phase.QUEUED) != (request in books.waiting):
            message = f"request {request.key} is {request.phase.name} but the waiting line says otherwise"
            raise AuditError(message, "rows")


def check_lengths(books: Books, request: Request) -> None:
    """settled ≤ planned ≤ allocated, and KV ≤ tokens - 1, for a request that has a row."""
    rows, size, row = books.rows, books.limits.page_size, request.row
    assert row is not None
    if request.pin is None or request.lease is None:
        raise AuditError(f"request {request.key} runs without KV of its own", "lengths", keys=(request.key,))
    known = request.known_tokens + int(rows.filled[row])
    settled, planned = int(rows.settled[row]), int(rows.planned[row])
    pinned = len(request.pin.pages)
    pages = pinned + len(request.lease)
    message = ""
    if not settled <= planned <= pages * size or settled > known - 1:
        message = f": settled {settled}, planned {planned}, allocated {pages * size}, known {known}"
    elif int(rows.pages[row]) != pages or int(rows.pinned[row]) != pinned:
        message = f" has {pages} pages, its row says {rows.pages[row]}; {pinned} and {rows.pinned[row]} are pinned"
    elif int(rows.known[row]) != known or pinned * size > settled:
        message = f" knows {known} tokens, its row {rows.known[row]}"
    if message:
        raise AuditError(f"request {request.key}{message}", "lengths", keys=(request.key,))


def _check_sessions(books: Books, lines: list[Session]) -> None:
    size = books.limits.page_size
    for session in lines:
        turn = books.requests.get(session.turn) if session.turn is not None else None
        message = ""
        if session.turn is not None and (turn is None or turn.session is not session):
            message = f"is busy with request {session.turn}, which is not its own"
        elif (parked := session.parked) is not None:
            tokens = len(session.history) if turn is None else turn.known_tokens
            pages = len(parked.pin.pages) + len(parked.lease)
            if turn is not None and turn.phase is Phase.RUNNING:
                message = "holds KV while its turn runs"
            elif not 0 < parked.tokens <= tokens - 1 or not (pages - 1) * size < parked.tokens <= pages * size:
                message = f"has KV of {parked.tokens} tokens on {pages} pages for {tokens} tokens"
        if message:
            raise AuditError(f"session {session.id!r} {message}", "sessions", sessions=(session.serial,))


def _check_indexes(books: Books, lines: list[Session]) -> None:
    """An index has one holder, and knows no more tokens than that has."""
    for request in books.requests.values():
        if request.drafts.line is None:
            continue
        known = books.delivered_tokens(request)
        if request.drafts.line.index.tokens > known:
            raise AuditError(f"request {request.key} has {known} tokens, its index {request.drafts.line.index.tokens}",
                             "lengths", keys=(request.key,))  # fmt: skip
        if request.session is not None and request.session.index is not None:
            raise AuditError(f"request {request.key} and its session both hold an index", "sessions",
                             keys=(request.key,), sessions=(request.session.serial,))  # fmt: skip
    for session in lines:
        if session.index is not None and session.index.tokens > len(session.history):
            raise AuditError(f"session {session.id!r} has {len(session.history)} tokens, its index "
                             f"{session.index.tokens}", "sessions", sessions=(session.serial,))  # fmt: skip


def _check_tenants(books: Books, lines: list[Session]) -> None:
    """What each tenant has in flight and holds equals what its requests and sessions say."""
    counted = [[0, 0, 0, 0] for _ in books.tenants.all]
    for request in books.requests.values():
        figures = counted[request.tenant.index]
        figures[0] += 1
        figures[1] += request.input_tokens
    in_flight = 0
    for session in lines:
        figures = counted[session.tenant.index]
        if session.root is None:
            figures[2] += 1
        elif session.turn is not None:
            in_flight += 1
        figures[3] += len(session.history)
    for tenant, found in zip(books.tenants.all, counted, strict=True):
        noted = [tenant.requests, tenant.tokens, tenant.sessions, tenant.held_tokens]
        if noted != found:
            raise AuditError(f"tenant {tenant.policy.name!r} counts {noted} requests, tokens, sessions, held tokens; "
                             f"there are {found}", "counters")
    if in_flight != sum([session.turns_in_flight for session in lines]):
        raise AuditError("branching sessions count other turns in flight than they have", "counters")
    if books.node_count != len(lines) - len(books.sessions):
        raise AuditError(f"{books.node_count} turns of branching sessions are counted, there are others", "counters")
    unused = sum(len(session.reserve) for session in books.reserving if session.reserve is not None)
    if books.reserve_pages != unused:
        raise AuditError(f"{books.reserve_pages} reserved pages are counted as unused, there are {unused}", "counters")
    if books.reserved_pages != sum(session.reserved_pages for session in books.reserving):
        raise AuditError(f"{books.reserved_pages} pages are reserved in all, sessions say otherwise", "counters")
