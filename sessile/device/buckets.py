"""Which size a step is run at: few sizes, so that a CUDA graph of each can be kept."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from sessile.contract.plan import SAMPLE, StepPlan

CAPTURED_TOKENS_MAX = 1024
"""Steps with more tokens keep the device busy for longer than their launches take, so they are run without a graph."""
_SIZES = [1, 2, 4, 8, *range(16, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64),
          *range(640, 1025, 128)]  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Size of a step: tokens, rows and sampling places, at least those of the plan.

    has_narrow, has_wide: whether some row may have few query tokens, or many. is_captured: whether it is kept as a
    graph.
    """

    tokens: int
    rows: int
    places: int
    has_narrow: bool
    has_wide: bool
    is_captured: bool


def bucket_of(plan: StepPlan, narrow_row_tokens: int) -> Bucket:
    """The bucket that a plan with rows runs in."""
    tokens, rows = plan.tokens.size, plan.rows.size
    samples = (plan.flags & SAMPLE) != 0
    places = int(plan.draft_counts[samples].sum() + samples.sum())
    if tokens > CAPTURED_TOKENS_MAX:
        is_wide = plan.query_counts > narrow_row_tokens
        return Bucket(tokens, rows, places, bool((~is_wide).any()), bool(is_wide.any()), False)
    if tokens == rows:
        size = round_up(rows)
        return Bucket(size, size, size if places else 0, True, False, True)
    token_bucket, row_bucket = round_up(tokens), round_up(rows)
    place_bucket = 0 if not places else row_bucket if places <= row_bucket else round_up(places)
    is_all_narrow = bool(np.max(plan.query_counts) <= narrow_row_tokens)
    return Bucket(token_bucket, row_bucket, place_bucket, True, not is_all_narrow, True)


def round_up(count: int) -> int:
    """The next bucket size; beyond the largest, the count itself."""
    index = bisect_left(_SIZES, count)
    return _SIZES[index] if index < len(_SIZES) else count
