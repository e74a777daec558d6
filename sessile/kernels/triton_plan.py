"""A packed plan unpacked where it is used: bind rows, write page-table runs, lay tokens out, all on the GPU.

The kernels read the buffer of `encode_plan` itself, lengths included. So their launch depends on nothing that the plan
says, and a CUDA graph can hold it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.contract.plan import BIND_FLOATS, BIND_INTS, FROM_DEVICE, PLAN_ARRAYS, PLAN_HEADER_WORDS, SAMPLE
from sessile.kernels.flash_attention3 import ListedRows
from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_work import AttentionWork, list_rows, share_out

_HEADER = tl.constexpr(PLAN_HEADER_WORDS)
_SAMPLE, _FROM_DEVICE = tl.constexpr(SAMPLE), tl.constexpr(FROM_DEVICE)
_INTS, _FLOATS = tl.constexpr(BIND_INTS), tl.constexpr(BIND_FLOATS)
_BIND_ROWS = tl.constexpr(PLAN_ARRAYS.index("bind_rows"))
_BIND_INTS = tl.constexpr(PLAN_ARRAYS.index("bind_ints"))
_BIND_FLOATS = tl.constexpr(PLAN_ARRAYS.index("bind_floats"))
_TABLE_ROWS = tl.constexpr(PLAN_ARRAYS.index("table_rows"))
_TABLE_STARTS = tl.constexpr(PLAN_ARRAYS.index("table_starts"))
_TABLE_COUNTS = tl.constexpr(PLAN_ARRAYS.index("table_counts"))
_TABLE_PAGES = tl.constexpr(PLAN_ARRAYS.index("table_pages"))
_ROWS = tl.constexpr(PLAN_ARRAYS.index("rows"))
_STARTS = tl.constexpr(PLAN_ARRAYS.index("starts"))
_COUNTS = tl.constexpr(PLAN_ARRAYS.index("query_counts"))
_DRAFTS = tl.constexpr(PLAN_ARRAYS.index("draft_counts"))
_FLAGS = tl.constexpr(PLAN_ARRAYS.index("flags"))
_OUTPUT_INDICES = tl.constexpr(PLAN_ARRAYS.index("output_indices"))
_TOKENS = tl.constexpr(PLAN_ARRAYS.index("tokens"))
_CHUNK = tl.constexpr(256)

assert len(PLAN_ARRAYS) <= 32, "_begin_of looks at the lengths of 32 arrays"

STATE_PROGRAMS = 64
"""Programs that share out a plan's changes of state; each loops over what is left."""


