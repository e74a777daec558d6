"""The faults that `mutants` plants: each an edit of a core module's source, with the hazard that it brings back.

An edit names text that must occur exactly once; when the core changes there, the fault has to find its new place.
"""

from dataclasses import dataclass

from sessile.sim.planting import Edit


@dataclass(frozen=True)
class Mutant:
    """One fault: its name, the hazards (docs) it revives, and what is wrong in a sentence."""

    name: str
    hazards: str
    summary: str
    edits: tuple[Edit, ...]


def _fault(name: str, hazards: str, summary: str, module: str, old: str, new: str) -> Mutant:
    return Mutant(name, hazards, summary, (Edit(f"sessile.core.{module}", old, new),))


_LEDGER = (
    _fault(
        "forgotten tail", "H09, H10", "the last page of an ended sequence is not given back",
        "ledger", "self.drop_tail(lease, 0, step)", "self.drop_tail(lease, min(1, len(lease)), step)",
    ),
    _fault(
        "alias with balanced counts", "H06, H22", "the first page of a sequence is entered twice, its newest never",
        "ledger", "        lease.pages.extend(pages)\n        return pages",
        "        if len(lease.pages):\n            pages[-1] = lease.pages[0]\n        lease.pages.extend(pages)\n"
        "        return pages",
    ),
    _fault(
        "two owners swap a page", "H06", "a page goes out under another page's tag; every sum stays right",
        "ledger", "        pages = free[: -count - 1 : -1]\n        self._post(pages, FREE, lease.account)",
        "        pages = free[: -count - 1 : -1]\n        self._post(pages, FREE, lease.account)\n"
        "        if len(free) > count:\n"
        "            other = free[-count - 1]\n"
        "            self._tags[other], self._tags[pages[0]] = self._tags[pages[0]], self._tags[other]",
    ),
    _fault(
        "free before drain", "H24", "pages in limbo become free one step before the step that may touch them settles",
        "ledger", "for stamp in self._limbo if stamp <= step]", "for stamp in self._limbo if stamp <= step + 1]",
    ),
    _fault(
        "limbo skipped", "H24", "pages that leave a holder are free at once",
        "ledger",
        "        self._post(pages, source, LIMBO)\n",
        "        self._post(pages, source, FREE)\n        self._free.extend(pages)\n        return\n",
    ),
    _fault(
        "tag not rewritten", "H01, H06", "pages move in the balances, the last one keeps its old tag",
        "ledger", "                tags[page] = account\n",
        "                tags[page] = account if page != pages[-1] or len(pages) == 1 else tags[page]\n",
    ),
)

_TREE = (
    _fault(
        "drop of another's pin", "H21", "whoever unpins a path unlocks it for every reader",
        "prefix", "            if pin.hard:\n                self._soften(node)\n",
        "            while pin.hard and node.hard > 0:\n                self._soften(node)\n",
    ),
    _fault(
        "pinned leaf evicted", "H03, H73", "eviction looks at soft pins alone",
        "prefix", "not node.children and node.hard == 0 and node.soft == 0", "not node.children and node.soft == 0",
    ),
    _fault(
        "publish remaps a live row", "H62", "the tree adopts a page although it has one for these tokens",
        "prefix", "        if tokens[: self._page_bytes] in node.children:\n            return False\n", "",
    ),
    _fault(
        "match one page too far", "H65, H22", "a partly equal page counts as shared",
        "prefix", "high = middle\n        return low\n", "high = middle\n        return high\n",
    ),
    _fault(
        "unsettled page published", "H30", "a page is published before all of it is computed",
        "settling", "full = min(end, prompt_tokens) // size",
        "full = min(len(request.pin.pages) + len(request.lease), (end + size - 1) // size)",
    ),
    _fault(
        "truncate keeps a tree page", "H64", "a cut inside the shared part leaves a TREE page to be written",
        "books",
        "        self.tree.shorten(pin, tokens // size)\n        return tokens // size * size",
        "        self.tree.shorten(pin, ceil_div(tokens, size))\n        return tokens",
    ),
)

