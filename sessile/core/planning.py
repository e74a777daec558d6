"""What the next step runs: there is no prefill phase and no decode phase, only tokens whose KV is not there yet.

One budget of tokens a step goes to running rows that decode, then to partial prompts, then to admissions, each in
order of arrival. A shortage of pages is judged on free + limbo + reclaimable: what limbo covers makes rows sit out one
step; only what nothing covers preempts, and then the newest arrival, for the sake of an older one.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sessile.core.admission import peak_pages
from sessile.core.books import Books
from sessile.core.ledger import Lease
from sessile.core.prefix import Match
from sessile.core.request import Phase, Request
from sessile.core.rows import Column, Flags
from sessile.units import RowId, ceil_div

_LOOKS_MAX = 4
"""Requests that do not fit, looked at in one step: each costs a match, and a long line must not slow the step."""

_NO_ROWS: Column = np.empty(0, np.int64)
_NO_FLAGS: Flags = np.empty(0, np.bool_)
_NO_PAGES = array("i")


class Drafter(Protocol):
    """Proposes tokens that the model will verify. Must be a pure function of what it was told."""

    def limit(self, key: int) -> int:
        """Most drafts worth verifying for this request in the next step; asked early, when pages are set aside."""
        ...

    def draft(self, key: int, context: npt.NDArray[np.int32], limit: int) -> Sequence[int]:
        """At most `limit` tokens that may follow. context: the last tokens of the request (at most 64); asked late."""
        ...


@dataclass(slots=True)
class PromptPart:
    """A run of known tokens of one row: [start, start + count)."""

    request: Request
    row: RowId
    start: int
    count: int
    samples: bool

    @property
    def end(self) -> int:
        """Where the run ends."""
        return self.start + self.count

    @property
    def top(self) -> int:
        """The part's entry in StepPlan.logprob_tops."""
        return self.request.logprobs if self.samples else -1


class Planned:
    """The early part of a plan: rows, counts and pages are fixed, drafts are not.

    late: drafts are due, so the step in flight must settle before `Machine.complete`. decodes: rows that run one
    token each, with `draft_caps` drafts at most.
    """

    __slots__ = (
        "bound", "decodes", "draft_caps", "grown", "grown_pages", "grown_slots", "late", "leases", "owed", "owed_pages",
        "parts", "runs", "sampling", "step", "tokens",
    )  # fmt: skip

    def __init__(self, step: int) -> None:
        self.step = step
        self.decodes = _NO_ROWS
        self.sampling = _NO_FLAGS
        """bool[rows_max]: which rows sample in this step, without regard to drafts."""
        self.draft_caps: Column | None = None
        """None: no drafts."""
        self.parts: list[PromptPart] = []
        self.bound: list[Request] = []
        """Who is admitted. Their parts are the last ones of `parts`."""
        self.leases: list[Lease] = []
        """Those of `bound`."""
        self.owed: list[int] = []
        """Pages promised to each of `bound`, drawn together at the end of admission."""
        self.owed_pages = 0
        self.runs: list[tuple[int, int, array[int]]] = []
        """Page-table runs of rows that are not newly bound: (row, first slot, pages)."""
        self.grown = _NO_ROWS
        """Running rows that drew one page each: their table gets `grown_pages` at `grown_slots`."""
        self.grown_slots = _NO_ROWS
        self.grown_pages = _NO_PAGES
        self.late = False
        self.tokens = 0

    @property
    def is_empty(self) -> bool:
        """Whether no row runs."""
        return not len(self.decodes) and not self.parts


