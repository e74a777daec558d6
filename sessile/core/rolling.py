"""Audit level 1: now and then a look at a few places, all of them in turn, at a cost that does not depend on their
number.

A place is a list of pages: the free list, the quarantine, limbo, each sequence's, each tree node's; and each batch row
is one too. Every page that stays where it is is looked at once a round; one that moves was checked as it moved. What
is claimed of a page is true at the very moment of the look, so nothing that moves, splits, ends or closes between two
looks can raise a false alarm:

- a page that a place lists has the tag of that place's account;
- the page is not listed at the index, or in the tree node, where it was seen last, unless that is here;
- a list is as long as its account's balance; all balances, with the running counters beside them, are the pool.

So a page that nobody lists is found by what is missing in the sum, or by the page that stands in for it.
"""

from array import array

import numpy as np

from sessile.contract.plan import SCRATCH_PAGE
from sessile.core.audit import check_lengths
from sessile.core.books import Books
from sessile.core.history import TOKEN_BYTES
from sessile.core.ledger import FREE, LIMBO, QUARANTINE, SCRATCH, TREE
from sessile.core.prefix import Node, Pin
from sessile.core.request import Phase
from sessile.errors import AuditError
from sessile.units import Account, ceil_div

LOOK_STEPS = 8
"""Steps from one look to the next: much of what a look costs is to begin with it."""
ROUND_LOOKS = 563
"""Looks in which everything is looked at: 27 s of steps of 6 ms."""
LOOK_MIN = 128
"""Pages and places of a look, at least."""
ROW_COST = 16
"""What a row counts for: its figures take as long as so many pages."""
_FIXED_SLOTS = 5
_FROM_THE_END = 1 << 62

_STAGES = _FREE, _QUARANTINE, _SEQUENCES, _NODES, _SPLIT_NODES, _ROWS = range(6)
"""The nodes twice: what is split off a node meanwhile may get a place that was passed. Who was looked at is skipped."""


