"""The page table: which pages each batch row reads and writes, changed only by the runs that a plan carries."""

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import SCRATCH_PAGE, StepPlan
from sessile.errors import PlanError


class PageTable:
    """pages int32[rows_max, width] on the device; entries that no run has set since the row was bound are scratch."""

    def __init__(self, rows_max: int, width: int, pages_total: int, device: torch.device) -> None:
        self.pages: Tensor = torch.full((rows_max, width), SCRATCH_PAGE, dtype=torch.int32, device=device)
        self._rows_max = rows_max
        self._width = width
        self._pages_total = pages_total

    def apply(self, plan: StepPlan) -> None:
        """Clear the rows that the plan binds, then write its runs. Raises PlanError for a run out of bounds."""
        if plan.bind_rows.size:
            self._check_rows(plan.bind_rows)
            self.pages[torch.from_numpy(plan.bind_rows.astype(np.int64))] = SCRATCH_PAGE
        if not plan.table_rows.size:
            return
        self._check_rows(plan.table_rows)
        rows, columns = run_entries(plan)
        if columns.min() < 0 or columns.max() >= self._width:
            raise PlanError(f"step {plan.step}: a page-table run ends beyond the {self._width} pages of a row")
        if plan.table_pages.min() <= SCRATCH_PAGE or plan.table_pages.max() >= self._pages_total:
            raise PlanError(f"step {plan.step}: a page-table run names a page that is not in the pool")
        device = self.pages.device
        entries = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        self.pages[entries] = torch.from_numpy(plan.table_pages.copy()).to(device)

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.min() < 0 or rows.max() >= self._rows_max:
            raise PlanError(f"batch row {int(rows.max())} does not exist; there are {self._rows_max}")


def run_entries(plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
    """Row and column int64 of each of plan.table_pages."""
    counts = plan.table_counts
    if int(counts.sum()) != plan.table_pages.size:
        raise PlanError(f"step {plan.step}: runs name {int(counts.sum())} pages but {plan.table_pages.size} follow")
    rows = np.repeat(plan.table_rows, counts).astype(np.int64)
    within = np.arange(plan.table_pages.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, np.repeat(plan.table_starts, counts) + within
