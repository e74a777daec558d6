"""Paged attention of ragged steps on the GPU: decode rows, appended turns and prompt chunks in one launch or two.

A block of queries of one row attends with all query heads of one KV head at once (grouped queries), reads K and V in
place through the page table, and may share its history out over several programs (FlashAttention, Dao et al., 2022;
FlashDecoding, 2023). Grids depend on the bucket alone; what each program does, the device has listed before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_early import have_read, is_hopper_or_later, launch_options, next_begins, wait_for_inputs
from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_plan import StepLayout
from sessile.kernels.triton_work import AttentionWork, HeadShape, Tile

NARROW_QUERIES = 16
"""Rows of a narrow block's query tile (the fewest that the matrix units take): tokens × query heads of a KV head."""
WIDE_QUERIES = 128
_LOG2_E = 1.4426950408889634


def narrow_tile(shape: HeadShape, dtype: torch.dtype) -> Tile:
    """Tile of decode rows and short queries: bound by memory, so small and many."""
    queries = max(NARROW_QUERIES, triton.next_power_of_2(shape.group))
    # One warp and few keys: many programs on each multiprocessor hide one another's latency (measured on an H100).
    warps, stages = 1 if shape.head_dim <= 128 and dtype.itemsize == 2 else 4, 4 if dtype.itemsize == 2 else 2
    return Tile(queries, 32, warps, stages, programs=4 * _multiprocessors())


def wide_tile(shape: HeadShape, dtype: torch.dtype) -> Tile:
    """Tile of prompt chunks: bound by arithmetic, so as large as registers and shared memory hold."""
    queries = triton.next_power_of_2(shape.group)
    if dtype.itemsize == 4 or shape.head_dim > 128:
        return Tile(max(32, queries), 32, 4, 2, programs=2 * _multiprocessors(), part_tiles=4, is_wide=True)
    keys = 128 if is_hopper_or_later() else 64
    return Tile(max(WIDE_QUERIES, queries), keys, 8, 2, programs=_multiprocessors(), part_tiles=2, is_wide=True)


def narrow_row_tokens(shape: HeadShape) -> int:
    """Rows with at most so many query tokens are cut into narrow blocks."""
    return 2 * shape.block_tokens(NARROW_QUERIES)


