"""The core's books: what exists, who holds what, and the transitions that move KV between holders.

Every transition here keeps the invariants by itself (see docs/INVARIANTS.md); the planner and the settlement decide
which one is due. Pages that leave a holder are stamped with the newest planned step, which is the newest that may
still touch them.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from sessile.contract.drafting import Drafter
from sessile.contract.grammar import Grammars
from sessile.contract.model import ModelFacts
from sessile.core.admission import Forecast
from sessile.core.effects import Effects
from sessile.core.events import EventRing
from sessile.core.groups import Groups
from sessile.core.ledger import QUARANTINE, Lease, PageLedger
from sessile.core.limits import Limits
from sessile.core.line import WaitingLine
from sessile.core.marks import Mark
from sessile.core.prefix import Pin, PrefixTree
from sessile.core.request import Phase, Request
from sessile.core.rows import RowTable
from sessile.core.session import ParkedKv, Session, SessionKey
from sessile.core.tenants import Tenants
from sessile.units import ceil_div


@dataclass(slots=True)
class Totals:
    """Running totals since the start; they only grow."""

    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    turns_committed: int = 0
    turns_rolled_back: int = 0
    turns_replayed: int = 0
    forks: int = 0
    rewinds: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    reclaimed_tokens: int = 0
    evicted_pages: int = 0
    demoted_pages: int = 0
    drafts_offered: int = 0
    drafts_accepted: int = 0
    verifications: int = 0
    """How often a row had drafts in a step."""
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Drafts offered and accepted of ended requests, by source."""
    audit_checks: int = 0
    audit_failures: int = 0
    violations: dict[str, int] = field(default_factory=dict)
    """By kind: those of AuditError, and "row" for a row that could not be settled."""
    quarantined_pages: int = 0


