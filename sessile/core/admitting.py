"""Admission: who of the waiting line starts in this step, with what KV, and whether the future has room for it.

Planning computes by counts: a request that does not fit is looked at again in the next step, with nothing to undo.
"""

import numpy as np

from sessile.core.admission import peak_pages
from sessile.core.books import Books
from sessile.core.groups import shared_tokens
from sessile.core.ledger import Lease
from sessile.core.marks import Mark
from sessile.core.planned import NO_ROWS, Planned, PromptPart
from sessile.core.prefix import Match, page_at
from sessile.core.request import Phase, Request
from sessile.core.reserving import spend
from sessile.core.rows import Column
from sessile.units import ceil_div

_LOOKS_MAX = 4
"""Requests that do not fit, looked at in one step: each costs a match, and a long line must not slow the step."""


class Admitter:
    """Admits waiting requests to a step. Holds no state but who turned out to need none."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.ended: list[Request] = []
        """Requests that were admitted with nothing left to compute; the machine ends them."""

    def admit(self, planned: Planned, budget: int) -> None:
        """Admit waiting requests, in the order of the line, while budget, rows and the estimate of the future allow.

        budget: tokens that the step has left.
        """
        books = self._books
        if not books.waiting or not books.rows.free_rows:
            return
        if len(planned.decodes) and not books.limits.mixed_chunk:
            return
        outlook = _Outlook(books)
        blocked: Request | None = None
        looks, left = 0, books.limits.admissions_max
        awaited: set[int] = set()
        # Who waits for its leader is passed over, and is nobody's reason not to be looked at.
        for request in books.waiting.first(books.limits.admissions_max + books.groups.requests):
            if budget <= 0 or not books.rows.free_rows or looks >= _LOOKS_MAX or not left:
                break
            if request in self.ended:
                continue  # An earlier look of this plan found all of its KV, which may have been reclaimed since.
            session = request.session
            if session is not None and session.parked is not None and session.parked.ready_step > books.settled_step:
                continue  # The previous turn still drains; it will have settled before the next plan (H60).
            source: Request | None = None
            if request.group >= 0:
                if request.group in awaited and not request.scores_left:
                    continue
                source = books.groups.source_of(request, books.rows, planned.bound)
                if source is None and self._waits_for_leader(request):
                    awaited.add(request.group)
                    continue
            left -= 1
            match = self._match(request)
            if match is not None and source is None and self._waits_for_prefix(request, match):
                continue
            part = self._admit_one(planned, request, match, source, budget, outlook)
            if part is None:
                looks += 1
                blocked = blocked or request
            else:
                budget -= part.count
                planned.tokens += part.count
                if blocked is not None:
                    books.waiting.note_overtaken(blocked)
                    books.marks[Mark.OVERTAKEN] += 1
            if blocked is not None and blocked.overtaken >= books.limits.overtakes_max:
                books.marks[Mark.OVERTAKEN_ENOUGH] += 1
                break
        if planned.bound:
            self._seat(planned)

    def _seat(self, planned: Planned) -> None:
        """Draw what the admitted requests were promised and set their rows' columns, all at once."""
        books = self._books
        for lease, pages in zip(planned.leases, planned.owed, strict=True):
            if pages:
                books.ledger.draw(lease, pages)
        planned.owed_pages = 0
        for request, source in planned.followers:
            self._copy_from(source, request)
        parts = planned.parts[-len(planned.bound) :]
        books.rows.seat(
            [part.row for part in parts],
            [part.request.row_start(part.start, part.end, part.samples, planned.step) for part in parts],
            [request.stop_ids for request in planned.bound],
        )

    def _copy_from(self, source: Request, request: Request) -> None:
        """Have the first page that a request owns begin as a copy of the source's: the rest of what they share."""
        books, size = self._books, self._books.limits.page_size
        assert request.lease is not None and request.pin is not None
        assert source.lease is not None and source.pin is not None
        kv_tokens = request.prompt_tokens - 1
        assert len(request.pin.pages) == kv_tokens // size
        page = page_at(source.pin, source.lease, kv_tokens // size)
        books.queue_copy(page, request.lease.pages[0], kv_tokens % size, ())
        books.marks[Mark.LEADER_COPIED] += 1

    def _match(self, request: Request) -> Match | None:
        """What the tree has for a request without KV of its own; None if its session kept some."""
        if request.session is not None and request.session.parked is not None:
            return None
        books = self._books
        size = books.limits.page_size
        pages = _pages_of_use(request, size)
        tokens = request.tokens(0, min(request.known_tokens, (pages + 1) * size))
        return books.tree.match(request.tenant.namespace, tokens, pages)

    def _waits_for_prefix(self, request: Request, match: Match) -> bool:
        """Whether a running request is computing the very next page; the wait is bounded."""
        books = self._books
        if not books.computing or match.node_pages < len(match.node.pages):
            return False
        size = books.limits.page_size
        if match.pages >= _pages_of_use(request, size) or request.share_waits >= books.limits.share_wait_steps:
            return False
        start = match.pages * size
        key = (match.node.serial, request.tokens(start, start + size))
        if key not in books.computing:
            return False
        request.share_waits += 1
        books.marks[Mark.SHARE_WAITED] += 1
        return True

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether another one of the group is computing what this one would compute: it runs, so the wait ends."""
        books = self._books
        leader = books.groups.leader_of(request)
        if leader is None:
            return False
        if leader.goal_tokens <= leader.prompt_tokens + 1 or request.scores_left:
            # One that ends with its prompt leaves nothing to copy from, and who scores its own copies nothing: full
            # pages are all that the one gives and the other takes.
            match = self._match(request)
            if match is None or match.pages >= _pages_of_use(request, books.limits.page_size):
                return False
        books.marks[Mark.LEADER_AWAITED] += 1
        return True

    def _admit_one(
        self,
        planned: Planned,
        request: Request,
        match: Match | None,
        source: Request | None,
        budget: int,
        outlook: "_Outlook",
    ) -> PromptPart | None:
        """Admit a request if it fits now and in the estimated future; else None, and nothing has changed."""
        books = self._books
        size = books.limits.page_size
        start, pages, shared = self._standing(request, match)
        if source is not None and match is not None:
            start = shared_tokens(request, match, size)
        known = request.known_tokens
        count = min(min(known, request.goal_tokens - 1) - start, budget)
        if count <= 0:
            # Nothing to compute (max_new_tokens = 0 on what is there already): it ends without a row.
            self.ended.append(request)
            request.note_admission(start)
            self._keep_found(request, match)
            return None
        alone = not planned.parts and not len(planned.decodes) and not books.rows.live.any()
        if not alone and not outlook.admits(request, shared):
            return None
        wanted = ceil_div(start + count, size) - pages
        spend(books, request, wanted)
        match = self._make_room(wanted + planned.owed_pages, request, match)
        free = books.ledger.free_pages - planned.owed_pages
        if free < wanted:
            if not alone or free <= 0:
                return None
            count = min(count, (pages + free) * size - start)
            wanted = free
        outlook.add(request, shared)
        lease = self._start(request, match, start)
        assert request.row is not None
        wanted = max(wanted, 0)
        part = PromptPart(request, request.row, start, count, start + count == known)
        planned.parts.append(part)
        planned.bound.append(request)
        if source is not None and start > pages * size:
            planned.followers.append((request, source))
        planned.leases.append(lease)
        planned.owed.append(wanted)
        planned.owed_pages += wanted
        return part

    def _keep_found(self, request: Request, match: Match | None) -> None:
        """Park what the tree has for a session's turn that needs no row: a reservation holds for it as for any KV."""
        books = self._books
        if request.session is not None and match is not None and match.pages:
            tokens = match.pages * books.limits.page_size
            books.park(request.session, books.ledger.open(), books.tree.pin(match), tokens)

    def _standing(self, request: Request, match: Match | None) -> tuple[int, int, int]:
        """(KV tokens, pages, pages of these that running rows share) that a request would start with."""
        if match is not None:
            return match.pages * self._books.limits.page_size, match.pages, match.pages - match.unpinned_pages
        session = request.session
        assert session is not None and session.parked is not None
        parked = session.parked
        shared = sum(len(node.pages) for node in parked.pin.path() if node.hard)
        return parked.tokens, len(parked.pin.pages) + len(parked.lease), shared

    def _make_room(self, pages: int, request: Request, match: Match | None) -> Match | None:
        """Reclaim what this admission needs without touching what it is about to read; returns the match anew."""
        books = self._books
        short = pages - books.ledger.free_pages
        if short <= 0:
            return match
        if match is None:
            books.reclaim(short, sparing=request.session)
            return None
        guard = books.tree.pin(match)
        books.reclaim(short)
        books.tree.unpin(guard, used=True)
        return self._match(request)

    def _start(self, request: Request, match: Match | None, start: int) -> Lease:
        """Give a request its row, its lease and its pin; `_seat` sets the row's columns."""
        books, session = self._books, request.session
        # What may find the books wrong comes first, while the request still stands in the line.
        if match is not None:
            pin, lease = books.tree.pin(match), books.ledger.open()
        else:
            assert session is not None
            parked = books.unpark(session)
            pin, lease = parked.pin, parked.lease.hand_over()
        row = books.rows.take(request)
        books.waiting.leave(request)
        books.waiting.note_admitted(request)
        request.pin, request.lease = pin, lease
        request.publishing = session is None or session.turns == 0
        request.note_admission(start)
        pinned = len(request.pin.pages)
        request.bound_pages = ceil_div(request.goal_tokens, books.limits.page_size) - pinned
        books.bound_pages += request.bound_pages
        request.row = row
        request.phase = Phase.RUNNING
        if request.publishing:
            books.share(request)
        return request.lease


def _pages_of_use(request: Request, size: int) -> int:
    """Pages of KV that a request could begin with, wherever they come from."""
    # KV ≤ tokens - 1: there is always a token left to run (H65).
    pages = (min(request.known_tokens, request.goal_tokens) - 1) // size
    # The first position to be scored needs the query before it.
    return min(pages, (request.first_score - 1) // size) if request.scores_left else pages


class _Outlook:
    """The future of the running rows, to which candidates are added one by one.

    First by the bound, a running sum: what fits even if everybody uses all they may needs no estimate. The estimate
    looks at every row, so it is made only when the bound does not fit.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._capacity = books.usable_pages - books.tree.hard_pages - books.kept_pages()
        self._held: Column | None = None
        self._growth: Column = NO_ROWS
        self._added: list[tuple[Request, int]] = []
        """Who was admitted in this step, with what it shares: not among the rows yet."""
        self._added_figures: list[tuple[int, int]] = []
        """Of the first of these: made when they are needed."""

    def admits(self, request: Request, shared: int) -> bool:
        """Whether the pool will do for this request beside all others. shared: pages that others read already."""
        books = self._books
        bound = ceil_div(request.goal_tokens, books.limits.page_size) - shared
        if books.bound_pages + bound <= self._capacity:
            return True
        if self._held is None:
            self._look_at_rows()
        assert self._held is not None
        self._added_figures.extend(self._figures(*each) for each in self._added[len(self._added_figures) :])
        added = np.array([*self._added_figures, self._figures(request, shared)], np.int64)
        held = np.concatenate((self._held, added[:, 0]))
        return peak_pages(held, np.concatenate((self._growth, added[:, 1])), self._capacity) <= self._capacity

    def add(self, request: Request, shared: int) -> None:
        """Count a request that is about to be admitted."""
        self._added.append((request, shared))

    def _look_at_rows(self) -> None:
        rows, size = self._books.rows, self._books.limits.page_size
        live = np.flatnonzero(rows.plannable)
        known = rows.known[live] + rows.pending[live]
        prompt = rows.prompt[live]
        remaining = self._books.forecast.remaining_tokens(
            known - prompt, rows.kv_goal[live] + 1 - prompt, rows.arrival[live]
        )
        held = np.maximum(rows.pages[live], -(-known // size))
        self._held = held - rows.pinned[live]
        self._growth = np.maximum(-(-(known + remaining) // size) - held, 0)

    def _figures(self, request: Request, shared: int) -> tuple[int, int]:
        """(pages held once its prompt is there, pages it is expected to grow by)."""
        size = self._books.limits.page_size
        known = request.known_tokens
        held = ceil_div(known, size)
        prompt = request.prompt_tokens
        remaining = self._books.forecast.remaining_of(known - prompt, request.goal_tokens - prompt, request.arrival)
        return held - shared, ceil_div(known + remaining, size) - held