_TURNS = (
    _fault(
        "commit on retract", "H26", "a preempted turn's output becomes history",
        "books", "        request.preemptions += 1\n",
        "        request.preemptions += 1\n"
        "        if request.session is not None and request.output:\n"
        "            import numpy\n"
        "            request.session.history.append(numpy.array(request.output, numpy.int32))\n",
    ),
    _fault(
        "commit on abort", "H18, H27", "an aborted turn is committed like a finished one",
        "ending", 'COMMITS = ("stop", "length")', 'COMMITS = ("stop", "length", "abort")',
    ),
    _fault(
        "skipped roll-back", "H18, H27", "an aborted turn's KV stays with the session, beyond its history",
        "ending", "keep_tokens = max(0, len(session.history) - 1) if session is not None else 0",
        "keep_tokens = request.known_tokens - 1",
    ),
    _fault(
        "stuck busy mark", "H33, H34", "a turn that is cancelled while it waits leaves its session busy",
        "ending", "        session.turn = None\n        session.last_used_ns",
        "        session.turn = None if request.phase is Phase.RUNNING else session.turn\n        session.last_used_ns",
    ),
    _fault(
        "busy turn let in", "H25", "a second turn is accepted beside the one in flight",
        "entering", "if session.turn is not None:\n        raise SessionBusy(\n",
        "if False:\n        raise SessionBusy(\n",
    ),
    _fault(
        "close during a turn", "H23", "a session is closed under its running turn",
        "machine", "        if session.in_flight:\n            session.closing = True",
        "        if session.in_flight and len(session.history) == 0:\n            session.closing = True",
    ),
    _fault(
        "length one too long", "H10, H22", "a session keeps KV for its last token",
        "ending", "keep_tokens = max(0, len(session.history) - 1) if", "keep_tokens = max(0, len(session.history)) if",
    ),
    _fault(
        "double count at the borrow", "H01", "pages that a turn takes over stay counted with the session",
        "books",
        "        session.parked = None\n        self.parked_pages -= len(parked.lease)\n"
        "        self.harden(parked.pin)\n        return parked",
        "        session.parked = None\n        self.harden(parked.pin)\n        return parked",
    ),
    _fault(
        "demoted length kept", "H22", "a parked session that lost pages still claims their tokens",
        "books",
        "            parked.tokens = min(parked.tokens, (shared + kept) * self.limits.page_size)\n", "",
    ),
    _fault(
        "page freed from its middle", "H12", "a cut gives back the page that holds the last kept tokens",
        "books", "self.ledger.drop_tail(lease, ceil_div(tokens, size) - pinned, self.planned_step)",
        "self.ledger.drop_tail(lease, tokens // size - pinned, self.planned_step)",
    ),
    _fault(
        "turn admitted while it drains", "H60", "the next turn starts before the last step of the one before settled",
        "admitting",
        "if session is not None and session.parked is not None and session.parked.ready_step > books.settled_step:",
        "if False:",
    ),
    _fault(
        "refused turn refreshes the timer", "H40", "a busy session's refusal counts as use",
        "entering", "    if session.closing:\n        raise",
        "    session.last_used_ns = books.now_ns\n    if session.closing:\n        raise",
    ),
    _fault(
        "idle time from the start of a turn", "H41", "the end of a turn does not restart the timer",
        "ending", "        session.last_used_ns = books.now_ns\n", "",
    ),
)

_FORKS = (
    _fault(
        "copy forgotten", "H29, H64", "the page that a fork or rewind begins with is never filled",
        "books", "        copies, self.copies = self.copies, []\n",
        "        copies, self.copies = [], []\n",
    ),
    _fault(
        "copy one token short", "H29", "the last token of a copied page is left out",
        "books", "self.copies.append((source, target, tokens))",
        "self.copies.append((source, target, max(1, tokens - 1)))",
    ),
    _fault(
        "wrong page copied", "H29, H64", "a fork copies the page before the one that it begins with",
        "forking", "parked.lease, full), target", "parked.lease, max(0, full - 1)), target",
    ),
    _fault(
        "fork shares its history", "H28", "parent and child append to the same history",
        "forking", "child.cut_history(parent.history.fork(tokens), parent.turn_ends)",
        "child.cut_history(parent.history if tokens == len(parent.history) else parent.history.fork(tokens), "
        "parent.turn_ends)",
    ),
    _fault(
        "rewind keeps the KV", "H11, H18", "the history is cut, its KV is not",
        "forking", "    books.cut_parked(session, kv_tokens)\n", "",
    ),
    _fault(
        "fork at the wrong turn", "H59", "a turn's place is the end of the one after it",
        "machine", "return session.turn_ends[turn - 1] if turn else 0",
        "return session.turn_ends[min(turn, len(session.turn_ends) - 1)] if turn else 0",
    ),
)

