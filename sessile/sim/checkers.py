"""Checks of what goes to the device and of the machine's own figures, against the books of the clients."""

from collections import Counter
from collections.abc import Collection

from sessile.contract.drafting import SequenceIndex
from sessile.contract.messages import Stats, Submit
from sessile.contract.plan import SAMPLE, StepPlan
from sessile.core.machine import Machine
from sessile.sim.books import Books
from sessile.sim.drafter import ListIndex
from sessile.sim.records import check, fail
from sessile.sim.replies import check_pages
from sessile.sim.toy import ToyDevice
from sessile.sim.world import World
from sessile.units import ceil_div


def check_plan(plan: StepPlan, world: World, books: Books, device: ToyDevice, chunk_tokens: int) -> None:
    """A launched plan keeps its bounds and runs only what clients still wait for. Counts what the device is asked."""
    limits = world.limits
    check(len(plan.tokens) <= chunk_tokens, "bounds", f"{len(plan.tokens)} tokens in a step of {chunk_tokens}")
    oldest = next((key for key, request in books.live.items() if not request.is_over), None)
    bound = plan.bind_rows.tolist()
    decodes = prompts = 0
    for row, start, count, drafts, flags, output_index in zip(
        plan.rows.tolist(),
        plan.starts.tolist(),
        plan.query_counts.tolist(),
        plan.draft_counts.tolist(),
        plan.flags.tolist(),
        plan.output_indices.tolist(),
        strict=True,
    ):
        request = books.by_seed.get(device.seed_of(row))
        if request is None:
            fail("schedule", f"row {row} is bound to nobody's seed")
        if request.is_over:
            fail("schedule", f"request {request.key} runs in step {plan.step} after its end")
        is_bound = row in bound
        # The victim is the newest; so whoever ran as the oldest of all is never preempted, but by force (H37, H77).
        if is_bound and request.ran_as_oldest and not limits.retract_every:
            fail("fairness", f"request {request.key}, the oldest of all, was preempted")
        request.ran_as_oldest |= request.key == oldest
        if drafts > _drafts_allowed(request.submit, limits.drafts_max):
            fail("bounds", f"request {request.key} has {drafts} drafts in a step")
        query_count, prompt_tokens = count - drafts, len(request.prompt)
        request.device_prompt_tokens += max(0, min(start + query_count, prompt_tokens) - start)
        samples, last_output = bool(flags & SAMPLE), output_index + drafts
        if samples and last_output >= request.output_limit:
            fail("schedule", f"request {request.key} may sample output {last_output} of {request.output_limit}")
        # A row that resumes with one token left to compute is an admission.
        decodes += samples and start >= prompt_tokens and query_count == 1 and not is_bound
        prompts += start + query_count < prompt_tokens
    if decodes:
        check(len(plan.tokens) <= limits.mixed_chunk_tokens, "bounds", f"{len(plan.tokens)} tokens beside decoding")
        check(limits.mixed_chunk or not prompts, "bounds", "a mixed step, though they are off")


def _drafts_allowed(submit: Submit, most: int) -> int:
    if submit.speculate is False:
        return 0
    return most if submit.drafts_max < 0 else min(most, submit.drafts_max)


def check_indexes(machine: Machine, books: Books, indexes: Collection[object]) -> None:
    """Every draft index holds the first tokens of what its holder has; `indexes`, all that exist, have one each."""
    held = 0
    for key, request in machine._books.requests.items():
        if request.drafts.line is not None:
            text = [*books.requests[key].prompt, *books.requests[key].output]
            _check_index(request.drafts.line.index, text, f"request {key}")
            held += 1
    for session in machine._books.lines():
        if session.index is not None:
            book = books.sessions.get(session.id)
            known = book.nodes.get(session.rid) if book is not None and session.root is not None else book
            if known is None:
                fail("index", f"session {session.id} {session.rid} is gone and still has an index")
            _check_index(session.index, known.history, f"session {session.id} {session.rid}")
            held += 1
    check(held == len(indexes), "leak", f"{len(indexes)} draft indexes are there, {held} can be used")


