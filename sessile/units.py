"""The units everything is counted in. Imports nothing of ours, so that any layer may use it.

A page is the unit of ownership, a row the unit of batching, a token the unit of work. They are all small integers
and easily swapped by mistake, hence one NewType each.
"""

from typing import NewType

PageId = NewType("PageId", int)
"""Index of a KV page in the device's pool, 0 ≤ id < pages_total."""

RowId = NewType("RowId", int)
"""Index of a batch slot on the device, 0 ≤ id < rows_max."""

TokenId = NewType("TokenId", int)
"""Index into the model's vocabulary."""

StepId = NewType("StepId", int)
"""Number of a step. Steps are numbered from 1 in the order they are planned, launched and settled; 0 is "never"."""

Account = NewType("Account", int)
"""Tag of one owner of pages: (generation << 20) | slot. A slot is used again only with another generation."""

RequestKey = NewType("RequestKey", int)
"""Number a front end gave to a request; never used again while the engine lives."""


def ceil_div(dividend: int, divisor: int) -> int:
    """Return the quotient rounded up; both arguments ≥ 0, divisor > 0."""
    return -(-dividend // divisor)