_BRANCHES = (
    _fault(
        "parent branched while it runs", "H25, H26", "a turn goes on from one that has not finished",
        "entering", "    if node.turn is not None and not branch.replace:\n", "    if False:\n",
    ),
    _fault(
        "replaced turn goes on", "H27", "descendants that a replacement drops are forgotten while they run",
        "ending", "_descends(node, origin)]:\n        if node.turn is not None:\n",
        "_descends(node, origin)]:\n        if node.turn is not None:\n            continue\n"
        "        if node.turn is not None:\n",
    ),
    _fault(
        "aborted branch kept", "H18, H19", "the node of a turn that was rolled back stays, with what it holds",
        "ending", "        if not commits:\n            _discard(books, session)\n", "",
    ),
    _fault(
        "output kept in a branch without it", "H11", "drop_previous_output cuts at the end of the parent's output",
        "entering", "    if branch.drop_previous_output:\n        length = input_end\n", "",
    ),
    _fault(
        "closed beside a running branch", "H23", "a branching session closes while a turn of it runs",
        "session", "return self.turn is not None or self.turns_in_flight > 0", "return self.turn is not None",
    ),
    _fault(
        "lost reply commits again", "H59", "a turn that is sent again is run and committed twice",
        "entering", "    if _replays(books, message, session):\n        return\n", "",
    ),
    _fault(
        "reply of an undone turn", "H59", "a rewind leaves the reply of the turn that it undid",
        "forking", "    session.reply = None\n", "",
    ),
)

_RESERVATIONS = (
    Mutant(
        "reservation reclaimed", "H36, H68", "parked KV within a reservation is reclaimed like any other", (
            Edit("sessile.core.books", "len(parked.lease) - min(len(parked.lease), max(0, reserved - shared)))",
                 "len(parked.lease))"),
            Edit("sessile.core.books", "return not reserved or len(session.parked.lease) + "
                 "len(session.parked.pin.pages) > reserved", "return True"),
        ),
    ),
    _fault(
        "reserve kept at close", "H19", "a closing session forgets the pages of its reserve",
        "ending", "    release_reserve(books, session)\n", "",
    ),
    _fault(
        "reservation never counted", "H68", "what was reserved before does not count against the next reservation",
        "entering", "if books.reserved_pages + pages > room:", "if pages > room:",
    ),
)

_TENANTS = (
    _fault(
        "another tenant's session found", "H55", "sessions are found by their id alone",
        "machine", "self._books.sessions.get((tenant, session_id))",
        "next((each for (_, id), each in self._books.sessions.items() if id == session_id), None)",
    ),
    _fault(
        "one tree for all tenants", "H71", "the prefix tree does not look at whose prompt it is",
        "tenants", "SHARED_NAMESPACE if shared else f\"tenant {policy.name}\"", "SHARED_NAMESPACE",
    ),
    _fault(
        "limit of a tenant forgotten", "H43", "a tenant's requests in flight are not limited",
        "entering", "if policy.requests_max is not None and tenant.requests >= policy.requests_max:", "if False:",
    ),
    _fault(
        "ended request counts as in flight", "H33", "a tenant's counters keep requests that have ended",
        "tenants", "        tenant.tokens -= tokens\n", "",
    ),
)

