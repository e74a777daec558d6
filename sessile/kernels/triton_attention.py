"""Paged attention of ragged steps on the GPU: decode rows, appended turns and prompt chunks in one launch or two.

A block of queries of one row attends with all query heads of one KV head at once (grouped queries), reads K and V in
place through the page table, and may share its history out over several programs (FlashAttention, Dao et al., 2022;
FlashDecoding, 2023). Grids depend on the bucket alone; lengths are read on the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_plan import QueryBlocks, StepLayout

NARROW_QUERIES = 16
"""Rows of a narrow block's query tile (the fewest that the matrix units take): tokens × query heads of a KV head."""
WIDE_QUERIES = 128
PROGRAMS_WANTED = 512
"""Histories are split until about so many programs share the work."""
SPLITS_MAX = 64
_SPLITS_MAX = tl.constexpr(SPLITS_MAX)
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class HeadShape:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def block_tokens(self, queries: int) -> int:
        """Query tokens of a block whose tile has so many rows, at least one."""
        return max(queries // self.group, 1)

    @property
    def narrow_row_tokens(self) -> int:
        """Rows with at most so many query tokens are cut into narrow blocks."""
        return 2 * self.block_tokens(NARROW_QUERIES)


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


def narrow_tile(shape: HeadShape, dtype: torch.dtype) -> Tile:
    """Tile of decode rows and short queries: bound by memory, so small and many."""
    queries = max(NARROW_QUERIES, triton.next_power_of_2(shape.group))
    # One warp and few keys: many programs on each multiprocessor hide one another's latency (measured on an H100).
    return Tile(queries, 32, 1 if shape.head_dim <= 128 and dtype.itemsize == 2 else 4, 4 if dtype.itemsize == 2 else 2)


def wide_tile(shape: HeadShape, dtype: torch.dtype) -> Tile:
    """Tile of prompt chunks: bound by arithmetic, so as large as registers and shared memory hold."""
    if dtype.itemsize == 4 or shape.head_dim > 128:
        return Tile(max(32, triton.next_power_of_2(shape.group)), 32, 4, 2)
    return Tile(max(WIDE_QUERIES, triton.next_power_of_2(shape.group)), 128 if _has_large_memory() else 64, 8, 2)


def _has_large_memory() -> bool:
    """Whether a program may take as much shared memory as the largest tile wants: Hopper and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def splits_for(blocks: int, kv_heads: int) -> int:
    """Into how many parts each history is cut at most: a power of two, from the bucket's size alone."""
    wanted = triton.cdiv(PROGRAMS_WANTED, max(blocks * kv_heads, 1))
    return min(triton.next_power_of_2(wanted), SPLITS_MAX)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    layout: StepLayout,
    blocks: QueryBlocks,
    tile: Tile,
    page_size: int,
    out: Tensor,
) -> None:
    """Attend with the queries of the listed blocks; writes their part of out [t, heads, head_dim] and nothing else.

    query [t, heads, head_dim]; keys, values [slots, kv_heads, head_dim], this step's own included; table
    int32[rows_max, pages]. Query j of a row sees the row's tokens 0 … start + j.
    """
    heads, head_dim = query.shape[1:]
    kv_heads = keys.shape[1]
    listed = blocks.rows.numel()
    splits = splits_for(listed, kv_heads)
    parts = out if splits == 1 else query.new_empty((*out.shape[:2], splits, head_dim), dtype=torch.float32)
    peaks = query.new_empty((*out.shape[:2], splits, 2) if splits > 1 else 0, dtype=torch.float32)
    lists = (blocks.rows, blocks.firsts, layout.rows, layout.starts, layout.counts, layout.offsets)
    dim = triton.next_power_of_2(head_dim)
    _attend[(listed, kv_heads, splits)](
        query, keys, values, parts, peaks, table, table.shape[1], *lists, splits, head_dim**-0.5 * _LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, PAGE=page_size, TOKENS=blocks.tokens,
        QUERIES=tile.queries, KEYS=tile.keys, IS_SPLIT=splits > 1,
        PRECISION="ieee" if query.dtype.itemsize == 4 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _merge[(listed, blocks.tokens * heads)](
            parts, peaks, out, *lists, splits,
            HEADS=heads, HEAD_DIM=head_dim, DIM=dim, KEYS=tile.keys, TOKENS=blocks.tokens, num_warps=2,
        )  # fmt: skip


@triton.jit
def _split_tokens(visible, splits, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """History tokens of each part but the last: whole key tiles."""
    return tl.cdiv(tl.cdiv(visible, splits), KEYS) * KEYS


@triton.jit(do_not_specialize=["splits"])
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, out, peaks, table, width,
    block_rows, block_firsts, rows, starts, counts, offsets, splits, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries, one KV head, one part of the history."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.load(block_rows + tl.program_id(0))
    if row < 0:
        return
    first = tl.load(block_firsts + tl.program_id(0))
    start = tl.load(starts + row)
    queries_here = min(TOKENS, tl.load(counts + row) - first)
    visible = start + first + queries_here  # to the block's last query
    part_tokens = _split_tokens(visible, splits, KEYS)
    low = tl.program_id(2) * part_tokens
    high = min(low + part_tokens, visible)
    if low >= high:
        return
    kv_head = tl.program_id(1)
    pages = table + tl.load(rows + row).to(tl.int64) * width
    lane = tl.arange(0, DIM)
    index = tl.arange(0, QUERIES)
    within = index // GROUP
    is_query = within < queries_here
    token = (tl.load(offsets + row) + first + within).to(tl.int64)
    place = token * HEADS + kv_head * GROUP + index % GROUP
    q = tl.load(
        query + place[:, None] * HEAD_DIM + lane[None, :],
        mask=is_query[:, None] & (lane < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    limit = start + first + within
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, DIM), tl.float32)
    key_head = keys + kv_head * HEAD_DIM
    value_head = values + kv_head * HEAD_DIM
    # Key tiles that every query of the block sees whole need no mask.
    open_end = max(low, min(high, (start + first + 1) // KEYS * KEYS))
    for tile in range(low, open_end, KEYS):
        peak, total, mixed = _fold(
            q, key_head, value_head, pages, tile, visible, limit, scale, peak, total, mixed,
            KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, PAGE, KEYS, PRECISION, False,
        )  # fmt: skip
    for tile in range(open_end, high, KEYS):
        peak, total, mixed = _fold(
            q, key_head, value_head, pages, tile, visible, limit, scale, peak, total, mixed,
            KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, PAGE, KEYS, PRECISION, True,
        )  # fmt: skip
    is_stored = is_query[:, None] & (lane < HEAD_DIM)[None, :]
    if IS_SPLIT:
        part = place * splits + tl.program_id(2)
        tl.store(out + part[:, None] * HEAD_DIM + lane[None, :], mixed, mask=is_stored)
        tl.store(peaks + part * 2, peak, mask=is_query)
        tl.store(peaks + part * 2 + 1, total, mask=is_query)
    else:
        target = out + place[:, None] * HEAD_DIM + lane[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=is_stored)


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    q, keys, values, pages, tile, visible, limit, scale, peak, total, mixed,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running peak, sum of exponentials and mixed values of the queries."""
    position = tile + tl.arange(0, KEYS)
    lane = tl.arange(0, DIM)
    is_lane = lane < HEAD_DIM
    if MASKED:
        seen = position < visible
        page = tl.load(pages + position // PAGE, mask=seen, other=0)
    else:
        page = tl.load(pages + position // PAGE)
    slot = page.to(tl.int64) * PAGE + position % PAGE
    key_place = keys + slot[None, :] * STRIDE + lane[:, None]
    value_place = values + slot[:, None] * STRIDE + lane[None, :]
    if MASKED:
        k = tl.load(key_place, mask=seen[None, :] & is_lane[:, None], other=0.0)
        v = tl.load(value_place, mask=seen[:, None] & is_lane[None, :], other=0.0)
    elif DIM == HEAD_DIM:
        k = tl.load(key_place)
        v = tl.load(value_place)
    else:
        k = tl.load(key_place, mask=is_lane[:, None], other=0.0)
        v = tl.load(value_place, mask=is_lane[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(position[None, :] <= limit[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A query that has seen nothing yet has a peak of minus infinity, whose differences are not numbers.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
    return new_peak, total, mixed


@triton.jit(do_not_specialize=["splits"])
def _merge(  # type: ignore[no-untyped-def]
    parts, peaks, out, block_rows, block_firsts, rows, starts, counts, offsets, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query and head."""
    row = tl.load(block_rows + tl.program_id(0))
    if row < 0:
        return
    first = tl.load(block_firsts + tl.program_id(0))
    queries_here = min(TOKENS, tl.load(counts + row) - first)
    within, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    if within >= queries_here:
        return
    visible = tl.load(starts + row) + first + queries_here
    active = tl.cdiv(visible, _split_tokens(visible, splits, KEYS))
    place = (tl.load(offsets + row) + first + within).to(tl.int64) * HEADS + head
    part = tl.arange(0, _SPLITS_MAX)
    lane = tl.arange(0, DIM)
    is_active = part < active
    peak = tl.load(peaks + (place * splits + part) * 2, mask=is_active, other=float("-inf"))
    total = tl.load(peaks + (place * splits + part) * 2 + 1, mask=is_active, other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    mixed = tl.load(
        parts + (place * splits + part)[:, None] * HEAD_DIM + lane[None, :],
        mask=is_active[:, None] & (lane < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    merged = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * HEAD_DIM + lane, merged.to(out.dtype.element_ty), mask=lane < HEAD_DIM)
