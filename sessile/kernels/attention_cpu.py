"""Paged attention on the CPU, compiled: reads K and V in place through the page table, copies no history.

The work is cut into items of one query and at most SPLIT_TOKENS of its history, so that one long row keeps all
threads busy; partial results are merged by their running maxima (FlashDecoding, Dao et al., 2023).
"""

import numpy as np
import numpy.typing as npt
import torch
from numba import carray
from torch import Tensor

from sessile.kernels.compiled import (
    ParallelKernel,
    barrier,
    piece,
    pointer,
    thread_count,
    thread_number,
    two_to_the,
    widen,
)

SPLIT_TOKENS = 512
"""Most history tokens of one work item."""

TILE_TOKENS = 32
"""Tokens whose scores are taken together, so that exponentials and products run in vector registers."""


@piece
def exponential(x):  # type: ignore[no-untyped-def]
    """exp(x) for x ≤ 0 to 2 units in the last place, written out so that loops of it vectorise (Cephes)."""
    x = max(x, np.float32(-87.0))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * rest + np.float32(1.3981999507e-3)
    p = p * rest + np.float32(8.3334519073e-3)
    p = p * rest + np.float32(4.1665795894e-2)
    p = p * rest + np.float32(1.6666665459e-1)
    p = p * rest + np.float32(5.0000001201e-1)
    p = p * rest * rest + rest + np.float32(1.0)
    return p * two_to_the(whole)