_STEPS = (
    _fault(
        "wrong page id", "H08, H22", "a new page overwrites the last entry of the row's page table",
        "planning", "planned.grown_slots = slots", "planned.grown_slots = slots - 1",
    ),
    _fault(
        "table without the shared part", "H31", "a row is bound with its own pages first, the shared ones behind",
        "assembly",
        "        pages.extend(shared)\n        pages.extend(own)\n",
        "        pages.extend(own)\n        pages.extend(shared)\n",
    ),
    _fault(
        "one page to two rows", "H06, H22", "two rows that need a page in the same step get the same one",
        "planning", "planned.grown_pages = ledger.draw_each(leases)",
        "planned.grown_pages = ledger.draw_each(leases)[:1] * len(leases)",
    ),
    _fault(
        "row reused before its drain", "H24, H31", "a row is given back while a step in flight still runs it",
        "books",
        "        if self.rows.last_step[row] <= self.settled_step:\n            self.rows.give_back(row, request)\n"
        "            request.row = None\n            request.phase = Phase.ENDED\n        else:",
        "        if True:\n            self.rows.give_back(row, request)\n"
        "            request.row = None\n            request.phase = Phase.ENDED\n        else:",
    ),
    _fault(
        "emitted twice on resume", "H66", "a preempted request forgets its newest token and samples it again",
        "books", "        request.preemptions += 1\n",
        "        request.preemptions += 1\n        if request.output:\n            request.output.pop()\n",
    ),
    _fault(
        "noise starts over on resume", "H66, H76", "a resumed request samples with output index 0",
        "assembly", "part.samples, part.request.output_tokens, part.top)", "part.samples, 0, part.top)",
    ),
    _fault(
        "penalties start over on resume", "H76", "a resumed request's output counts as prompt",
        "assembly",
        "        prompt_counts.append(request.prompt_tokens if request.penalised else 0)\n"
        "        output_counts.append(request.output_tokens if request.penalised else 0)\n",
        "        prompt_counts.append(request.known_tokens if request.penalised else 0)\n"
        "        output_counts.append(0)\n",
    ),
    _fault(
        "late positions stale", "H11, H49", "a plan with drafts keeps the positions of its early part",
        "assembly", "    starts = rows.settled[decodes]\n",
        "    starts = rows.planned[decodes] - np.minimum(rows.pending[decodes], 1 + counts)\n",
    ),
    _fault(
        "drafts kept past the end", "H11", "accepted drafts behind a stop are emitted too",
        "settling", "        if reason:\n            break\n", "",
    ),
    _fault(
        "stop token ignored", "H58", "rows that only append a token never look for a stop token",
        "settling", "            hit |= stops[active] == tokens\n", "            hit |= stops[active] == -2\n",
    ),
    _fault(
        "ended row settled", "H24", "tokens of a row whose request was cancelled in flight are emitted",
        "settling", "    plain = rows.live > rows.slow\n", "    plain = rows.slow == 0\n",
    ),
    _fault(
        "draft pages not drawn", "H22, H48", "drafts are planned beyond the pages of their row",
        "planning", "                    self._draw_for_drafts(planned, caps)\n", "",
    ),
    _fault(
        "pages of last drafts given up", "H22, H48", "a page is let go that drafts in flight write at a request's end",
        "planning", "            needed = np.where(rows.planned + 1 == rows.kv_goal, rows.kv_goal, needed)\n",
        "            pass\n",
    ),
    _fault(
        "oldest is the victim", "H77", "preemption picks the oldest running request",
        "planning", "np.argmax(rows.arrival[running])", "np.argmin(rows.arrival[running])",
    ),
    _fault(
        "faulty KV published", "H74", "prompt pages of a row whose logits were not finite go to the tree",
        "settling", "part.request.phase is Phase.RUNNING and not result.faulty[index]",
        "part.request.phase is Phase.RUNNING",
    ),
    _fault(
        "faulty row served", "H74", "tokens of a row whose logits were not finite are delivered",
        "settling", "    if result.faulty[index]:", "    if False:",
    ),
)