class Planner:
    """Chooses rows, token counts and pages. Holds no state of its own but the step of the last forced retraction."""

    def __init__(self, books: Books, drafter: Drafter | None) -> None:
        self._books = books
        self._drafter = drafter
        self._retracted_step = 0
        self._decoded_last = False
        self.budget_tokens = books.limits.chunk_tokens
        self.ended: list[Request] = []
        """Requests that were admitted with nothing left to compute; the machine ends them."""

    def plan(self) -> Planned | None:
        """The early part of the next step, with pages drawn and counters advanced; None if nothing can run now."""
        books = self._books
        books.drain()
        self._retract_by_force()
        planned = Planned(books.planned_step + 1)
        self._choose(planned)
        if planned.is_empty and not books.limits.mixed_chunk and self._decoded_last:
            # It was the prompts' turn, but none can run: let the decoding rows go on.
            self._decoded_last = False
            self._choose(planned)
        if planned.is_empty and not books.copies:
            return None  # A plan may hold copies alone: what was given up for them is free only behind it.
        self._offer_drafts(planned)
        self._advance(planned)
        assert planned.tokens <= self.budget_tokens, "the parts of a step exceed its budget (H15)"
        books.planned_step = planned.step
        books.forecast.stepped()
        self._decoded_last = bool(len(planned.decodes))
        return planned

    def _choose(self, planned: Planned) -> None:
        if self._choose_running(planned):
            self._admit(planned)

    # -- preemption ---------------------------------------------------------------------------------------------

    def _retract_by_force(self) -> None:
        every = self._books.limits.retract_every
        if every and self._books.planned_step - self._retracted_step >= every:
            victim = self._newest_running()
            # Only one that got further than the last time, or a forced retraction could undo all progress for ever.
            if victim is not None and self._books.rows.settled[victim.row] > victim.preempted_tokens:
                self._retracted_step = self._books.planned_step
                self._preempt(victim)

    def _newest_running(self) -> Request | None:
        rows = self._books.rows
        running = np.flatnonzero(rows.plannable)
        if not len(running):
            return None
        return rows.occupants[int(running[np.argmax(rows.arrival[running])])]

    def _preempt(self, victim: Request) -> None:
        """Preempt now, or, while a step that has the row is in flight, when it settles."""
        books = self._books
        row = victim.row
        assert row is not None
        books.rows.plannable[row] = False
        if books.rows.last_step[row] <= books.settled_step:
            books.preempt(victim)
        else:
            books.victims.append(victim)

    # -- running rows -------------------------------------------------------------------------------------------

    def _choose_running(self, planned: Planned) -> bool:
        """Share the budget among running rows, decoding first. Returns whether all of them got their pages."""
        rows = self._books.rows
        # Over whole columns, free rows included: cheaper than gathering the rows that run.
        ahead = rows.known + rows.pending
        ahead -= rows.planned
        ready = rows.planned < rows.kv_goal
        ready &= rows.plannable
        single = ahead == 1
        single &= ready
        decodes = single.nonzero()[0]
        single_count = len(decodes)
        prompts = _NO_ROWS
        if np.count_nonzero(ready) > single_count:
            prompts = (ready & ~single).nonzero()[0]
        elif not len(decodes):
            planned.sampling = single
            return True
        if not self._books.limits.mixed_chunk and len(decodes) and (len(prompts) or self._books.waiting):
            # Without mixed steps prompts and decoding take turns, so that neither starves.
            if self._decoded_last:
                decodes = _NO_ROWS
            else:
                prompts = _NO_ROWS
        budget = self._budget(len(decodes) > 0)
        if len(decodes) > budget:
            decodes = decodes[np.argsort(rows.arrival[decodes], kind="stable")][:budget]
        if len(decodes) < single_count:
            single[:] = False
            single[decodes] = True
        planned.decodes, planned.sampling = decodes, single
        budget -= len(decodes)
        for row in sorted(prompts.tolist(), key=rows.arrival.__getitem__):
            if budget <= 0:
                break
            request = rows.occupants[row]
            assert request is not None
            start = int(rows.planned[row])
            end = min(int(rows.known[row]), int(rows.kv_goal[row]))
            count = min(end - start, budget)
            planned.parts.append(PromptPart(request, RowId(row), start, count, False))
            budget -= count
        planned.tokens = self._budget(len(decodes) > 0) - budget
        return self._draw_for_running(planned)

    def _budget(self, decoding: bool) -> int:
        return min(self.budget_tokens, self._books.limits.mixed_chunk_tokens) if decoding else self.budget_tokens

    def _draw_for_running(self, planned: Planned) -> bool:
        """Draw the pages that running rows need in this step; rows that get none are taken out of the plan."""
        books, rows = self._books, self._books.rows
        size = books.limits.page_size
        full = rows.planned >= rows.pages * size
        full &= planned.sampling
        lacking = full.nonzero()[0]
        wants: list[tuple[int, RowId, int]] = []
        for part in planned.parts:
            pages = ceil_div(part.start + part.count, size) - int(rows.pages[part.row])
            if pages > 0:
                wants.append((int(rows.arrival[part.row]), part.row, pages))
        total = len(lacking) + sum([pages for _, _, pages in wants])
        if total > books.ledger.free_pages:
            # A full pool is the normal state of a cache: what nobody reads gives way before a row sits out a step.
            books.reclaim(total - books.ledger.free_pages)
        if total <= books.ledger.free_pages:
            self._draw_one_each(planned, lacking)
            for _, row, pages in wants:
                self._draw(planned, row, pages)
            return True
        wants.extend((int(rows.arrival[row]), RowId(row), 1) for row in lacking.tolist())
        self._draw_what_there_is(planned, sorted(wants))
        return False

    def _draw_one_each(self, planned: Planned, lacking: Column) -> None:
        rows, ledger = self._books.rows, self._books.ledger
        if not len(lacking):
            return
        occupants = rows.occupants
        leases = []
        for row in lacking.tolist():
            request = occupants[row]
            assert request is not None and request.lease is not None
            leases.append(request.lease)
        planned.grown = lacking
        planned.grown_slots = rows.pages[lacking]
        planned.grown_pages = ledger.draw_each(leases)
        rows.pages[lacking] += 1

    def _draw(self, planned: Planned, row: RowId, pages: int) -> None:
        rows = self._books.rows
        request = rows.occupants[row]
        assert request is not None and request.lease is not None
        drawn = self._books.ledger.draw(request.lease, pages)
        planned.runs.append((row, int(rows.pages[row]), drawn))
        rows.pages[row] += pages

    def _draw_what_there_is(self, planned: Planned, wants: list[tuple[int, RowId, int]]) -> None:
        """The rare branch: pages are short. Reclaim, wait for limbo, or preempt the newest for an older row."""
        books, rows = self._books, self._books.rows
        while True:
            wants = [want for want in wants if rows.plannable[want[1]]]
            total = sum(pages for _, _, pages in wants)
            coming = books.ledger.limbo_pages + self._pages_of_victims()
            books.reclaim(total - books.ledger.free_pages - coming)
            free = books.ledger.free_pages
            if total <= free + books.ledger.limbo_pages + self._pages_of_victims():
                break
            first_denied = next(w for i, w in enumerate(wants) if sum(p for _, _, p in wants[: i + 1]) > free)
            victim = self._newest_running()
            assert victim is not None
            if victim.row == first_denied[1]:
                break
            self._preempt(victim)
        short = set()
        for _, row, pages in wants:
            granted = min(pages, books.ledger.free_pages)
            if granted:
                self._draw(planned, row, granted)
            if granted < pages:
                short.add(row)
        size = books.limits.page_size
        kept = [row for row in planned.decodes.tolist() if rows.plannable[row] and row not in short]
        planned.decodes = np.array(kept, np.int64)
        planned.sampling[:] = False
        planned.sampling[planned.decodes] = True
        parts = []
        for part in planned.parts:
            part.count = min(part.count, int(rows.pages[part.row]) * size - part.start)
            if rows.plannable[part.row] and part.count > 0:
                parts.append(part)
        planned.parts = parts
        planned.tokens = len(kept) + sum(part.count for part in parts)

    def _pages_of_victims(self) -> int:
        """Pages that requests to be preempted at the next settle will give up."""
        rows = self._books.rows
        leaving = np.flatnonzero((rows.live == 1) & ~rows.plannable)
        return int((rows.pages[leaving] - rows.pinned[leaving]).sum())

    # -- admission ----------------------------------------------------------------------------------------------

    def _admit(self, planned: Planned) -> None:
        """Admit waiting requests in order of arrival while budget, rows and the estimate of the future allow."""
        books = self._books
        if not books.waiting or not books.rows.free_rows:
            return
        decoding = len(planned.decodes) > 0
        if decoding and not books.limits.mixed_chunk:
            return
        budget = self._budget(decoding) - planned.tokens
        outlook = _Outlook(books)
        blocked: Request | None = None
        looks = 0
        for request in books.waiting[: books.limits.admissions_max]:
            if budget <= 0 or not books.rows.free_rows or looks >= _LOOKS_MAX:
                break
            session = request.session
            if session is not None and session.parked is not None and session.parked.ready_step > books.settled_step:
                continue  # The previous turn still drains; it will have settled before the next plan (H60).
            match = self._match(request)
            if match is not None and self._waits_for_prefix(request, match):
                continue
            part = self._admit_one(planned, request, match, budget, outlook)
            if part is None:
                looks += 1
                blocked = blocked or request
            else:
                budget -= part.count
                planned.tokens += part.count
                if blocked is not None:
                    blocked.overtaken += 1
            if blocked is not None and blocked.overtaken >= books.limits.overtakes_max:
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
        parts = planned.parts[-len(planned.bound) :]
        books.rows.seat(
            [part.row for part in parts],
            [part.request.row_start(part.start, part.end, part.samples, planned.step) for part in parts],
            [request.stop_ids for request in planned.bound],
        )

    def _match(self, request: Request) -> Match | None:
        """What the tree has for a request without KV of its own; None if its session kept some."""
        if request.session is not None and request.session.parked is not None:
            return None
        books = self._books
        size = books.limits.page_size
        # KV ≤ tokens - 1: there is always a token left to run (H65).
        pages = (min(request.known_tokens, request.goal_tokens) - 1) // size
        # The first position to be scored needs the query before it; committed history has no scores.
        first_score = max(request.scores_from, 1, request.scored_tokens, request.base_tokens)
        if request.scores_from >= 0 and first_score < request.prompt_tokens:
            pages = min(pages, (first_score - 1) // size)
        tokens = request.tokens(0, min(request.known_tokens, (pages + 1) * size))
        return books.tree.match(request.namespace, tokens, pages)

    def _waits_for_prefix(self, request: Request, match: Match) -> bool:
        """Whether a running request is computing the very next page; the wait is bounded."""
        books = self._books
        if not books.computing or match.node_pages < len(match.node.pages):
            return False
        size = books.limits.page_size
        start = match.pages * size
        if start + size > request.known_tokens - 1 or request.share_waits >= books.limits.share_wait_steps:
            return False
        key = (match.node.serial, request.tokens(start, start + size))
        if key not in books.computing:
            return False
        request.share_waits += 1
        return True

    def _admit_one(
        self, planned: Planned, request: Request, match: Match | None, budget: int, outlook: "_Outlook"
    ) -> PromptPart | None:
        """Admit a request if it fits now and in the estimated future; else None, and nothing has changed."""
        books = self._books
        size = books.limits.page_size
        start, pages, shared = self._standing(request, match)
        known = request.known_tokens
        count = min(min(known, request.goal_tokens - 1) - start, budget)
        if count <= 0:
            # Nothing to compute (max_new_tokens = 0 on what is there already): it ends without a row.
            request.note_admission(start)
            if request not in self.ended:
                self.ended.append(request)
            return None
        alone = not planned.parts and not len(planned.decodes) and not books.rows.live.any()
        if not alone and not outlook.admits(request, shared):
            return None
        wanted = ceil_div(start + count, size) - pages
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
        planned.leases.append(lease)
        planned.owed.append(wanted)
        planned.owed_pages += wanted
        return part

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
        books.dequeue(request)
        if match is not None:
            request.pin = books.tree.pin(match)
            request.lease = books.ledger.open()
        else:
            assert session is not None
            parked = books.unpark(session)
            request.pin, request.lease = parked.pin, parked.lease.hand_over()
        request.publishing = session is None or session.turns == 0
        request.note_admission(start)
        pinned = len(request.pin.pages)
        request.bound_pages = ceil_div(request.goal_tokens, books.limits.page_size) - pinned
        books.bound_pages += request.bound_pages
        request.row = books.rows.take(request)
        request.phase = Phase.RUNNING
        if request.publishing:
            books.share(request)
        return request.lease

    # -- drafts and counters ------------------------------------------------------------------------------------

    def _offer_drafts(self, planned: Planned) -> None:
        """Set pages aside for drafts, out of what is free anyway: drafts fall to zero before anyone is preempted."""
        decodes = planned.decodes
        drafter, books = self._drafter, self._books
        if drafter is None or not books.limits.drafts_max or not len(decodes):
            return
        rows = books.rows
        size = books.limits.page_size
        budget = self._budget(True) - planned.tokens
        caps = np.zeros(len(decodes), np.int64)
        for index, row in enumerate(decodes.tolist()):
            after = int(rows.planned[row]) + 1
            cap = min(books.limits.drafts_max, budget, int(rows.kv_goal[row]) - after)
            if cap <= 0:
                continue
            cap = min(cap, drafter.limit(int(rows.key[row])))
            wanted = ceil_div(after + cap, size) - int(rows.pages[row])
            granted = min(wanted, books.ledger.free_pages)
            if granted > 0:
                self._draw(planned, row, granted)
            cap = min(cap, int(rows.pages[row]) * size - after)
            caps[index] = cap
            planned.tokens += cap
            budget -= cap
        planned.draft_caps = caps
        # Behind drafts in flight, a row's position is known only when they have settled.
        planned.late = bool(caps.any() or (rows.pending[decodes] > 1).any())

    def _advance(self, planned: Planned) -> None:
        """Count what is planned: from here on the step exists. Rows that were seated in it count it already."""
        rows, sampling = self._books.rows, planned.sampling
        rows.plan_one(sampling)
        np.putmask(rows.last_step, sampling, planned.step)
        if planned.draft_caps is not None:
            rows.planned[planned.decodes] += planned.draft_caps
            rows.pending[planned.decodes] += planned.draft_caps
        seated = len(planned.parts) - len(planned.bound)
        for part in planned.parts[:seated]:
            row = part.row
            part.samples = part.end == int(rows.known[row])
            rows.planned[row] = part.end
            rows.pending[row] += part.samples
            rows.last_step[row] = planned.step
        for part in planned.parts:
            if part.samples:
                sampling[part.row] = True
        beyond = rows.planned > rows.pages * self._books.limits.page_size
        assert not np.count_nonzero(beyond), "a row is planned beyond its pages (H22)"


class _Outlook:
    """The future of the running rows, to which candidates are added one by one.

    First by the bound, a running sum: what fits even if everybody uses all they may needs no estimate. The estimate
    looks at every row, so it is made only when the bound does not fit.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._capacity = books.usable_pages - books.tree.hard_pages
        self._held: Column | None = None
        self._growth: Column = _NO_ROWS
        self._added: list[tuple[Request, int]] = []
        """Who was admitted in this step, with what it shares: not among the rows yet."""

    def admits(self, request: Request, shared: int) -> bool:
        """Whether the pool will do for this request beside all others. shared: pages that others read already."""
        books = self._books
        bound = ceil_div(request.goal_tokens, books.limits.page_size) - shared
        if books.bound_pages + bound <= self._capacity:
            return True
        if self._held is None:
            self._look_at_rows()
        assert self._held is not None
        added = np.array([self._figures(*each) for each in (*self._added, (request, shared))], np.int64)
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