@piece
def _score_tile(query, keys, slots, scores):  # type: ignore[no-untyped-def]
    """scores [heads, i] = query · key of slot i, for a multiple of four slots; four keys share each load of a query."""
    heads, size = query.shape
    group = heads // keys.shape[1]
    for i in range(0, slots.size, 4):
        for head in range(heads):
            key_0, key_1 = keys[slots[i], head // group], keys[slots[i + 1], head // group]
            key_2, key_3 = keys[slots[i + 2], head // group], keys[slots[i + 3], head // group]
            dot_0 = dot_1 = dot_2 = dot_3 = np.float32(0.0)
            for d in range(size):
                q = query[head, d]
                dot_0 += q * widen(key_0[d])
                dot_1 += q * widen(key_1[d])
                dot_2 += q * widen(key_2[d])
                dot_3 += q * widen(key_3[d])
            scores[head, i], scores[head, i + 1], scores[head, i + 2], scores[head, i + 3] = dot_0, dot_1, dot_2, dot_3


@piece
def _mix_tile(weights, values, slots, mixed):  # type: ignore[no-untyped-def]
    """mixed [heads, d] += weights [heads, i] × value of slot i, for a multiple of four slots."""
    heads, size = mixed.shape
    group = heads // values.shape[1]
    for i in range(0, slots.size, 4):
        for head in range(heads):
            value_0, value_1 = values[slots[i], head // group], values[slots[i + 1], head // group]
            value_2, value_3 = values[slots[i + 2], head // group], values[slots[i + 3], head // group]
            weight_0, weight_1 = weights[head, i], weights[head, i + 1]
            weight_2, weight_3 = weights[head, i + 2], weights[head, i + 3]
            for d in range(size):
                mixed[head, d] += (
                    weight_0 * widen(value_0[d]) + weight_1 * widen(value_1[d]) + weight_2 * widen(value_2[d])
                    + weight_3 * widen(value_3[d])
                )  # fmt: skip


@piece
def _weigh_tile(scores, count, scale, maxima, sums, mixed):  # type: ignore[no-untyped-def]
    """Turn the first count scores into weights against a new running maximum, and the others into zero."""
    for head in range(scores.shape[0]):
        top = maxima[head]
        for i in range(count):
            scores[head, i] *= scale
            top = max(top, scores[head, i])
        shrink = exponential(maxima[head] - top)
        total = np.float32(0.0)
        for i in range(count):
            weight = exponential(scores[head, i] - top)
            scores[head, i] = weight
            total += weight
        for i in range(count, TILE_TOKENS):
            scores[head, i] = np.float32(0.0)
        maxima[head] = top
        sums[head] = sums[head] * shrink + total
        for d in range(mixed.shape[1]):
            mixed[head, d] *= shrink


@piece
def _attend_item(query, keys, values, pages, page_size, first, last, maxima, sums, mixed):  # type: ignore[no-untyped-def]
    """One query [heads, d] over history tokens first … last - 1 of a row with these pages, into the item's partials.

    maxima, sums float32[heads] and mixed float32[heads, d] are overwritten: the running maximum of the scores, the sum
    of the exponentials, and the values weighted by them, not yet divided.
    """
    heads, size = query.shape
    scale = np.float32(1.0 / np.sqrt(size))
    scores = np.empty((heads, TILE_TOKENS), np.float32)
    slots = np.empty(TILE_TOKENS, np.int64)
    for head in range(heads):
        maxima[head] = np.float32(-3.0e38)
        sums[head] = np.float32(0.0)
        for d in range(size):
            mixed[head, d] = np.float32(0.0)
    for start in range(first, last, TILE_TOKENS):
        count = min(TILE_TOKENS, last - start)
        padded = (count + 3) // 4 * 4
        for i in range(padded):
            # A tile is filled up with its last token, whose copies get no weight.
            position = start + min(i, count - 1)
            slots[i] = np.int64(pages[position // page_size]) * page_size + position % page_size
        _score_tile(query, keys, slots[:padded], scores)
        _weigh_tile(scores, count, scale, maxima, sums, mixed)
        _mix_tile(scores, values, slots[:padded], mixed)


@piece
def _merge_query(maxima, sums, mixed, out):  # type: ignore[no-untyped-def]
    """Merge the partials [parts, heads], [parts, heads], [parts, heads, d] of one query into out [heads, d]."""
    parts, heads = maxima.shape
    for head in range(heads):
        top = maxima[0, head]
        for part in range(1, parts):
            top = max(top, maxima[part, head])
        total = np.float32(0.0)
        for part in range(parts):
            total += sums[part, head] * exponential(maxima[part, head] - top)
        for d in range(out.shape[1]):
            out[head, d] = np.float32(0.0)
        for part in range(parts):
            share = exponential(maxima[part, head] - top) / total
            for d in range(out.shape[1]):
                out[head, d] += mixed[part, head, d] * share


@piece
def attend_items(query, keys, values, table, page_size, items, item_table, scratch, out):  # type: ignore[no-untyped-def]
    """This thread's share of the items, a barrier, then its share of the merges.

    query, out float32[n, heads, d]; keys, values [slots, kv_heads, d]; item_table and scratch: addresses of
    `WorkItems.table` with so many items, and of its `partials`.
    """
    queries, heads, size = query.shape
    work = carray(pointer(item_table), (4, items), np.int32)
    query_items = carray(pointer(item_table + 16 * items), (queries + 1,), np.int32)
    maxima = carray(pointer(scratch), (items, heads), np.float32)
    sums = carray(pointer(scratch + 4 * items * heads), (items, heads), np.float32)
    mixed = carray(pointer(scratch + 8 * items * heads), (items, heads, size), np.float32)
    thread, threads = thread_number(), thread_count()
    for item in range(thread, items, threads):
        _attend_item(
            query[work[0, item]], keys, values, table[work[1, item]], page_size, work[2, item], work[3, item],
            maxima[item], sums[item], mixed[item],
        )  # fmt: skip
    barrier()
    for index in range(thread, queries, threads):
        first, last = query_items[index], query_items[index + 1]
        _merge_query(maxima[first:last], sums[first:last], mixed[first:last], out[index])


@piece
def _attend(arguments, dtype):  # type: ignore[no-untyped-def]
    """`attend_items` with the arguments that `paged_attention` packs."""
    a = carray(arguments, (16,), np.int64)
    queries, heads, kv_heads, size, slots, row_pages, table_rows = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    query = carray(pointer(a[9]), (queries, heads, size), np.float32)
    keys = carray(pointer(a[10]), (slots, kv_heads, size), dtype)
    values = carray(pointer(a[11]), (slots, kv_heads, size), dtype)
    out = carray(pointer(a[12]), (queries, heads, size), np.float32)
    table = carray(pointer(a[13]), (table_rows, row_pages), np.int32)
    attend_items(query, keys, values, table, a[7], a[8], a[14], a[15], out)


@ParallelKernel
def _attend_float32(arguments):  # type: ignore[no-untyped-def]
    """Paged attention over a float32 pool."""
    _attend(arguments, np.float32)


@ParallelKernel
def _attend_bfloat16(arguments):  # type: ignore[no-untyped-def]
    """Paged attention over a bfloat16 pool."""
    _attend(arguments, np.uint16)


def prepare(dtype: torch.dtype) -> None:
    """Compile what `paged_attention` needs for a pool of this dtype."""
    (_attend_bfloat16 if dtype == torch.bfloat16 else _attend_float32).prepare()


class WorkItems:
    """How the queries of a step are cut: made once a step, used by every layer.

    rows, lengths int32[n]: batch row of each query and how many tokens it sees, its own included.
    """

    def __init__(self, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> None:
        parts = -(-lengths // SPLIT_TOKENS)
        queries = np.repeat(np.arange(len(lengths)), parts)
        index = np.concatenate(([0], np.cumsum(parts)))
        starts = (np.arange(len(queries)) - index[queries]) * SPLIT_TOKENS
        ends = np.minimum(starts + SPLIT_TOKENS, lengths[queries])
        self.queries = len(lengths)
        self.count = len(queries)
        # [4, m]: query, batch row, first history token and end of each item; then [n + 1]: the first item of a query.
        self.table = np.concatenate((queries, rows[queries], starts, ends, index)).astype(np.int32)
        self._partials = np.empty(0, np.float32)

    def partials(self, heads: int, size: int) -> npt.NDArray[np.float32]:
        """Scratch for one layer at a time."""
        if self._partials.size != self.count * heads * (size + 2):
            self._partials = np.empty(self.count * heads * (size + 2), np.float32)
        return self._partials


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, items: WorkItems, page_size: int
) -> Tensor:
    """Attention of single queries over paged K and V: float32[n, heads, head_dim]; see `reference`.

    query float32[n, heads, head_dim]; keys, values [slots, kv_heads, head_dim] in float32 or bfloat16; table
    int32[rows_max, pages of a row].
    """
    count, heads, size = query.shape
    slots, kv_heads, _ = keys.shape
    assert query.dtype == torch.float32 and query.is_contiguous() and count == items.queries
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    assert keys.dtype == values.dtype and keys.shape[2] == size and heads % kv_heads == 0
    assert table.is_contiguous() and table.dtype == torch.int32
    out = torch.empty_like(query)
    kernel = _attend_bfloat16 if keys.dtype == torch.bfloat16 else _attend_float32
    kernel(
        count, heads, kv_heads, size, slots, table.shape[1], table.shape[0], page_size, items.count, query.data_ptr(),
        keys.data_ptr(), values.data_ptr(), out.data_ptr(), table.data_ptr(), items.table.ctypes.data,
        items.partials(heads, size).ctypes.data,
    )  # fmt: skip
    return out