class RollingAudit:
    """Where the audit is in its round, and where it saw each page last. Lists are read from their ends, because that
    is where they change: what shifts into the part that is still to come is looked at once more, never left out.
    """

    def __init__(self, books: Books) -> None:
        pages_total = books.limits.pages_total
        self._books = books
        self._stage = _FREE
        self._place = 0
        """Slot of the sequence, place of the node, or row."""
        self._round = 1
        self._splits = 0
        """Splits that the tree had counted when the last pass over its nodes ended."""
        self._below = _FROM_THE_END
        """Of the place's list, what lies below this index is to come."""
        self._row_of: dict[Account, int] = {}
        """In which row an account was seen in this round."""
        self._seen_index = array("i", bytes(4 * pages_total))
        self._seen_node = array("i", [-1]) * pages_total

    @property
    def look_size(self) -> int:
        """Pages and places of a look, as they are now."""
        books = self._books
        places = books.ledger.slots + len(books.tree.places) + ROW_COST * books.rows.rows_max
        return max(LOOK_MIN, ceil_div(books.limits.pages_total + places, ROUND_LOOKS))

    def look(self) -> None:
        """Check the sums, then the next pages and places. Raises AuditError."""
        try:
            self._check_sums()
            left = self.look_size
            left -= self._look_at_limbo(left)
            while left > 0:
                left -= 1 + self._look_at_place(left)
                if self._stage == len(_STAGES):
                    self._stage = _FREE
                    self._round += 1
                    self._row_of.clear()
                    self._books.totals.audit_checks += 1
                    break
        except AuditError:
            self._stage, self._place, self._below = _FREE, 0, _FROM_THE_END
            self._books.totals.audit_failures += 1
            raise

    # -- sums ---------------------------------------------------------------------------------------------------

    def _check_sums(self) -> None:
        books = self._books
        ledger, rows = books.ledger, books.rows
        if ledger.lost:
            raise AuditError(f"a lease was lost: {ledger.lost[0]}")
        if ledger.tag_array[SCRATCH_PAGE] != SCRATCH:
            raise AuditError(f"page {SCRATCH_PAGE} is tagged {ledger.name(ledger.tag_array[SCRATCH_PAGE])}")
        free, quarantined, limbo = ledger.free_pages, ledger.balance(QUARANTINE), ledger.limbo_pages
        listed = sum([len(pages) for _, pages in ledger.limbo_by_step()])
        if (len(ledger.free_stack), len(ledger.quarantined), listed) != (free, quarantined, limbo):
            raise AuditError(
                f"FREE, QUARANTINE and LIMBO list {len(ledger.free_stack)}, {len(ledger.quarantined)} and {listed} "
                f"pages, their balances are {free}, {quarantined} and {limbo}"
            )
        running = int(np.count_nonzero(rows.live))
        # Sessions with a reservation may hold one while they are parked.
        if not running <= books.tree.hard_pins <= running + len(books.reserving):
            raise AuditError(f"the tree counts {books.tree.hard_pins} hard pins, {running} requests run", "pins")
        own = int(np.dot(rows.live, rows.pages - rows.pinned))
        parked = books.parked_pages + books.reserve_pages
        total = free + quarantined + limbo + ledger.balance(TREE) + 1 + parked + own
        if total != ledger.pages_total:
            raise AuditError(
                f"{total} pages are accounted for, {own} of them to running requests and {parked} to "
                f"parked sessions, of {ledger.pages_total}: some belong to an account that nobody holds"
            )

    # -- places -------------------------------------------------------------------------------------------------

    def _look_at_place(self, count: int) -> int:
        """Look at up to `count` pages of the next place; returns how many, and moves on behind its last one."""
        ledger = self._books.ledger
        if self._stage == _FREE:
            return self._look_at_list(FREE, ledger.free_stack, count)
        if self._stage == _QUARANTINE:
            return self._look_at_list(QUARANTINE, ledger.quarantined, count)
        if self._stage == _SEQUENCES:
            return self._look_at_sequence(count)
        if self._stage in (_NODES, _SPLIT_NODES):
            return self._look_at_node(count)
        self._look_at_row()
        return ROW_COST - 1

    def _next_stage(self) -> None:
        self._stage += 1
        self._place = _FIXED_SLOTS if self._stage == _SEQUENCES else 0
        self._below = _FROM_THE_END

    def _next_place(self) -> None:
        self._place += 1
        self._below = _FROM_THE_END

    def _look_at_limbo(self, count: int) -> int:
        """What waits now, as far as the count goes: most of it is gone when the next step settles."""
        tags = self._books.ledger.tag_array
        looked = 0
        for step, pages in self._books.ledger.limbo_by_step():
            part = pages[: count - looked]
            looked += len(part)
            for page in part:
                if tags[page] != LIMBO:
                    raise self._foreign(page, LIMBO, f"limbo until step {step}")
        return looked

    def _look_at_list(self, account: Account, pages: "array[int]", count: int) -> int:
        looked = self._look_down(account, pages, count)
        if not self._below:
            self._next_stage()
        return looked

    def _look_at_sequence(self, count: int) -> int:
        ledger = self._books.ledger
        if self._place >= ledger.slots:
            self._next_stage()
            return 0
        account, balance, pages = ledger.in_slot(self._place)
        if balance != len(pages):
            raise self._of_account(f"holds {len(pages)} pages, its account says {balance}", account)
        looked = self._look_down(account, pages, count)
        if not self._below:
            self._next_place()
        return looked

    def _look_down(self, account: Account, pages: "array[int]", count: int) -> int:
        """Look at up to `count` pages below `self._below`, from the end of a list on."""
        tags, seen_index = self._books.ledger.tag_array, self._seen_index
        stop = min(self._below, len(pages))
        start = max(0, stop - count)
        index = start
        for page in pages[start:stop]:
            if tags[page] != account:
                raise self._foreign(page, account, "")
            seen = seen_index[page]
            if seen != index:
                if seen < len(pages) and pages[seen] == page:
                    raise self._of_account(f"lists page {page} twice, at {seen} and {index}", account)
                seen_index[page] = index
            index += 1
        self._below = start
        return stop - start

    # -- tree nodes ---------------------------------------------------------------------------------------------

    def _look_at_node(self, count: int) -> int:
        places = self._books.tree.places
        if self._place >= len(places):
            if self._splits == self._books.tree.splits:
                self._stage = _SPLIT_NODES
            self._splits = self._books.tree.splits
            self._next_stage()
            return 0
        node = places[self._place]
        if node is None or node.looked == self._round:
            self._next_place()
            return 0
        if self._below == _FROM_THE_END:
            self._check_node(node)
        looked = self._look_down_node(node, count)
        if not self._below:
            node.looked = self._round
            self._next_place()
        return looked

    def _check_node(self, node: Node) -> None:
        """A node hangs where its tokens say, holds their KV, and is locked by no more than its parent is."""
        size = self._books.limits.page_size
        parent = node.parent
        message = ""
        if parent is None or parent.children.get(node.tokens[: size * TOKEN_BYTES]) is not node:
            message = "is not among its parent's children"
        elif len(node.tokens) != len(node.pages) * size * TOKEN_BYTES or not node.pages:
            message = f"has {len(node.tokens) // TOKEN_BYTES} tokens for {len(node.pages)} pages"
        elif parent.parent is not None and (node.hard > parent.hard or node.soft > parent.soft):
            message = f"counts {node.hard} hard and {node.soft} soft pins, its parent {parent.hard} and {parent.soft}"
        elif node.hard < 0 or node.soft < 0:
            message = f"counts {node.hard} hard and {node.soft} soft pins"
        if message:
            raise AuditError(f"tree node {node.serial} {message}", "pins", nodes=(node.serial,))

    def _look_down_node(self, node: Node, count: int) -> int:
        tags, seen_index, seen_node = self._books.ledger.tag_array, self._seen_index, self._seen_node
        places, place, pages = self._books.tree.places, self._place, node.pages
        stop = min(self._below, len(pages))
        start = max(0, stop - count)
        index = start
        for page in pages[start:stop]:
            if tags[page] != TREE:
                raise self._foreign(page, TREE, f"tree node {node.serial}", nodes=(node.serial,))
            if seen_node[page] != place or seen_index[page] != index:
                other = places[seen_node[page]] if 0 <= seen_node[page] < len(places) else None
                seen = seen_index[page]
                if other is not None and seen < len(other.pages) and other.pages[seen] == page:
                    serials = (node.serial,) if other is node else (node.serial, other.serial)
                    raise AuditError(f"page {page} is in the tree twice, in nodes {serials}", nodes=serials)
                seen_node[page] = place
                seen_index[page] = index
            index += 1
        self._below = start
        return stop - start

    # -- rows ---------------------------------------------------------------------------------------------------

    def _look_at_row(self) -> None:
        """Who runs in a row has KV of its own, as long as the row says, behind a pin that holds."""
        rows = self._books.rows
        row = self._place
        if row >= rows.rows_max:
            self._next_stage()
            return
        request = rows.occupants[row]
        if request is not None and request.phase is Phase.RUNNING:
            if request.row != row or self._books.requests.get(request.key) is not request:
                raise AuditError(f"request {request.key} occupies row {row}, but does not hold it", "rows")
            check_lengths(self._books, request)
            assert request.pin is not None and request.lease is not None
            other = rows.occupants[self._row_of.get(request.lease.account, row)]
            if other is not None and other is not request and other.lease is request.lease:
                raise AuditError(f"requests {request.key} and {other.key} hold the same account",
                                 keys=(request.key, other.key))  # fmt: skip
            self._row_of[request.lease.account] = row
            if not _holds(request.pin):
                raise AuditError(f"request {request.key} reads behind a pin that locks nothing", "pins",
                                 keys=(request.key,))  # fmt: skip
        self._next_place()

    # -- naming -------------------------------------------------------------------------------------------------

    def _foreign(self, page: int, account: Account, holder: str, nodes: tuple[int, ...] = ()) -> AuditError:
        ledger = self._books.ledger
        found = ledger.name(ledger.tag_array[page])
        message = f"holds pages that are tagged otherwise: page {page} belongs to {found}"
        if account > QUARANTINE:
            return self._of_account(message, account)
        return AuditError(f"{holder or ledger.name(account)} {message}", nodes=nodes)

    def _of_account(self, message: str, account: Account) -> AuditError:
        """An error that names who holds an account: looked for among all, because it comes to nobody's mind before."""
        books = self._books
        for request in books.requests.values():
            if request.lease is not None and request.lease.account == account:
                return AuditError(f"request {request.key} {message}", keys=(request.key,))
        for session in books.lines():
            leases = [session.reserve, session.parked.lease if session.parked is not None else None]
            if any(lease is not None and lease.account == account for lease in leases):
                return AuditError(f"session {session.id!r} {message}", sessions=(session.serial,))
        return AuditError(f"{books.ledger.name(account)} {message}")


def _holds(pin: Pin) -> bool:
    """Whether a hard receipt's node is in the tree and locked; what lies above it is locked at least as often."""
    node = pin.node
    return node is not None and pin.hard and (node.parent is None or node.hard > 0)