_DRAFTS = (
    _fault(
        "index kept at a roll-back", "H18, H26", "the index of a session keeps the tokens of a turn that left no trace",
        "drafting", "        session.index = line.index\n        session.cut_index()\n",
        "        session.index = line.index\n",
    ),
    _fault(
        "index kept at a rewind", "H11, H18", "a rewound session's index still knows what came after",
        "session", "        self.cut_index()\n\n    def", "\n    def",
    ),
    _fault(
        "index with two holders", "H01, H19", "a session keeps its index while its turn has it too",
        "drafting", "    index, session.index = session.index, None\n", "    index = session.index\n",
    ),
    _fault(
        "index shared by a fork", "H28, H51", "parent and child of a fork write to the same index",
        "forking", "child.index = parent.index.fork(min(parent.index.tokens, tokens))",
        "child.index = parent.index if parent.index.tokens <= tokens else parent.index.fork(tokens)",
    ),
    _fault(
        "index kept at close", "H19", "a closed session does not let go of its index",
        "ending", "    session.index = None\n", "",
    ),
    _fault(
        "index told of what is in flight", "H49", "the index is shown the last token twice",
        "drafting", "    newest = np.maximum(np.minimum(behind, gathered), 0)\n",
        "    newest = np.minimum(behind + 1, gathered)\n",
    ),
    _fault(
        "index told less than it lacks", "H49", "an index that is far behind is told the newest output alone",
        "drafting", "        index.extend(request.tokens(index.tokens, request.known_tokens))\n", "",
    ),
    _fault(
        "index told noted steps twice", "H49", "lines that are asked again and again are told what they were told",
        "drafting", "            if fresh := noted[self._noted_told :]:\n", "            if fresh := noted[:]:\n",
    ),
    _fault(
        "index told noted steps mixed up", "H49", "lines get the tokens of each other's rows",
        "rows", "        return steps[0].copy() if whole else steps[0][which]\n",
        "        return steps[0][::-1].copy()\n",
    ),
    _fault(
        "branch looks up beyond its offset", "H11", "a branch's index begins with all of what it goes on from",
        "drafting", "parent.index.fork(min(parent.index.tokens, session.base_tokens))",
        "parent.index.fork(parent.index.tokens)",
    ),
    _fault(
        "rejected drafts count as settled", "H10, H30", "KV of drafts that were wrong is taken for right",
        "settling", "    settled = plan.starts[handled] + emitted\n",
        "    settled = plan.starts[handled] + 1 + plan.draft_counts[handled].astype(np.int64)\n",
    ),
    _fault(
        "rejected drafts of a last step settled", "H10, H30", "so is it in the step that ends a request",
        "settling", "    settled = start + 1 + accepted\n", "    settled = start + 1 + drafts\n",
    ),
    _fault(
        "several tokens past a stop", "H58", "rows whose drafts were right do not look for a stop token",
        "settling", "stops[flight.rows][which] == result.tokens", "stops[flight.rows][which] == -2",
    ),
    _fault(
        "several tokens past the length", "H11", "rows whose drafts were right do not look how much they may say",
        "settling", "np.minimum(rows.kv_goal - rows.known, OUTPUT_COLUMNS - 1 - rows.filled)",
        "OUTPUT_COLUMNS - 1 - rows.filled",
    ),
    _fault(
        "rejected draft in the history", "H11, H30", "a draft that was wrong is emitted behind the right ones",
        "settling", "        emitted = tokens[ends[index - 1] if index else 0 : ends[index]]\n",
        "        emitted = tokens[ends[index - 1] if index else 0 : ends[index]]\n"
        "        if len(emitted) < 1 + int(plan.draft_counts[index]):\n"
        "            place = int(plan.query_counts[: index + 1].sum()) - int(plan.draft_counts[index])\n"
        "            emitted = [*emitted, int(plan.tokens[place + len(emitted) - 1])]\n",
    ),
    _fault(
        "drafts beyond the last token", "H11", "the number of drafts does not look at what the request may still say",
        "drafting", "    caps = np.minimum(caps, most_that_can_follow(rows, decodes, rows.settled[decodes]))\n", "",
    ),
    _fault(
        "drafts beyond the budget", "H15, H50", "drafts are not counted against what a step may run",
        "planning", "                    caps = np.maximum(np.minimum(caps, budget - (caps.cumsum() - caps)), 0)\n", "",
    ),
    _fault(
        "drafts of a row that said no", "H50", "a request that turned drafts off gets some",
        "drafting", "0 if message.speculate is False else most", "most",
    ),
    _fault(
        "another's history allowed", "H51", "a tenant that keeps no history may ask to be remembered",
        "drafting", "if message.remember and name and not tenant.policy.remembers:", "if False:",
    ),
)