def _multiprocessors() -> int:
    """Multiprocessors of the GPU; few in the interpreter, which runs programs one after the other."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 2


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    layout: StepLayout,
    work: AttentionWork,
    page_size: int,
    out: Tensor,
) -> None:
    """Attend with the queries of the listed pieces; writes their part of out [t, heads, head_dim] and nothing else.

    query [t, heads, head_dim]; keys, values [slots, kv_heads, head_dim], this step's own included; table
    int32[rows_max, pages]. Query j of a row sees the row's tokens 0 … start + j.
    """
    heads, head_dim = query.shape[1:]
    kv_heads, tile, dim = keys.shape[1], work.tile, triton.next_power_of_2(head_dim)
    partials = query.new_empty((work.split_pieces, kv_heads, tile.queries, head_dim), dtype=torch.float32)
    sums = query.new_empty((work.split_pieces, kv_heads, 2, tile.queries), dtype=torch.float32)
    pieces = (work.total, work.rows, work.firsts, work.lows, work.sizes)
    lists = (*pieces, layout.rows, layout.starts, layout.counts, layout.offsets)
    following = next_begins(query, query.shape[0])
    launch(
        _attend, (work.pieces * kv_heads,),
        query, keys, values, out, partials, sums, table, table.shape[1], *lists, head_dim**-0.5 * _LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, PAGE=page_size,
        TOKENS=work.tokens, QUERIES=tile.queries, KEYS=tile.keys,
        PRECISION="ieee" if query.dtype.itemsize == 4 else "tf32", IS_WIDE=tile.is_wide, NEXT=following.value,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(following),
    )  # fmt: skip
    block_queries = work.tokens * heads // kv_heads
    queries, parts, warps = merge_tile(work.merges.numel(), kv_heads, block_queries)
    launch(
        _merge, (work.merges.numel(), kv_heads, triton.cdiv(block_queries, queries)),
        partials, sums, out, work.merges, *lists,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, TOKENS=work.tokens, QUERIES=tile.queries,
        KEYS=tile.keys, QUERIES_AT_ONCE=queries, PARTS_AT_ONCE=parts, NEXT=following.value, num_warps=warps,
        **launch_options(following),
    )  # fmt: skip


def merge_tile(blocks: int, kv_heads: int, queries: int) -> tuple[int, int, int]:
    """(queries, parts) that a program merges at once, and its warps, where so many blocks of queries may be split.

    With few blocks there are many parts, and the other way round. Programs are small while they are few: those without
    anything to merge cost time as well (measured on an H100).
    """
    programs = blocks * kv_heads * queries
    if blocks <= 16 and programs <= 4096:
        return 1, 64, 2
    if programs <= 2048:
        return 1, 4, 1
    return (4, 4, 2) if programs <= 4 * 2048 else (16, 4, 4)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, out, partials, sums, table, width,
    piece_total, piece_rows, piece_firsts, piece_lows, piece_sizes, rows, starts, counts, offsets, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    IS_WIDE: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """One piece of one KV head."""
    wait_for_inputs(NEXT)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    # Programs without a piece come last: between the others they would leave some multiprocessors without work.
    if IS_WIDE:
        pieces = tl.load(piece_total)
        if tl.program_id(0) >= pieces * KV_HEADS:
            return
        # One KV head after the other, so that what runs at once reads little; from the end of each prompt, whose blocks
        # see most and would otherwise be waited for.
        piece, kv_head = pieces - 1 - tl.program_id(0) % pieces, tl.program_id(0) // pieces
    else:
        # KV heads side by side, as what they read lies.
        piece, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
        if piece >= tl.load(piece_total):
            return
    row = tl.load(piece_rows + piece)
    first = tl.load(piece_firsts + piece)
    # Multiples of the tile, which the compiler must see, so that keys of one page are one load.
    low = tl.load(piece_lows + piece) * KEYS
    size = tl.load(piece_sizes + piece) * KEYS
    start = tl.load(starts + row)
    queries_here = min(TOKENS, tl.load(counts + row) - first)
    visible = start + first + queries_here  # to the block's last query
    high = min(low + size, visible)
    if low >= high:
        return
    pages = table + tl.load(rows + row).to(tl.int64) * width
    lane = tl.arange(0, DIM)
    index = tl.arange(0, QUERIES)
    within = index // GROUP
    is_query = within < queries_here
    token = (tl.load(offsets + row) + first + within).to(tl.int64)
    place = token * HEADS + kv_head * GROUP + index % GROUP
    is_stored = is_query[:, None] & (lane < HEAD_DIM)[None, :]
    q = tl.load(query + place[:, None] * HEAD_DIM + lane[None, :], mask=is_stored, other=0.0)
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
    have_read(NEXT)
    if size < visible:
        own = (piece * KV_HEADS + kv_head).to(tl.int64)
        tl.store(partials + (own * QUERIES + index)[:, None] * HEAD_DIM + lane[None, :], mixed, mask=is_stored)
        tl.store(sums + own * 2 * QUERIES + index, peak)
        tl.store(sums + own * 2 * QUERIES + QUERIES + index, total)
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


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partials, sums, out, merges,
    piece_total, piece_rows, piece_firsts, piece_lows, piece_sizes, rows, starts, counts, offsets,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, QUERIES_AT_ONCE: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a few queries of one block and KV head."""
    wait_for_inputs(NEXT)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    piece = tl.load(merges + tl.program_id(0))
    if piece < 0:
        return
    row = tl.load(piece_rows + piece)
    first = tl.load(piece_firsts + piece)
    queries_here = min(TOKENS, tl.load(counts + row) - first)
    kv_head = tl.program_id(1)
    index = tl.program_id(2) * QUERIES_AT_ONCE + tl.arange(0, QUERIES_AT_ONCE)
    is_query = index < queries_here * GROUP
    parts = tl.cdiv(tl.load(starts + row) + first + queries_here, tl.load(piece_sizes + piece) * KEYS)
    if (tl.program_id(2) * QUERIES_AT_ONCE >= queries_here * GROUP) | (parts == 1):
        return  # The first blocks of a split row may see no more than its first part.
    lane = tl.arange(0, DIM)
    is_lane = lane < HEAD_DIM
    peak = tl.full((QUERIES_AT_ONCE,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES_AT_ONCE,), tl.float32)
    mixed = tl.zeros((QUERIES_AT_ONCE, DIM), tl.float32)
    for low in range(0, parts, PARTS_AT_ONCE):
        part = low + tl.arange(0, PARTS_AT_ONCE)
        own = ((piece + part) * KV_HEADS + kv_head).to(tl.int64)
        is_here = (part < parts)[:, None] & is_query[None, :]
        place = own[:, None] * 2 * QUERIES + index[None, :]
        peaks = tl.load(sums + place, mask=is_here, other=float("-inf"))
        totals = tl.load(sums + place + QUERIES, mask=is_here, other=0.0)
        place = (own[:, None] * QUERIES + index[None, :])[:, :, None] * HEAD_DIM + lane[None, None, :]
        values = tl.load(partials + place, mask=is_here[:, :, None] & is_lane[None, None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, weights = tl.exp2(peak - base), tl.exp2(peaks - base[None, :])
        total = total * shrink + tl.sum(totals * weights, 0)
        mixed = mixed * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        peak = new_peak
    have_read(NEXT)
    token = (tl.load(offsets + row) + first + index // GROUP).to(tl.int64)
    target = out + (token * HEADS + kv_head * GROUP + index % GROUP)[:, None] * HEAD_DIM + lane[None, :]
    merged = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(target, merged, mask=is_query[:, None] & is_lane[None, :])