class Books:
    """Ledger, tree, rows, requests, sessions and the waiting line of one machine."""

    def __init__(
        self, limits: Limits, facts: ModelFacts, drafter: Drafter | None = None, grammars: Grammars | None = None
    ) -> None:
        self.limits = limits
        self.facts = facts
        self.drafter = drafter
        """None: nothing is ever drafted."""
        self.grammars = grammars
        """None: no request may bring one."""
        self.ledger = PageLedger(limits.pages_total)
        self.tree = PrefixTree(self.ledger, limits.page_size)
        self.rows: RowTable[Request] = RowTable(limits.rows_max)
        self.requests: dict[int, Request] = {}
        """By key, from submission until Done."""
        self.groups = Groups()
        self.sessions: dict[SessionKey, Session] = {}
        self.node_count = 0
        """Turns of branching sessions, finished or in flight: each holds a history and maybe KV."""
        self.reserving: list[Session] = []
        """Sessions with a reservation, in the order of opening."""
        self.reserved_pages = 0
        """Pages promised to them."""
        self.reserve_pages = 0
        """Of these, pages without KV, which their reserves own: a running counter."""
        self.tenants = Tenants(limits.tenants)
        self.waiting = WaitingLine(limits.overtakes_max)
        self.draining: list[Request] = []
        self.victims: list[Request] = []
        """Running requests that leave at the next settle, because a step in flight has them."""
        self.computing: dict[tuple[int, bytes], Request] = {}
        """Which running request is about to publish the page that a share key names."""
        self.copies: list[tuple[int, int, int]] = []
        """(source page, target page, tokens) to be copied by the next plan, before its writes: see `queue_copy`."""
        self.copying: list[Session] = []
        """The sessions at either end of these copies."""
        self.forecast = Forecast(limits.output_estimate_tokens)
        self.effects = Effects()
        self.events = EventRing()
        self.failures: list[tuple[str, str]] = []
        """Why requests were expelled since the books were restored last: see containment.py."""
        self.suspects = array("i")
        """The pages that they, and all others who were expelled, had listed."""
        self.totals = Totals()
        self.marks: Counter[Mark] = Counter()
        """How often each rare branch was taken."""
        self.now_ns = 0
        self.settled_step = 0
        self.drafted_step = 0
        """The newest step with drafts."""
        self.arrivals = 0
        self.bound_pages = 0
        """Pages that running requests can come to need by their goals: a running counter for admission."""
        self.session_serials = 0
        self.parked_pages = 0
        """Own pages of parked sessions: a running counter, checked by the audit."""
        self.idle_deadlines: list[tuple[int, int, Session]] = []
        self._parked_order: list[tuple[bool, int, int, Session]] = []

    def lines(self) -> Iterator[Session]:
        """Everything that holds a history, and KV of it when it is parked: sessions and turns of branching ones."""
        for session in self.sessions.values():
            yield session
            yield from session.nodes.values()

    # -- room ---------------------------------------------------------------------------------------------------

    @property
    def usable_pages(self) -> int:
        """Pages that sequences can ever have: all but scratch and what is in quarantine."""
        return self.limits.pages_total - 1 - self.ledger.balance(QUARANTINE)

    @property
    def planned_step(self) -> int:
        """The newest planned step; the tree stamps with it what it lets go."""
        return self.tree.step

    @planned_step.setter
    def planned_step(self, step: int) -> None:
        self.tree.step = step

    @property
    def has_drafts_in_flight(self) -> bool:
        """Whether positions of rows depend on which drafts are right."""
        return self.drafted_step > self.settled_step

    @property
    def reclaimable_pages(self) -> int:
        """Pages that nobody running needs: unpinned tree pages and the own pages of parked sessions."""
        return self.tree.unpinned_pages + self.parked_pages

    def kept_pages(self) -> int:
        """Pages that reservations keep from everybody else: reserves, and own pages of parked KV within them."""
        pages = 0
        for session in self.reserving:
            assert session.reserve is not None
            pages += len(session.reserve)
            if session.parked is not None:
                within = max(0, session.reserved_pages - len(session.parked.pin.pages))
                pages += min(len(session.parked.lease), within)
        return pages

    def reclaim(self, pages_wanted: int, *, sparing: Session | None = None) -> int:
        """Move up to `pages_wanted` pages to LIMBO, least recently used first; return how many.

        One order of last use over tree leaves and parked sessions; sessions whose turn waits come last. Pages are
        taken from the tail, because KV is closed under prefixes. `sparing`: a session not to be touched.
        """
        reclaimed = 0
        while reclaimed < pages_wanted:
            leaf_use = self.tree.oldest_use()
            session = self._oldest_parked(sparing)
            if session is not None and (leaf_use is None or (session.turn is None and session.last_use < leaf_use)):
                self.marks[Mark.DEMOTED_WAITING] += session.turn is not None
                pages = self._shrink_parked(session, pages_wanted - reclaimed)
                self.totals.demoted_pages += pages
                self.marks[Mark.DEMOTED] += 1
                self.marks[Mark.DEMOTED_TO_NOTHING] += session.parked is None
            elif leaf_use is not None:
                pages = self.tree.evict_oldest(pages_wanted - reclaimed)
                self.totals.evicted_pages += pages
                self.marks[Mark.EVICTED] += 1
            else:
                break
            reclaimed += pages
        self.ledger.settle(self.settled_step)
        return reclaimed

    def _oldest_parked(self, sparing: Session | None) -> Session | None:
        order = self._parked_order
        spared: list[tuple[bool, int, int, Session]] = []
        found: Session | None = None
        while order and found is None:
            entry = order[0]
            session = entry[3]
            if not self._is_current(entry):
                heappop(order)
            elif session is sparing:
                spared.append(heappop(order))
            else:
                found = session
        for entry in spared:
            heappush(order, entry)
        return found

    def _shrink_parked(self, session: Session, pages_wanted: int) -> int:
        parked = session.parked
        assert parked is not None
        reserved, shared = session.reserved_pages, len(parked.pin.pages)
        assert not reserved or len(parked.lease) + shared > reserved, "nothing is to be had within a reservation (H37)"
        pages = min(pages_wanted, len(parked.lease) - min(len(parked.lease), max(0, reserved - shared)))
        if pages:
            kept = len(parked.lease) - pages
            self.ledger.drop_tail(parked.lease, kept, parked.ready_step)
            self.parked_pages -= pages
            parked.tokens = min(parked.tokens, (shared + kept) * self.limits.page_size)
        if not len(parked.lease):
            # The rest is only read, not owned: let go of it, and the tree may evict it in its turn.
            if not reserved:
                self.drop_parked(session)
            elif shared > reserved:
                self.harden(parked.pin)
                self.tree.shorten(parked.pin, reserved)
                parked.tokens = reserved * self.limits.page_size
        return pages

    # -- parked KV ----------------------------------------------------------------------------------------------

    def park(self, session: Session, lease: Lease, pin: Pin, tokens: int) -> None:
        """Hand KV over to a session, cut to `tokens`; it may be reclaimed from now on. Consumes lease and pin."""
        assert session.parked is None, f"session {session.id!r} already holds KV"
        tokens = self.truncate(lease, pin, tokens)
        session.parked = parked = ParkedKv(lease.hand_over(), pin, tokens, self.planned_step)
        self.soften_parked(session, parked)
        self.parked_pages += len(parked.lease)
        if tokens == 0:
            self.drop_parked(session)
        else:
            self.rank_parked(session)

    def unpark(self, session: Session) -> ParkedKv:
        """Take the KV out of a session's hands, hard-pinned, for the turn that starts now."""
        parked = session.parked
        assert parked is not None and parked.ready_step <= self.settled_step
        session.parked = None
        self.parked_pages -= len(parked.lease)
        self.harden(parked.pin)
        return parked

    def harden(self, pin: Pin) -> None:
        """Make sure that a pin is hard: its holder runs, or is about to change it."""
        if not pin.hard:
            self.tree.harden(pin)

    def soften_parked(self, session: Session, parked: ParkedKv) -> None:
        """Let parked KV be reclaimable, but for what a reservation keeps: its shared pages stay under a hard pin."""
        if session.reserved_pages and len(parked.pin.pages) <= session.reserved_pages:
            self.tree.use()
        else:
            self.tree.soften(parked.pin)
        session.last_use = self.tree.clock

    def drop_parked(self, session: Session) -> None:
        """Let go of a session's KV; its tokens stay."""
        parked = session.parked
        if parked is None:
            return
        session.parked = None
        self.parked_pages -= len(parked.lease)
        self.ledger.release(parked.lease, parked.ready_step)
        self.tree.unpin(parked.pin, used=False)

    def cut_parked(self, session: Session, tokens: int) -> None:
        """Cut a session's parked KV to at most `tokens`: the roll-back of a turn that does not run."""
        parked = session.parked
        if parked is None or parked.tokens <= tokens:
            return
        session.parked = None
        self.parked_pages -= len(parked.lease)
        self.harden(parked.pin)
        self.park(session, parked.lease, parked.pin, tokens)

    def rank_parked(self, session: Session) -> None:
        """Enter a parked session into the order of reclaiming; call again when a turn starts to wait."""
        entry = (session.turn is not None, session.last_use, session.serial, session)
        heappush(self._parked_order, entry)
        if len(self._parked_order) > 4 * (len(self.sessions) + self.node_count) + 64:
            self._parked_order = sorted(e for e in self._parked_order if self._is_current(e))

    def _is_current(self, entry: tuple[bool, int, int, Session]) -> bool:
        """Whether the entry still says where its session stands, and something can be had from it."""
        waits, last_use, _, session = entry
        if session.parked is None or session.last_use != last_use or (session.turn is not None) != waits:
            return False
        reserved = session.reserved_pages
        return not reserved or len(session.parked.lease) + len(session.parked.pin.pages) > reserved

    def truncate(self, lease: Lease, pin: Pin, tokens: int) -> int:
        """Cut KV to `tokens`, whole pages only; returns the length that could be kept, ≤ tokens.

        A cut inside the pinned part gives up the page it falls into: the next write would go there, and a TREE page is
        never written (H64).
        """
        size = self.limits.page_size
        pinned = len(pin.pages)
        if tokens >= pinned * size:
            if self.ledger.drop_tail(lease, ceil_div(tokens, size) - pinned, self.planned_step):
                self.marks[Mark.SURPLUS] += 1
            return tokens
        self.marks[Mark.CUT_IN_SHARED_PAGE] += tokens % size > 0
        self.ledger.drop_tail(lease, 0, self.planned_step)
        self.tree.shorten(pin, tokens // size)
        return tokens // size * size

    def queue_copy(self, source: int, target: int, tokens: int, sessions: Sequence[Session]) -> None:
        """Have the next plan copy the first tokens of a page. Either page may be given up before: it waits in LIMBO.

        sessions: whose parked KV the pages belong to.
        """
        self.copies.append((source, target, tokens))
        self.marks[Mark.COPIED] += 1
        self.copying.extend(sessions)
        self.ledger.floor_step = self.planned_step + 1

    def take_copies(self, step: int) -> list[tuple[int, int, int]]:
        """The copies that this step carries; parked KV at either end is not written before it has settled."""
        copies, self.copies = self.copies, []
        for session in self.copying:
            if session.parked is not None:
                session.parked.ready_step = max(session.parked.ready_step, step)
        self.copying.clear()
        self.ledger.floor_step = 0
        return copies

    def enqueue(self, request: Request) -> None:
        """Put a request into the waiting line, at the place of its arrival."""
        request.phase = Phase.QUEUED
        self.waiting.enter(request)

    def delivered_tokens(self, request: Request) -> int:
        """Context of a request with the output it has delivered so far."""
        row = request.row if request.phase is Phase.RUNNING else None
        return request.known_tokens + (int(self.rows.filled[row]) if row is not None else 0)

    # -- output -------------------------------------------------------------------------------------------------

    def collect_output(self, request: Request) -> None:
        """Take over the output tokens that a running row has gathered."""
        rows, row = self.rows, request.row
        assert row is not None
        filled = int(rows.filled[row])
        if filled:
            request.output.frombytes(rows.outputs[row, :filled].tobytes())
            rows.filled[row] = 0

    # -- leaving ------------------------------------------------------------------------------------------------

    def vacate(self, request: Request, settled_tokens: int, keep_tokens: int, *, publish: bool) -> None:
        """Take KV away from a running request: to its session, cut to `keep_tokens`, or to the tree and to LIMBO.

        settled_tokens: the KV that is known to be right. publish: offer a plain request's full settled pages to the
        tree. The row is not touched.
        """
        lease, pin = request.lease, request.pin
        assert lease is not None and pin is not None
        self.stop_sharing(request)
        request.lease = request.pin = None
        self.bound_pages -= request.bound_pages
        session = request.session
        if session is not None:
            self.park(session, lease, pin, min(settled_tokens, keep_tokens))
            return
        size = self.limits.page_size
        pages = settled_tokens // size
        if publish and pages > len(pin.pages):
            self.tree.publish_ended(pin, lease, request.tokens(len(pin.pages) * size, pages * size))
        self.ledger.release(lease, self.planned_step)
        self.tree.unpin(pin, used=True)

    def leave_row(self, request: Request) -> None:
        """Give the row back now, or keep it until the step in flight that reads it has settled (H24, H31)."""
        row = request.row
        assert row is not None
        if self.rows.last_step[row] <= self.settled_step:
            self.rows.give_back(row, request)
            request.row = None
            request.phase = Phase.ENDED
        else:
            self.rows.live[row] = 0
            self.rows.stop_planning(row)
            request.phase = Phase.DRAINING
            self.draining.append(request)
            self.marks[Mark.DRAINED] += 1

    def drain(self) -> None:
        """Free what waited for the newest settled step: rows of ended requests, pages in limbo."""
        if self.draining:
            still = []
            for request in self.draining:
                assert request.row is not None
                if self.rows.last_step[request.row] <= self.settled_step:
                    self.rows.give_back(request.row, request)
                    request.row = None
                    request.phase = Phase.ENDED
                else:
                    still.append(request)
            self.draining = still
        self.ledger.settle(self.settled_step)

    def preempt(self, request: Request) -> None:
        """Take row and KV from a running request and put it back into the line. Nothing of it may be in flight.

        What was emitted is a fact: when the request runs again, it is input (H66). A turn's KV is parked with its
        session, where it may be reclaimed; a plain request's full pages stay in the tree until somebody needs them.
        """
        row = request.row
        assert row is not None and self.rows.last_step[row] <= self.settled_step
        self.collect_output(request)
        settled = int(self.rows.settled[row])
        request.reached_tokens = max(request.reached_tokens, settled)
        request.preempted_tokens = settled
        self.vacate(request, settled, settled, publish=True)
        self.rows.give_back(row, request)
        request.row = None
        request.preemptions += 1
        self.totals.preemptions += 1
        self.forecast.preempted()
        self.enqueue(request)

    # -- timers -------------------------------------------------------------------------------------------------

    def start_idle_timer(self, session: Session) -> None:
        """Idle time starts when a turn ends, never while one is in flight (H41)."""
        if session.idle_timeout_ns is not None:
            deadline = session.last_used_ns + session.idle_timeout_ns
            heappush(self.idle_deadlines, (deadline, session.serial, session))

    def next_deadline_ns(self) -> int | None:
        """When the next session expires if nothing happens before; None if none does."""
        while self.idle_deadlines:
            deadline, _, session = self.idle_deadlines[0]
            if self._expires_at(session) == deadline:
                return deadline
            heappop(self.idle_deadlines)
        return None

    def _expires_at(self, session: Session) -> int | None:
        gone = self.sessions.get(session.key) is not session
        if gone or session.in_flight or session.idle_timeout_ns is None:
            return None
        return session.last_used_ns + session.idle_timeout_ns

    # -- sharing a prefix that is being computed ----------------------------------------------------------------

    def share(self, request: Request) -> None:
        """Say which page a running request will publish next, so that others wait for it instead of computing it."""
        self.stop_sharing(request)
        pin = request.pin
        assert pin is not None and pin.node is not None
        size = self.limits.page_size
        start = len(pin.pages) * size
        if not request.publishing or start + size > request.prompt_tokens - 1:
            return
        key = (pin.node.serial, request.tokens(start, start + size))
        if key not in self.computing:
            self.computing[key] = request
            request.share_key = key

    def stop_sharing(self, request: Request) -> None:
        """Withdraw what `share` said."""
        if request.share_key is not None:
            del self.computing[request.share_key]
            request.share_key = None
