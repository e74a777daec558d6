"""The page table: which pages each batch row reads and writes, changed only by the runs that a plan carries."""

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import SCRATCH_PAGE, Ints, StepPlan
from sessile.device.inputs import are_below
from sessile.errors import PlanError

_ONE = np.int32(1).tobytes()


class PageTable:
    """pages int32[rows_max, width] on the device; entries that no run has set since the row was bound are scratch."""

    def __init__(self, rows_max: int, width: int, pages_total: int, device: torch.device) -> None:
        self.pages: Tensor = torch.full((rows_max, width), SCRATCH_PAGE, dtype=torch.int32, device=device)
        self._rows_max = rows_max
        self._width = width
        self._pages_total = pages_total

    def apply(self, plan: StepPlan) -> None:
        """Clear the rows that the plan binds, then write its runs. Raises PlanError for a run out of bounds."""
        check_runs(plan, self._rows_max, self._width, self._pages_total)
        if plan.bind_rows.size:
            self.pages[torch.from_numpy(plan.bind_rows.astype(np.int64))] = SCRATCH_PAGE
        if not plan.table_rows.size:
            return
        rows, columns = run_entries(plan)
        device = self.pages.device
        entries = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        self.pages[entries] = torch.from_numpy(plan.table_pages.copy()).to(device)


def check_runs(plan: StepPlan, rows_max: int, width: int, pages_total: int) -> None:
    """Raise PlanError if the plan binds rows or names pages that do not exist, or a run ends beyond the row's pages."""
    for rows in (plan.bind_rows, plan.table_rows):
        if not are_below(rows, rows_max):
            raise PlanError(f"step {plan.step}: batch row {int(rows.max())} does not exist; there are {rows_max}")
    starts, counts, pages = plan.table_starts, plan.table_counts, plan.table_pages
    if not plan.table_rows.size:
        return
    # Most steps give some rows one more page each.
    is_one_each = counts.size == pages.size and counts.tobytes() == _ONE * counts.size
    if not (are_below(starts, width) if is_one_each else _are_within(starts, counts, width)):
        raise PlanError(f"step {plan.step}: a page-table run ends beyond the {width} pages of a row")
    if not is_one_each and int(np.add.reduce(counts)) != pages.size:
        raise PlanError(f"step {plan.step}: its page-table runs and the pages that follow differ in number")
    assert SCRATCH_PAGE == 0, "pages that are not zero are no scratch"
    if np.count_nonzero(pages) < pages.size or not are_below(pages, pages_total):
        raise PlanError(f"step {plan.step}: a page-table run names a page that is not in the pool")


def _are_within(starts: Ints, counts: Ints, width: int) -> bool:
    return are_below(starts, width) and are_below(counts, width + 1) and are_below(starts + counts, width + 1)


def run_entries(plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
    """Row and column int64 of each of plan.table_pages."""
    counts = plan.table_counts
    rows = np.repeat(plan.table_rows, counts).astype(np.int64)
    within = np.arange(plan.table_pages.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, np.repeat(plan.table_starts, counts) + within
