"""Which size a step is run at: few sizes, so that a CUDA graph of each can be kept."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

from sessile.contract.plan import SAMPLE, StepPlan

VERIFYING_TOKENS_MAX = 512
"""Steps that verify drafts are captured at the start up to here; larger ones seldom pay."""
CAPTURED_TOKENS_MAX = 2048
"""Steps with more tokens keep the device busy for longer than their launches take (about 12 ms for 28 layers), so they
are run without a graph."""
DECODE_SIZES = [1, 2, 4, 8, *range(16, 65, 8), *range(80, 129, 16), *range(160, 257, 32), 384, 512, 768, 1024]
"""Rows of a step in which every row runs one token: close together, as most steps are such."""
TOKEN_SIZES = [16, 32, *range(64, 769, 64), *range(896, 2049, 128)]
ROW_SIZES = [8, 64, 256, 1024]
"""Of the other steps. Padding tokens are multiplied like others, padding rows end at once."""


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
    if tokens == rows <= CAPTURED_TOKENS_MAX:
        return decode_bucket(rows)
    samples = (plan.flags & SAMPLE) != 0
    places = int(plan.draft_counts[samples].sum() + samples.sum())
    if tokens > CAPTURED_TOKENS_MAX:
        is_wide = plan.query_counts > narrow_row_tokens
        return Bucket(tokens, rows, places, bool((~is_wide).any()), bool(is_wide.any()), False)
    token_bucket, row_bucket = round_up(tokens, TOKEN_SIZES), round_up(rows, ROW_SIZES)
    # Room for every row to sample, also where none does: sampling nothing is cheap, another graph is not.
    place_bucket = row_bucket if places <= row_bucket else round_up(places, TOKEN_SIZES)
    return Bucket(token_bucket, row_bucket, place_bucket, True, True, True)


@cache
def decode_bucket(rows: int) -> Bucket:
    """Of a step in which so many rows run one token each."""
    size = round_up(rows, DECODE_SIZES)
    return Bucket(size, size, size, True, False, True)


def common_buckets(rows_max: int) -> list[Bucket]:
    """Sizes that are worth a graph before they are needed: every row samples, drafts aside."""
    decode_max, mixed_max = round_up(rows_max, DECODE_SIZES), round_up(rows_max, ROW_SIZES)
    decodes = [decode_bucket(size) for size in DECODE_SIZES if size <= decode_max]
    mixed = [
        Bucket(tokens, rows, rows, True, True, True)
        for rows in ROW_SIZES
        for tokens in TOKEN_SIZES
        if rows <= mixed_max and tokens > rows // 4
    ]
    return decodes + mixed


def verifying_buckets(rows_max: int, drafts_max: int) -> list[Bucket]:
    """Sizes beside the common ones of steps in which every row samples behind each of its drafts too."""
    return [
        Bucket(tokens, rows, tokens, True, True, True)
        for rows in ROW_SIZES
        for tokens in TOKEN_SIZES
        if rows <= round_up(rows_max, ROW_SIZES) and rows < tokens <= min(rows * (1 + drafts_max), VERIFYING_TOKENS_MAX)
    ]


def round_up(count: int, sizes: list[int]) -> int:
    """The next of the sizes; beyond the largest, the count itself."""
    index = bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else count