_GRAMMARS = (
    _fault(
        "mask of the token before", "H76", "a row with a grammar does not wait for its newest token",
        "planning", "        is_late = are_any(books, decodes)\n", "        is_late = False\n",
    ),
    _fault(
        "forbidden drafts verified", "H76", "drafts that a grammar forbids are verified and keep their places",
        "constraining", "        if count == proposed:\n            continue\n", "        continue\n",
    ),
    _fault(
        "said against the grammar", "H76", "an output goes on though its grammar could not be followed",
        "settling", "    if request.constraint is not None and request.constraint.failure:\n", "    if False:\n",
    ),
    _fault(
        "ends that are not looked at", "H57, H76", "ignore_eos is taken beside a grammar that must end",
        "constraining", "        if asked:\n            raise InvalidRequest(f\"{name}: where",
        "        if False:\n            raise InvalidRequest(f\"{name}: where",
    ),
)  # fmt: skip

_STEADY = (
    _fault(
        "who leaves decodes on", "H24, H76", "a row that is not to be planned any more is still among the steady ones",
        "rows",
        "        self.plannable[row] = False\n        self.changes += 1\n",
        "        self.plannable[row] = False\n",
    ),
    _fault(
        "who comes is not seen", "H76", "a row that was given to a request does not end what is steady",
        "rows",
        "        self.plannable[rows] = True\n        self.changes += 1\n",
        "        self.plannable[rows] = True\n",
    ),
    _fault(
        "one step too many", "H22, H76", "steady rows decode once more when one of them has reached its goal",
        "planning", "steady.steps_left <= 0", "steady.steps_left < 0",
    ),
    _fault(
        "no end of a page", "H22", "steps that go on are planned beyond the pages that their rows have",
        "planning", "        steady.steps_fitting -= 1\n", "",
    ),
    _fault(
        "once plain, always plain", "H24", "a row whose request has ended gets the tokens of a step that goes on",
        "rows", "chosen is self._plain and self._plain_since == self.changes", "chosen is self._plain",
    ),
    _fault(
        "steps noted, one written", "H22, H76", "of several steps that were only noted, one is counted as planned",
        "rows", "self._planned += ones * run.planned", "self._planned += ones",
    ),
    _fault(
        "a column that is behind", "H22", "who looks at what is planned does not see steps that were only noted",
        "rows",
        "        if self._run is not None:\n            self._write_run()\n        return self._planned\n",
        "        return self._planned\n",
    ),
    _fault(
        "noted beyond the goal", "H58, H76", "a row that goes on gets one token more than its request may have",
        "rows", "len(run.tokens) >= run.room", "len(run.tokens) > run.room",
    ),
    _fault(
        "noted beyond a stop", "H58", "a row that goes on does not end at a token that ends it",
        "rows", "            if np.count_nonzero(stops == tokens):\n", "            if False:\n",
    ),
    _fault(
        "positions stand still", "H22, H76", "a step that goes on writes where the one before did",
        "assembly", "        ahead.starts[index],\n", "        before.starts,\n",
    ),
)  # fmt: skip

_GROUPS = (
    _fault(
        "group follows too early", "H22, H29", "a prompt is gone on from before the one that computes it has",
        "groups", "if int(rows.settled[other.row]) >= other.prompt_tokens - 1:", "if True:",
    ),
    _fault(
        "group copies too little", "H29", "the last token of what a group shares is left out of the copy",
        "admitting", "request.lease.pages[0], kv_tokens % size, ())",
        "request.lease.pages[0], max(1, kv_tokens % size - 1), ())",
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *_LEDGER, *_TREE, *_TURNS, *_FORKS, *_BRANCHES, *_RESERVATIONS, *_TENANTS, *_STEPS, *_DRAFTS,
    *_GRAMMARS, *_STEADY, *_GROUPS,
)  # fmt: skip
"""Every fault, in the order of the table."""