def _check_index(index: SequenceIndex, known: list[int], holder: str) -> None:
    assert isinstance(index, ListIndex)
    if index.known.tolist() != known[: index.tokens]:
        fail("index", f"the index of {holder} holds {index.tokens} tokens, not the first of its {len(known)}")


class Readers:
    """Who may read what: every page holds KV of one namespace, and only its own requests read it (H71)."""

    def __init__(self, world: World) -> None:
        policies = world.limits.tenants
        self._shared = {""} | {policy.name for policy in policies if policy.shares_prefixes}
        self._size = world.limits.page_size
        self._written: dict[int, str] = {}
        """By page: the namespace whose KV was written there last."""

    def check_plan(self, plan: StepPlan, books: Books, device: ToyDevice) -> None:
        """Look at what a launched plan copies, reads and writes."""
        for source, target, _ in plan.copies.tolist():
            self._written[target] = self._written[source]
        for row, start, count in zip(
            plan.rows.tolist(), plan.starts.tolist(), plan.query_counts.tolist(), strict=True
        ):
            request = books.by_seed[device.seed_of(row)]
            namespace = "" if request.submit.tenant in self._shared else request.submit.tenant
            pages = device.pages_of(row)
            for page in pages[: ceil_div(start, self._size)]:
                if self._written[page] != namespace:
                    fail("namespace", f"request {request.key} of {namespace!r} reads KV of {self._written[page]!r}")
            for page in pages[start // self._size : ceil_div(start + count, self._size)]:
                self._written[page] = namespace


def check_stats(stats: Stats, world: World, books: Books, totals: Counter[str]) -> None:
    """The machine's figures equal what its clients saw, and pages and rows add up."""
    check_sums(stats)
    if stats.pages_total != world.limits.pages_total or stats.pages_scratch != 1:
        fail("pages", f"not the pool: {stats}")
    sessions = books.sessions.values()
    expected = (
        len(sessions),
        sum([len(line.history) for session in sessions for line in session.lines]),
        sum([not session.in_flight for session in sessions]),
        totals["turns"],
        totals["tokens"],
        # Where violations are contained, somebody plants them.
        stats.audit_failures_total if world.limits.contain_violations else 0,
    )
    shown = (
        stats.sessions_open,
        stats.session_tokens,
        stats.sessions_idle,
        stats.turns_committed_total,
        stats.generated_tokens_total,
        stats.audit_failures_total,
    )
    if shown != expected:
        fail("stats", f"sessions, tokens, idle, turns, output, failures: expected {expected}, got {shown}: {stats}")
    if stats.requests_running + stats.requests_waiting != len(books.live):
        fail("stats", f"{len(books.live)} requests are live: {stats}")
    finished = {reason: totals[f"done {reason}"] for reason in ("stop", "length", "abort", "error")}
    if stats.finished_total != finished:
        fail("stats", f"expected {finished}: {stats.finished_total}")


def check_sums(stats: Stats) -> None:
    """All that can be seen by adding up: every page and every row is counted once."""
    check_pages(stats)
    if not stats.rows_held == stats.requests_running + stats.requests_draining <= stats.rows_total:
        fail("rows", f"rows do not add up: {stats}")


def check_empty(stats: Stats) -> None:
    """With every request ended, every session closed and the cache flushed, all pages and rows are free."""
    check(stats.pages_free == stats.pages_total - 1 - stats.pages_quarantine, "leak", f"pages are left: {stats}")
    check(stats.rows_held == stats.requests_running == stats.requests_waiting == stats.requests_draining == 0, "leak",
          f"rows or requests are left: {stats}")
    check(stats.sessions_open == stats.session_tokens == 0, "leak", f"sessions are left: {stats}")
