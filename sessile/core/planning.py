"""What the next step runs: there is no prefill phase and no decode phase, only tokens whose KV is not there yet.

One budget of tokens a step goes to running rows that decode, then to partial prompts, then to admissions, each in
order of arrival. A shortage of pages is judged on free + limbo + reclaimable: what limbo covers makes rows sit out one
step; only what nothing covers preempts, and then the newest arrival, for the sake of an older one.
"""

from collections.abc import Sequence

import numpy as np

from sessile.core.admitting import Admitter
from sessile.core.books import Books
from sessile.core.constraining import are_any
from sessile.core.drafting import StandingLines, most_drafts
from sessile.core.marks import Mark
from sessile.core.planned import NO_ROWS, Planned, PromptPart
from sessile.core.request import Request
from sessile.core.reserving import spend, top_up
from sessile.core.rows import Column, Flags, RowTable
from sessile.units import RowId, ceil_div

QUIET_ASKS = 16
"""Steps in a row for which a drafter had nothing that makes asking for the next one late by a step more."""
ASK_EVERY_MAX = 4
"""Steps, of which at least one is asked for: what begins to repeat itself does so for longer."""


class Steady:
    """Rows that decode side by side, and nobody else: as it stays until somebody comes, goes, or is nearly done.

    steps_left: so many more steps can each of them run. steps_fitting: so many more are known to lack no page.
    changes: those of the row table, as of then. is_asked: whether any may have drafts or needs masks. quiet_asks: in
    how many of the steps that are due nothing was drafted for them, one behind the other; steps_unasked: for so many
    steps nobody asks again. lines: None until they are asked.
    """

    __slots__ = (
        "changes", "decodes", "is_asked", "lines", "quiet_asks", "sampling", "steps_fitting", "steps_left",
        "steps_unasked",
    )  # fmt: skip

    def __init__(self, rows: RowTable[Request], decodes: Column, sampling: Flags, before: "Steady | None") -> None:
        """before: those that went on until now, if there were any."""
        self.decodes = decodes
        self.sampling = sampling
        self.changes = rows.changes
        self.is_asked = bool(np.count_nonzero(rows.drafts[decodes]) or np.count_nonzero(rows.constrained[decodes]))
        self.quiet_asks = self.steps_unasked = 0
        if before is not None and not np.count_nonzero(sampling > before.sampling):
            # Nobody has come, who may repeat something at once; some have left, or end with the step in flight.
            self.quiet_asks, self.steps_unasked = before.quiet_asks, before.steps_unasked
        self.lines: StandingLines | None = None
        self.steps_fitting = 0
        self.steps_left = int(np.minimum.reduce(rows.kv_goal[decodes] - rows.planned[decodes]))

    def is_due(self) -> bool:
        """Whether to ask for drafts in this step; to be called once in each."""
        if self.steps_unasked:
            self.steps_unasked -= 1
            return False
        return True

    def most_drafts(self, books: Books, tokens: int) -> Column:
        """As the function of this name, of these rows; or nothing, if there are none."""
        if self.steps_left <= books.limits.drafts_max:  # So near its end a row may have a use for fewer.
            return most_drafts(books, self.decodes, tokens)
        if self.lines is None:
            self.lines = StandingLines(books, self.decodes)
        return self.lines.most_drafts(tokens)

    def note_quiet(self) -> None:
        """Nothing is drafted in this step, which was due to be asked for."""
        self.quiet_asks += 1
        self.steps_unasked = min(self.quiet_asks // QUIET_ASKS, ASK_EVERY_MAX - 1)


class Planner:
    """Chooses rows, token counts and pages. Of its own it knows the last forced retraction and whose turn it is."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._retracted_step = 0
        self._decoded_last = False
        self._took_turns = False
        self._steady: Steady | None = None
        self._waited: Steady | None = None
        """Those of the last step, if it waited for masks or drafts in flight, and had no drafts itself."""
        self._denied: list[RowId] = []
        """Rows that got no page for what this plan was to run of them."""
        self.budget_tokens = books.limits.chunk_tokens
        self.unfinished: Planned | None = None
        """The plan that is being made; what is left of one that failed."""
        self._admitter = Admitter(books)

    @property
    def ended(self) -> list[Request]:
        """Requests that were admitted with nothing left to compute; the machine ends them and clears the list."""
        return self._admitter.ended

    def plan(self) -> Planned | None:
        """The early part of the next step, with pages drawn and counters advanced; None if nothing can run now."""
        books = self._books
        books.drain()
        if books.reserving:
            top_up(books)
        self._retract_by_force()
        self.unfinished = planned = Planned(books.planned_step + 1)
        self._choose_who_can(planned)
        if planned.is_empty and not books.copies:
            self.unfinished = None
            return None  # A plan may hold copies alone: what was given up for them is free only behind it.
        if planned.is_empty:
            books.marks[Mark.COPIES_ALONE] += 1
        self._offer_drafts(planned)
        self._advance(planned)
        assert planned.tokens <= self.budget_tokens, "the parts of a step exceed its budget (H15)"
        books.planned_step = planned.step
        books.forecast.stepped()
        self._decoded_last = bool(len(planned.decodes))
        self.unfinished = None
        return planned

    def _choose_who_can(self, planned: Planned) -> None:
        """Choose until somebody runs, or nobody is left to ask.

        Who was to run may get no page: the newest sits out rather than preempt itself. Others may go on then, or may
        take its pages; a row that was denied is not asked again, and without mixed steps the turn changes once.
        """
        self._denied.clear()
        self._choose(planned)
        denied, turns = 0, 1
        while planned.is_empty:
            if len(self._denied) > denied:
                denied = len(self._denied)
            elif self._took_turns and turns:
                self._decoded_last = not self._decoded_last
                turns = 0
            else:
                return
            self._choose(planned)

    def _choose(self, planned: Planned) -> None:
        self._took_turns = False
        is_short = not self._choose_running(planned)
        planned.is_short |= is_short
        if not is_short:
            decoding = len(planned.decodes) > 0
            self._admitter.admit(planned, self._budget(decoding) - planned.tokens)

    # -- preemption ---------------------------------------------------------------------------------------------

    def _retract_by_force(self) -> None:
        every = self._books.limits.retract_every
        if every and self._books.planned_step - self._retracted_step >= every:
            victim = self._newest_running(sparing_reserved=False)
            # Only one that got further than the last time, or a forced retraction could undo all progress for ever.
            if victim is not None and self._books.rows.settled[victim.row] > victim.preempted_tokens:
                self._retracted_step = self._books.planned_step
                self.preempt(victim)

    def _newest_running(self, *, sparing_reserved: bool) -> Request | None:
        """The newest arrival that runs. sparing_reserved: not one whose pages would stay with its session anyway."""
        rows = self._books.rows
        running = np.flatnonzero(rows.plannable)
        if sparing_reserved and self._books.reserving:
            running = running[[self._gives_pages(int(row)) for row in running]]
        if not len(running):
            return None
        return rows.occupants[int(running[np.argmax(rows.arrival[running])])]

    def _gives_pages(self, row: int) -> bool:
        """Whether preempting the row makes pages reclaimable (H37)."""
        rows = self._books.rows
        session = rows.occupant(row).session
        return session is None or int(rows.pages[row]) > session.reserved_pages

    def preempt(self, victim: Request) -> None:
        """Preempt now, or, while a step that has the row is in flight, when it settles."""
        books = self._books
        row = victim.row
        assert row is not None
        books.rows.stop_planning(row)
        if books.rows.last_step[row] <= books.settled_step:
            books.preempt(victim)
            books.marks[Mark.PREEMPTED] += 1
        else:
            books.victims.append(victim)
            books.marks[Mark.PREEMPTED_LATER] += 1

    # -- running rows -------------------------------------------------------------------------------------------

    def _choose_running(self, planned: Planned) -> bool:
        """Share the budget among running rows, decoding first. Returns whether all of them got their pages."""
        if self._steady is not None and self._goes_on(self._steady, planned):
            return self._fits(self._steady) or self._draw_for_running(planned)
        rows = self._books.rows
        before, self._steady, self._waited = self._steady or self._waited, None, None
        # Over whole columns, free rows included: cheaper than gathering the rows that run.
        ahead = rows.known + rows.pending
        ahead -= rows.planned
        ready = rows.planned < rows.kv_goal
        ready &= rows.plannable
        if self._denied:
            ready[self._denied] = False
        single = ahead == 1
        single &= ready
        decodes = single.nonzero()[0]
        single_count = len(decodes)
        prompts = NO_ROWS
        if np.count_nonzero(ready) > single_count:
            prompts = (ready & ~single).nonzero()[0]
        elif not len(decodes):
            planned.sampling = single
            return True
        if not self._books.limits.mixed_chunk and len(decodes) and (len(prompts) or self._books.waiting):
            self._took_turns = True
            # Without mixed steps prompts and decoding take turns, so that neither starves.
            if self._decoded_last:
                decodes = NO_ROWS
            else:
                prompts = NO_ROWS
        budget = self._budget(len(decodes) > 0)
        if len(decodes) > budget:
            decodes = self._fair_decodes(decodes, budget)
        if len(decodes) < single_count:
            single = rows.flags_of(decodes)
        elif not len(prompts) and self._books.limits.mixed_chunk and not self._denied:
            self._steady = Steady(rows, decodes, single, before)
        decodes.flags.writeable = False  # Flights and later plans have the very array.
        planned.decodes, planned.sampling = decodes, single
        self._choose_prompts(planned, prompts, budget - len(decodes))
        planned.tokens = len(decodes) + sum([part.count for part in planned.parts])
        return self._draw_for_running(planned)

    def _goes_on(self, steady: Steady, planned: Planned) -> bool:
        """Choose the rows of the step before once more, if nothing has happened that could change who runs."""
        rows = self._books.rows
        if steady.changes != rows.changes or steady.steps_left <= 0 or self._denied:
            return False
        if len(steady.decodes) > self._budget(True):
            return False
        planned.decodes, planned.sampling, planned.tokens = steady.decodes, steady.sampling, len(steady.decodes)
        if self._books.limits.audit_level >= 2:
            ready = rows.plannable & (rows.planned < rows.kv_goal)
            ready_ahead = (rows.known + rows.pending - rows.planned)[ready]
            assert (ready == steady.sampling).all() and (ready_ahead == 1).all(), "other rows could run"
        return True

    def _fits(self, steady: Steady) -> bool:
        """Whether a step that goes on is known to lack no page."""
        rows, size = self._books.rows, self._books.limits.page_size
        if steady.steps_fitting <= 0:
            return False
        if self._books.limits.audit_level >= 2:
            room = np.minimum.reduce((rows.pages * size - rows.planned)[steady.decodes])
            assert room == steady.steps_fitting, "a row has other pages, or other tokens are planned for it"
        return True

    def _fair_decodes(self, decodes: Column, budget: int) -> Column:
        """The decoding rows that run when not all can: those of tenants served least, then the oldest."""
        rows, tenants = self._books.rows, self._books.tenants
        order = np.argsort(rows.arrival[decodes], kind="stable")
        if tenants.active > 1:
            served = np.array([tenants.at(index).served for index in rows.tenant[decodes].tolist()])
            order = order[np.argsort(served[order], kind="stable")]
        return decodes[order][:budget]

    def _choose_prompts(self, planned: Planned, prompts: Column, budget: int) -> None:
        """Share what decoding leaves of the budget among partial prompts, in order of arrival.

        With several tenants each has a part of the budget by its weight, for its partial prompts and for those of its
        requests that wait for a row; what a tenant has no use for goes to the others, least served first.
        """
        if not len(prompts) or budget <= 0:
            return
        books, rows = self._books, self._books.rows
        requests = [rows.occupant(row) for row in sorted(prompts.tolist(), key=rows.arrival.__getitem__)]
        if books.tenants.active == 1:
            _add_parts(planned, books, requests, budget)
            return
        waiting = books.waiting.tenants if books.rows.free_rows else []
        wanting = {request.tenant.index: request.tenant for request in requests}
        wanting |= {tenant.index: tenant for tenant in waiting}
        tenants = sorted(wanting.values(), key=lambda tenant: (tenant.served, tenant.index))
        weights = sum([tenant.policy.weight for tenant in tenants])
        left, owed = budget, 0
        for tenant in tenants:
            part = max(1, budget * tenant.policy.weight // weights)
            own = [request for request in requests if request.tenant is tenant]
            used = _add_parts(planned, books, own, min(part, left))
            left -= used
            if tenant in waiting and used < part:
                owed += books.waiting.waiting_tokens_of(tenant, part - used)
        for tenant in tenants:
            own = [request for request in requests if request.tenant is tenant]
            left -= _add_parts(planned, books, own, max(0, left - owed))

    def _budget(self, decoding: bool) -> int:
        return min(self.budget_tokens, self._books.limits.mixed_chunk_tokens) if decoding else self.budget_tokens

    def _draw_for_running(self, planned: Planned) -> bool:
        """Draw the pages that running rows need in this step; rows that get none are taken out of the plan."""
        books, rows = self._books, self._books.rows
        size = books.limits.page_size
        planned_kv = rows.planned_so_far()
        room = rows.pages * size
        room -= planned_kv
        full = room <= 0
        full &= planned.sampling
        lacking = full.nonzero()[0]
        wants: list[tuple[int, RowId, int]] = []
        for part in planned.parts:
            pages = ceil_div(part.start + part.count, size) - int(rows.pages[part.row])
            if pages > 0:
                wants.append((int(rows.arrival[part.row]), part.row, pages))
        if self._steady is not None and not wants and not (len(lacking) and books.reserving):
            if len(lacking):
                lacking = self._lacking_soon(lacking, room, rows.kv_goal - planned_kv)
            if len(lacking) <= books.ledger.free_pages:
                self._draw_one_each(planned, lacking)
                room[lacking] += size
                self._steady.steps_fitting = int(np.minimum.reduce(room[planned.decodes]))
                return True
        if books.reserving:
            self._spend_reserves(lacking, wants)
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

    def _lacking_soon(self, lacking: Column, room: Column, left: Column) -> Column:
        """With rows that lack a page in a step that goes on, those that will within half a page, if all can get one.

        One step in so many draws pages then, instead of each of them for a few rows. room, left [rows_max]: tokens
        until a row is full, and until it is at its goal.
        """
        books = self._books
        assert self._steady is not None
        soon = room <= books.limits.page_size // 2
        soon &= room < left
        soon &= self._steady.sampling
        more: Column = soon.nonzero()[0]
        if len(more) > books.ledger.free_pages and not books.waiting:  # Who waits may have KV that would be next.
            books.reclaim(len(more) - books.ledger.free_pages - books.ledger.limbo_pages)
        return more if len(more) <= books.ledger.free_pages else lacking

    def _spend_reserves(self, lacking: Column, wants: list[tuple[int, RowId, int]]) -> None:
        """Set free what rows with a reservation are about to draw."""
        rows = self._books.rows
        for row in lacking.tolist():
            spend(self._books, rows.occupant(row), 1)
        for _, row, pages in wants:
            spend(self._books, rows.occupant(row), pages)

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
        slots = rows.pages[lacking]
        planned.grown_slots = slots
        planned.grown_pages = ledger.draw_each(leases)
        rows.pages[lacking] = slots + 1

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
                books.marks[Mark.LIMBO_SHORTAGE] += total > free
                break
            if self._give_up_spare_pages(planned):
                continue
            if books.has_drafts_in_flight:
                # Some of the drafts in flight may be wrong; a step that is short has none, so this comes to an end.
                books.marks[Mark.WAITED_FOR_DRAFTS] += 1
                break
            first_denied = next(w for i, w in enumerate(wants) if sum(p for _, _, p in wants[: i + 1]) > free)
            victim = self._newest_running(sparing_reserved=True)
            if victim is None or victim.row == first_denied[1]:
                books.marks[Mark.NEWEST_SAT_OUT] += 1
                break
            self.preempt(victim)
        short = set()
        for _, row, pages in wants:
            granted = min(pages, books.ledger.free_pages)
            if granted:
                self._draw(planned, row, granted)
            if granted < pages:
                short.add(row)
            if not granted:
                self._denied.append(row)
        size = books.limits.page_size
        kept = [row for row in planned.decodes.tolist() if rows.plannable[row] and row not in short]
        planned.decodes = np.array(kept, np.int64)
        planned.sampling = rows.flags_of(planned.decodes)
        parts = []
        for part in planned.parts:
            part.count = min(part.count, int(rows.pages[part.row]) * size - part.start)
            if rows.plannable[part.row] and part.count > 0:
                parts.append(part)
        planned.parts = parts
        planned.tokens = len(kept) + sum(part.count for part in parts)

    def _give_up_spare_pages(self, planned: Planned) -> bool:
        """Let go of pages that rows drew for drafts or steps to come, and do not need in this one; whether there were
        any (H48)."""
        books, rows = self._books, self._books.rows
        needed = rows.planned + planned.sampling
        if books.has_drafts_in_flight:
            # Where a request is at its end if all of its drafts are right, the last one is not among what is planned.
            needed = np.where(rows.planned + 1 == rows.kv_goal, rows.kv_goal, needed)
        spare = rows.pages + -needed // books.limits.page_size
        spare[~rows.plannable] = 0
        spare[[part.row for part in planned.parts]] = 0
        given_up = (spare > 0).nonzero()[0]
        for row in given_up.tolist():
            lease = rows.occupant(row).lease
            assert lease is not None
            # A step in flight may still write drafts there.
            books.ledger.drop_tail(lease, len(lease) - int(spare[row]), books.planned_step)
        rows.pages[given_up] -= spare[given_up]
        books.marks[Mark.SPARE_PAGES_GIVEN_UP] += len(given_up) > 0
        return len(given_up) > 0

    def _pages_of_victims(self) -> int:
        """Pages that requests to be preempted at the next settle will give up."""
        rows = self._books.rows
        leaving = np.flatnonzero((rows.live == 1) & ~rows.plannable)
        pages = int((rows.pages[leaving] - rows.pinned[leaving]).sum())
        for row in leaving.tolist() if self._books.reserving else ():
            session = rows.occupant(row).session
            if session is not None:
                pages -= min(session.reserved_pages, int(rows.pages[row] - rows.pinned[row]))
        return pages

    # -- drafts and counters ------------------------------------------------------------------------------------

    def _offer_drafts(self, planned: Planned) -> None:
        """Set pages aside for drafts, out of what is free anyway: drafts fall to zero before anyone is preempted."""
        decodes, books, steady = planned.decodes, self._books, self._steady
        if not len(decodes) or (steady is not None and not steady.is_asked):
            return
        # Behind drafts in flight a row's position, and behind any token in flight what a grammar allows, is known only
        # when they have settled.
        is_late = are_any(books, decodes)
        caps = NO_ROWS
        if books.drafter is not None:
            is_late = is_late or books.has_drafts_in_flight
            budget = self._budget(True) - planned.tokens
            if budget > 0 and not planned.is_short and (steady is None or steady.is_due()):
                caps = self._most_drafts(planned)
                if np.count_nonzero(caps):
                    caps = np.maximum(np.minimum(caps, budget - (caps.cumsum() - caps)), 0)
                    self._draw_for_drafts(planned, caps)
                    planned.tokens += int(caps.sum())
                elif steady is not None:
                    steady.note_quiet()
        if is_late or np.count_nonzero(caps):
            planned.late = True
            planned.draft_caps = caps if len(caps) else np.zeros(len(decodes), np.int64)

    def _most_drafts(self, planned: Planned) -> Column:
        if self._steady is None:
            return most_drafts(self._books, planned.decodes, planned.tokens)
        assert planned.decodes is self._steady.decodes, "a step that lacks no page runs all rows that were chosen"
        return self._steady.most_drafts(self._books, planned.tokens)

    def _draw_for_drafts(self, planned: Planned, caps: Column) -> None:
        """Draw free pages for drafts; where there are too few, cut the row's entry in `caps`."""
        books, rows, decodes = self._books, self._books.rows, planned.decodes
        size = books.limits.page_size
        after = rows.planned[decodes] + 1
        wanted = -(-np.minimum(after + caps, rows.kv_goal[decodes]) // size) - rows.pages[decodes]
        for index in (wanted > 0).nonzero()[0].tolist():
            row, pages = RowId(int(decodes[index])), int(wanted[index])
            granted = min(pages, books.ledger.free_pages)
            if granted:
                self._draw(planned, row, granted)
            books.marks[Mark.DRAFTS_CUT_BY_PAGES] += granted < pages
            caps[index] = min(int(caps[index]), int(rows.pages[row]) * size - int(after[index]))

    def _charge(self, planned: Planned) -> None:
        """Count what the step runs for each tenant."""
        tenants = self._books.tenants
        counts = np.bincount(self._books.rows.tenant[planned.decodes])
        for index in counts.nonzero()[0].tolist():
            tenants.at(index).charge(int(counts[index]))
        for part in planned.parts:
            part.request.tenant.charge(part.count)

    def _advance(self, planned: Planned) -> None:
        """Count what is planned: from here on the step exists. Rows that were seated in it count it already."""
        rows, sampling = self._books.rows, planned.sampling
        if self._books.tenants.active > 1:
            self._charge(planned)
        planned.is_counted = True
        if self._steady is not None and self._count_steady(self._steady, planned):
            rows.plan_once_more(sampling, planned.step)
            return
        rows.plan_one(sampling, planned.step)
        if planned.draft_caps is not None:
            decodes = planned.decodes
            counted = np.minimum(planned.draft_caps, rows.kv_goal[decodes] - rows.planned[decodes])
            rows.planned[decodes] += counted
            rows.pending[decodes] += counted
        seated = len(planned.parts) - len(planned.bound)
        for part in planned.parts[:seated]:
            row = part.row
            part.samples = part.end == int(rows.known[row])
            rows.planned[row] = part.end
            rows.pending[row] += part.samples
            rows.last_step[row] = planned.step
        ends = [part.row for part in planned.parts if part.samples]
        if ends:
            planned.sampling = sampling.copy()
            planned.sampling[ends] = True
        beyond = rows.planned > rows.pages * self._books.limits.page_size
        assert not np.count_nonzero(beyond), "a row is planned beyond its pages (H22)"

    def _count_steady(self, steady: Steady, planned: Planned) -> bool:
        """One step less is left; with drafts or shortages nobody knows how many are.

        Returns whether all that is planned is that step, and all have pages for it (H22).
        """
        steady.steps_left -= 1
        steady.steps_fitting -= 1
        caps, is_joined = planned.draft_caps, planned.sampling is not steady.sampling
        if caps is not None or is_joined:
            self._steady = None
            if caps is not None and not np.count_nonzero(caps) and not is_joined:
                self._waited = steady
            return False
        return steady.steps_fitting >= 0 and not planned.parts


def _add_parts(planned: Planned, books: Books, requests: Sequence[Request], budget: int) -> int:
    """Plan the next tokens of partial prompts, at most `budget` in all; a part that is there is made longer.

    Returns how many were added.
    """
    rows, left = books.rows, budget
    there = {part.row: part for part in planned.parts}
    for request in requests:
        if left <= 0:
            break
        row = request.row
        assert row is not None
        part = there.get(row) or PromptPart(request, row, int(rows.planned[row]), 0, False)
        count = min(min(int(rows.known[row]), int(rows.kv_goal[row])) - part.end, left)
        if count > 0 and not part.count:
            planned.parts.append(part)
        part.count += count
        left -= count
    return budget - left


