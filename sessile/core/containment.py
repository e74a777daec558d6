"""After a violation: whoever the books cannot be right about leaves, and the books are made anew from who is left.

The audit names them (`contain`), or a move does that finds a page not to be whose it should be: in settling or ending
one request (`guarded`), in a plan (`abandon_plan`), in the KV of an idle session (`or_cold`, in cold.py).

A request that is named ends with an error, its turn rolled back; a parked session goes cold: its tokens are the truth,
and are computed again. What they held goes to QUARANTINE, together with every page that nobody lists where its tag
says, until a check of everything has passed and each step that might touch the pages has settled. Then everything else
that the books say of who is left is counted anew: balances, pins, counters.
"""

from array import array
from collections.abc import Callable

from sessile.core.books import Books
from sessile.core.cold import abandon, go_cold
from sessile.core.ending import end_request
from sessile.core.ledger import TREE
from sessile.core.planned import Planned
from sessile.core.prefix import Node, Pin
from sessile.core.request import Phase, Request
from sessile.core.session import Session
from sessile.errors import AuditError
from sessile.units import RequestKey

ENDED_MESSAGE = "the server found its records of this request's memory to be wrong and ended it: try again"


def guarded(
    books: Books, request: Request, change: Callable[..., None], *arguments: object, **named: object
) -> None:
    """Make a change that is about one running request alone; where violations are contained, expel it if that fails.

    Sound as long as nobody was told of the request's end (H74): otherwise, and where they are not contained, the
    failure goes on.
    """
    failure = ""
    lease = request.lease
    try:
        change(*arguments, **named)
    except Exception as error:
        runs = request.phase is Phase.RUNNING and books.requests.get(request.key) is request
        if not books.limits.contain_violations or not runs:
            raise
        failure = f"request {request.key}: {type(error).__name__}: {error}"
    # Outside of the handler: until it is left, the failed call's frames hold a lease that they had taken over.
    if failure:
        books.failures.append(("row", failure))
        if lease is not None:
            abandon(books, lease)
        expel(books, request)


def drained(books: Books) -> None:
    """`Books.drain`; where violations are contained and it fails, what it had in hand belongs to nobody from now on."""
    failure = ""
    try:
        books.drain()
    except Exception as error:
        if not books.limits.contain_violations:
            raise
        failure = f"{type(error).__name__}: {error}"
    if failure:
        books.failures.append(("limbo", failure))


def expel(books: Books, request: Request) -> None:
    """End a running request as an error without touching what it holds; `restore` must follow."""
    session = request.session
    if request.lease is not None:
        abandon(books, request.lease)
        books.stop_sharing(request)
        books.bound_pages -= request.bound_pages
        request.lease = None
    request.pin = None
    if request.row is not None:
        books.rows.planned[request.row] = 0  # Its row may drain for a step, in which nobody may trust its figures.
    if session is not None:
        # Whatever an end that failed had done is undone: the turn is rolled back, not half committed.
        committed_tokens = len(session.history) - request.base_tokens
        if committed_tokens:
            books.totals.turns_committed -= 1
            session.tenant.held_tokens -= committed_tokens
            session.cut_history(session.history.fork(request.base_tokens), session.turn_ends)
        session.turn = RequestKey(request.key)
        go_cold(books, session)
    end_request(books, request, "error", message=ENDED_MESSAGE, status=500)


def abandon_plan(books: Books, planned: Planned) -> None:
    """Expel whoever a plan that failed half-way had given something; `restore` must follow.

    Nothing will run under its number: who was admitted has a row that no device knows, and pages that were drawn are in
    no device's table.
    """
    rows = books.rows
    touched = [row for row, _, _ in planned.runs] + planned.grown.tolist()
    if planned.is_counted:
        touched += planned.decodes.tolist() + [part.row for part in planned.parts]
    keys = [rows.occupant(row).key for row in touched] + [request.key for request in planned.bound]
    for request in books.requests.values():
        if request.phase is Phase.RUNNING and request.row is not None and not rows.live[request.row]:
            rows.seat([request.row], [request.row_start(0, 0, False, books.planned_step)], [request.stop_ids])
            keys.append(request.key)
    for key in dict.fromkeys(keys):
        request = books.requests[key]
        if request.row is not None:
            rows.last_step[request.row] = min(int(rows.last_step[request.row]), books.planned_step)
        expel(books, request)


