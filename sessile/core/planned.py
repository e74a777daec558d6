"""A step on its way to being a StepPlan: its early part, as planner and admission choose it."""

from array import array

import numpy as np

from sessile.core.ledger import Lease
from sessile.core.request import Request
from sessile.core.rows import Column, Flags
from sessile.units import RowId

NO_ROWS: Column = np.empty(0, np.int64)
_NO_FLAGS: Flags = np.empty(0, np.bool_)
_NO_PAGES = array("i")


class PromptPart:
    """A run of known tokens of one row: [start, start + count). samples: whether it reaches the last known token."""

    # No dataclass: what that generates stays interpreted when the core is compiled.
    __slots__ = ("count", "request", "row", "samples", "start")

    def __init__(self, request: Request, row: RowId, start: int, count: int, samples: bool) -> None:
        self.request = request
        self.row = row
        self.start = start
        self.count = count
        self.samples = samples

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

    late: drafts or masks are due, so the step in flight must settle before `Machine.complete`. decodes: rows that run
    one token each, with `draft_caps` drafts at most.
    """

    __slots__ = (
        "bound", "decodes", "draft_caps", "followers", "grown", "grown_pages", "grown_slots", "is_counted", "is_short",
        "late",
        "leases", "owed", "owed_pages", "parts", "runs", "sampling", "step", "tokens",
    )  # fmt: skip

    def __init__(self, step: int) -> None:
        self.step = step
        self.decodes = NO_ROWS
        self.sampling = _NO_FLAGS
        """bool[rows_max]: which rows sample in this step, without regard to drafts. Steps share it: it is never written
        to."""
        self.draft_caps: Column | None = None
        """None: no drafts, none in flight, and no decoding row with a grammar."""
        self.parts: list[PromptPart] = []
        self.bound: list[Request] = []
        """Who is admitted. Their parts are the last ones of `parts`."""
        self.leases: list[Lease] = []
        """Those of `bound`."""
        self.owed: list[int] = []
        """Pages promised to each of `bound`, drawn together at the end of admission."""
        self.owed_pages = 0
        self.followers: list[tuple[Request, Request]] = []
        """Those of `bound` whose first own page begins as a copy of another one's of their group: (request, other)."""
        self.runs: list[tuple[int, int, array[int]]] = []
        """Page-table runs of rows that are not newly bound: (row, first slot, pages)."""
        self.grown = NO_ROWS
        """Running rows that drew one page each: their table gets `grown_pages` at `grown_slots`."""
        self.grown_slots = NO_ROWS
        self.grown_pages = _NO_PAGES
        self.is_short = False
        """Whether pages were short: then nobody is admitted and nothing is drafted."""
        self.late = False
        self.is_counted = False
        """Whether the rows' columns count what the step runs."""
        self.tokens = 0

    @property
    def is_empty(self) -> bool:
        """Whether no row runs."""
        return not len(self.decodes) and not self.parts