@dataclass(frozen=True)
class RowState:
    """What the device keeps of each batch row between steps. Changed by `apply_state`, last_tokens by the sampler too.

    table int32[rows_max, width]: page table. last_tokens int64[rows_max]. ints int32[rows_max, 4] and floats
    float32[rows_max, 6]: sampling parameters in the columns of StepPlan.bind_ints and bind_floats.
    """

    table: Tensor
    last_tokens: Tensor
    ints: Tensor
    floats: Tensor

    @classmethod
    def empty(cls, rows_max: int, width: int, device: torch.device) -> "RowState":
        """State of rows that were never bound."""
        return cls(
            torch.zeros((rows_max, width), dtype=torch.int32, device=device),
            torch.zeros(rows_max, dtype=torch.int64, device=device),
            torch.zeros((rows_max, BIND_INTS), dtype=torch.int32, device=device),
            torch.zeros((rows_max, BIND_FLOATS), dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class StepLayout:
    """A step's tokens end to end, on the device; sizes are the bucket's, and padding follows what the plan has.

    tokens, positions, slots int32[t]: padding is token 0 written to the scratch page.
    rows, starts, counts, offsets, drafts, flags, indices, places_before int32[r], by plan row: batch row, KV tokens
    before the step, query tokens, index of the first of them in tokens, drafts, flags, output index, and index of the
    row's first sampling place; padding has count 0 and row -1.
    place_tokens, place_rows, place_depths int32[m], where the step samples: index into tokens, plan row (-1: padding),
    and drafts before it.
    narrow: attention of the rows with up to narrow_row_tokens query tokens; wide: of the others, in pieces for our own
    kernels or row by row for FlashAttention-3.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    starts: Tensor
    counts: Tensor
    offsets: Tensor
    drafts: Tensor
    flags: Tensor
    indices: Tensor
    places_before: Tensor
    place_tokens: Tensor
    place_rows: Tensor
    place_depths: Tensor
    narrow: AttentionWork
    wide: AttentionWork | ListedRows
    narrow_row_tokens: int

    @classmethod
    def empty(
        cls,
        tokens: int,
        rows: int,
        places: int,
        narrow: AttentionWork,
        wide: AttentionWork | ListedRows,
        narrow_row_tokens: int,
    ) -> "StepLayout":
        """Memory for a step of a bucket's size."""
        lengths = dict.fromkeys(("tokens", "positions", "slots"), tokens)
        lengths |= dict.fromkeys(
            ("rows", "starts", "counts", "offsets", "drafts", "flags", "indices", "places_before"), rows
        )
        lengths |= dict.fromkeys(("place_tokens", "place_rows", "place_depths"), places)
        device = narrow.rows.device
        lists: dict[str, Any] = {
            name: torch.empty(length, dtype=torch.int32, device=device) for name, length in lengths.items()
        }
        return cls(narrow=narrow, wide=wide, narrow_row_tokens=narrow_row_tokens, **lists)


def apply_state(plan: Tensor, state: RowState) -> None:
    """Bind rows and write page-table runs, as StepPlan documents. plan int32: a packed plan, on the device."""
    width = state.table.shape[1]
    grid = (STATE_PROGRAMS,)
    launch(_bind, grid, plan, state.table, width, state.last_tokens, state.ints, state.floats.view(torch.int32))
    launch(_write_runs, grid, plan, state.table, width)


def lay_out(plan: Tensor, state: RowState, layout: StepLayout, page_size: int, kv_heads: int) -> None:
    """Fill the layout from the packed plan, the page table and the last tokens. The plan must fit the bucket."""
    tokens, rows, places = layout.tokens.numel(), layout.rows.numel(), layout.place_rows.numel()
    launch(
        _lay_out, (max(tokens, rows, places),),
        plan, state.table, state.table.shape[1], state.last_tokens,
        layout.tokens, layout.positions, layout.slots,
        layout.rows, layout.starts, layout.counts, layout.offsets, layout.drafts, layout.flags, layout.indices,
        layout.places_before, layout.place_tokens, layout.place_rows, layout.place_depths,
        tokens, rows, places, PAGE=page_size, num_warps=2,
    )  # fmt: skip
    fill_work(layout, layout.narrow, (1, layout.narrow_row_tokens), kv_heads)
    fill_work(layout, layout.wide, (layout.narrow_row_tokens + 1, tokens), kv_heads)


def fill_work(layout: StepLayout, work: AttentionWork | ListedRows, row_tokens: tuple[int, int], kv_heads: int) -> None:
    """List what attention has to do for the rows with query tokens from row_tokens[0] to row_tokens[1]."""
    if isinstance(work, ListedRows):
        list_rows(layout.rows, layout.starts, layout.counts, layout.offsets, work, row_tokens)
    else:
        share_out(layout.starts, layout.counts, work, row_tokens, kv_heads)


@triton.jit
def _begin_of(plan, array: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where an array begins in the packed plan: after the header and all arrays before it."""
    numbers = tl.arange(0, 32)
    lengths = tl.load(plan + 2 + numbers, mask=numbers < array, other=0)
    return _HEADER + tl.sum(lengths)


@triton.jit
def _length_of(plan, array: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(plan + 2 + array)


@triton.jit
def _bind(plan, table, width, last_tokens, ints, floats):  # type: ignore[no-untyped-def]
    """Clear the page-table row and last token of each bound row, and take its parameters (floats as their bits)."""
    rows = plan + _begin_of(plan, _BIND_ROWS)
    new_ints = plan + _begin_of(plan, _BIND_INTS)
    new_floats = plan + _begin_of(plan, _BIND_FLOATS)
    lane = tl.arange(0, 8)
    for index in range(tl.program_id(0), _length_of(plan, _BIND_ROWS), tl.num_programs(0)):
        row = tl.load(rows + index).to(tl.int64)
        for first in range(0, width, 1024):
            column = first + tl.arange(0, 1024)
            tl.store(table + row * width + column, tl.zeros((1024,), tl.int32), mask=column < width)
        tl.store(last_tokens + row, tl.full((), 0, tl.int64))
        is_int, is_float = lane < _INTS, lane < _FLOATS
        tl.store(ints + row * _INTS + lane, tl.load(new_ints + index * _INTS + lane, mask=is_int), mask=is_int)
        given = tl.load(new_floats + index * _FLOATS + lane, mask=is_float)
        tl.store(floats + row * _FLOATS + lane, given, mask=is_float)


@triton.jit
def _write_runs(plan, table, width):  # type: ignore[no-untyped-def]
    """page_table[row, start : start + count] = the run's pages, for each run."""
    counts = plan + _begin_of(plan, _TABLE_COUNTS)
    pages = plan + _begin_of(plan, _TABLE_PAGES)
    rows = plan + _begin_of(plan, _TABLE_ROWS)
    starts = plan + _begin_of(plan, _TABLE_STARTS)
    for run in range(tl.program_id(0), _length_of(plan, _TABLE_ROWS), tl.num_programs(0)):
        before = 0
        for first in range(0, run, _CHUNK):
            other = first + tl.arange(0, _CHUNK)
            before += tl.sum(tl.load(counts + other, mask=other < run, other=0))
        count = tl.load(counts + run)
        target = table + tl.load(rows + run).to(tl.int64) * width + tl.load(starts + run)
        for first in range(0, count, 1024):
            index = first + tl.arange(0, 1024)
            inside = index < count
            tl.store(target + index, tl.load(pages + before + index, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["tokens_max", "rows_max", "places_max"])
def _lay_out(  # type: ignore[no-untyped-def]
    plan, table, width, last_tokens, tokens, positions, slots,
    rows, starts, counts, offsets, drafts, flags, indices, places_before,
    place_tokens, place_rows, place_depths, tokens_max, rows_max, places_max, PAGE: tl.constexpr,
):  # fmt: skip
    """Program i lays out plan row i, and fills element i of every list that the plan leaves short."""
    i = tl.program_id(0)
    rows_total = _length_of(plan, _ROWS)
    plan_counts = plan + _begin_of(plan, _COUNTS)
    plan_drafts = plan + _begin_of(plan, _DRAFTS)
    plan_flags = plan + _begin_of(plan, _FLAGS)
    offset, place, places_total = 0, 0, 0  # the first two: of this row
    for first in range(0, rows_total, _CHUNK):
        j = first + tl.arange(0, _CHUNK)
        inside = j < rows_total
        before = j < i
        row_tokens = tl.load(plan_counts + j, mask=inside, other=0)
        samples = (tl.load(plan_flags + j, mask=inside, other=0) & _SAMPLE) != 0
        row_places = tl.where(samples, tl.load(plan_drafts + j, mask=inside, other=0) + 1, 0)
        offset += tl.sum(tl.where(before, row_tokens, 0))
        place += tl.sum(tl.where(before, row_places, 0))
        places_total += tl.sum(row_places)
    if i < rows_total:
        row = tl.load(plan + _begin_of(plan, _ROWS) + i)
        start = tl.load(plan + _begin_of(plan, _STARTS) + i)
        count = tl.load(plan_counts + i)
        draft_count = tl.load(plan_drafts + i)
        flag = tl.load(plan_flags + i)
        tl.store(rows + i, row)
        tl.store(starts + i, start)
        tl.store(counts + i, count)
        tl.store(offsets + i, offset)
        tl.store(drafts + i, draft_count)
        tl.store(flags + i, flag)
        tl.store(indices + i, tl.load(plan + _begin_of(plan, _OUTPUT_INDICES) + i))
        tl.store(places_before + i, place)
        given = plan + _begin_of(plan, _TOKENS) + offset
        _lay_out_tokens(
            given, table + row.to(tl.int64) * width, tl.load(last_tokens + row).to(tl.int32), start, count, flag,
            tokens + offset, positions + offset, slots + offset, PAGE,
        )  # fmt: skip
        if (flag & _SAMPLE) != 0:
            first_place = offset + count - draft_count - 1
            _list_places(place_tokens, place_rows, place_depths, place, first_place, i, draft_count)
    elif i < rows_max:
        tl.store(rows + i, -1)
        tl.store(counts + i, 0)
        tl.store(flags + i, 0)
    _fill(tokens, i, _length_of(plan, _TOKENS), tokens_max, 0)
    _fill(positions, i, _length_of(plan, _TOKENS), tokens_max, 0)
    _fill(slots, i, _length_of(plan, _TOKENS), tokens_max, 0)
    _fill(place_tokens, i, places_total, places_max, 0)
    _fill(place_rows, i, places_total, places_max, -1)


@triton.jit
def _fill(target, i, length, size, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the value at i if it lies behind the list's own length."""
    if (i >= length) & (i < size):
        tl.store(target + i, VALUE)


@triton.jit
def _lay_out_tokens(  # type: ignore[no-untyped-def]
    given, pages, last_token, start, count, flag, tokens, positions, slots, PAGE: tl.constexpr
):
    """Tokens, positions and pool slots of one row; its first token may be the last that was sampled for it."""
    for first in range(0, count, _CHUNK):
        j = first + tl.arange(0, _CHUNK)
        inside = j < count
        position = start + j
        page = tl.load(pages + position // PAGE, mask=inside, other=0)
        token = tl.load(given + j, mask=inside, other=0)
        is_fed = (j == 0) & ((flag & _FROM_DEVICE) != 0)
        tl.store(tokens + j, tl.where(is_fed, last_token, token), mask=inside)
        tl.store(positions + j, position, mask=inside)
        tl.store(slots + j, page * PAGE + position % PAGE, mask=inside)


@triton.jit
def _list_places(  # type: ignore[no-untyped-def]
    place_tokens, place_rows, place_depths, place, first_token, row, draft_count
):
    """Write where one plan row samples: after its last token that is no draft, and after each draft."""
    for first in range(0, draft_count + 1, _CHUNK):
        depth = first + tl.arange(0, _CHUNK)
        inside = depth <= draft_count
        tl.store(place_tokens + place + depth, first_token + depth, mask=inside)
        tl.store(place_rows + place + depth, tl.zeros_like(depth) + row, mask=inside)
        tl.store(place_depths + place + depth, depth, mask=inside)