def contain(books: Books, error: AuditError) -> None:
    """Expel whom the error names: requests, sessions' KV, tree nodes with all who read there. `restore` must follow."""
    for serial in error.nodes:
        node = next((node for node in books.tree.walk() if node.serial == serial), None)
        if node is not None:
            _cut(books, node)
    for key in error.keys:
        request = books.requests.get(key)
        if request is not None and request.phase is Phase.RUNNING:
            expel(books, request)
    for session in list(books.lines()):
        if session.serial in error.sessions:
            go_cold(books, session)
            _check_turn(books, session)


def _cut(books: Books, node: Node) -> None:
    """Take a node and all below it out of the tree, after everybody who reads there has left."""
    for request in list(books.requests.values()):
        if request.pin is not None and _reads(request.pin, node):
            expel(books, request)
    for session in books.lines():
        if session.parked is not None and _reads(session.parked.pin, node):
            go_cold(books, session)
    books.suspects.extend(node.pages)
    books.tree.cut(node)


def _reads(pin: Pin, node: Node) -> bool:
    return any([each is node for each in pin.path()])


def _check_turn(books: Books, session: Session) -> None:
    """The turn of a session is the request that says so, if there is one."""
    marked = None if session.turn is None else books.requests.get(session.turn)
    if session.turn is not None and (marked is None or marked.session is not session):
        turn = next((request for request in books.requests.values() if request.session is session), None)
        session.turn = None if turn is None else RequestKey(turn.key)
        books.start_idle_timer(session.root or session)


def _expel_who_shares(books: Books) -> None:
    """Whoever else lists a page of somebody who left may read what that one wrote there: it leaves as well."""
    left = 0
    while left < len(books.suspects):
        suspect = bytearray(books.limits.pages_total)
        for page in books.suspects:
            suspect[page] = 1
        left = len(books.suspects)
        for request in list(books.requests.values()):
            if request.lease is not None and any([suspect[page] for page in request.lease.pages]):
                expel(books, request)
        for session in books.lines():
            leases = [session.parked.lease if session.parked is not None else None, session.reserve]
            if any([suspect[page] for lease in leases if lease is not None for page in lease.pages]):
                go_cold(books, session)
        for node in list(books.tree.walk()):
            if any([suspect[page] for page in node.pages]):
                _cut(books, node)


def restore(books: Books) -> int:
    """Make the books anew from who is left; returns how many pages went to QUARANTINE."""
    _expel_who_shares(books)
    parked = [session.parked for session in books.lines() if session.parked is not None]
    pins = [request.pin for request in books.requests.values() if request.pin is not None]
    books.tree.restore(pins + [kv.pin for kv in parked])
    held = [(TREE, node.pages) for node in books.tree.walk()]
    leases = [request.lease for request in books.requests.values() if request.lease is not None]
    leases += [kv.lease for kv in parked]
    leases += [session.reserve for session in books.reserving if session.reserve is not None]
    held += [(lease.account, lease.pages) for lease in leases]
    pages = books.ledger.restore(held, books.suspects, books.planned_step)
    books.suspects = array("i")
    books.totals.quarantined_pages += pages
    _count_anew(books)
    return pages


def _count_anew(books: Books) -> None:
    """Every running counter of pages, turns and tenants."""
    lines = list(books.lines())
    books.parked_pages = sum(len(session.parked.lease) for session in lines if session.parked is not None)
    books.bound_pages = sum(
        request.bound_pages for request in books.requests.values() if request.phase is Phase.RUNNING
    )
    books.reserved_pages = sum(session.reserved_pages for session in books.reserving)
    books.reserve_pages = sum(len(session.reserve) for session in books.reserving if session.reserve is not None)
    books.node_count = sum(session.root is not None for session in lines)
    for session in books.sessions.values():
        session.turns_in_flight = sum(node.turn is not None for node in session.nodes.values())
    for tenant in books.tenants.all:
        tenant.requests = tenant.tokens = tenant.sessions = tenant.held_tokens = 0
    for request in books.requests.values():
        request.tenant.requests += 1
        request.tenant.tokens += request.input_tokens
    for session in lines:
        session.tenant.sessions += session.root is None
        session.tenant.held_tokens += len(session.history)
    books.tenants.active = sum(tenant.requests > 0 for tenant in books.tenants.all)
