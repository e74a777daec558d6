"""Paged attention on the CPU, compiled: reads K and V in place through the page table, copies no history.

The work is cut into items of one query and at most SPLIT_TOKENS of its history, so that one long row keeps all
threads busy; partial results are merged by their running maxima (FlashDecoding, Dao et al., 2023).
"""

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, njit
from torch import Tensor

from sessile.kernels.compiled import (
    FAST,
    ParallelKernel,
    barrier,
    float_from_bits,
    pointer,
    thread_count,
    thread_number,
    widen,
)

SPLIT_TOKENS = 512
"""Most history tokens of one work item."""

TILE_TOKENS = 32
"""Tokens whose scores are taken together, so that exponentials and products run in vector registers."""


@njit(inline="always", fastmath=FAST)
def _exponential(x):  # type: ignore[no-untyped-def]
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
    return p * float_from_bits(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@njit(nogil=True, fastmath=FAST)
def _attend_item(query, keys, values, pages, page_size, first, last, maxima, sums, mixed):  # type: ignore[no-untyped-def]
    """One query [heads, d] over history tokens first … last - 1 of a row with these pages, into the item's partials.

    maxima, sums float32[heads] and mixed float32[heads, d] are overwritten: the running maximum of the scores, the sum
    of the exponentials, and the values weighted by them, not yet divided.
    """
    heads, size = query.shape
    group = heads // keys.shape[1]
    scale = np.float32(1.0 / np.sqrt(size))
    scores = np.empty((heads, TILE_TOKENS), np.float32)
    slots = np.empty(TILE_TOKENS, np.int64)
    maxima[:] = np.float32(-3.0e38)
    sums[:] = np.float32(0.0)
    mixed[:] = np.float32(0.0)
    for start in range(first, last, TILE_TOKENS):
        count = min(TILE_TOKENS, last - start)
        for i in range(count):
            position = start + i
            slot = np.int64(pages[position // page_size]) * page_size + position % page_size
            slots[i] = slot
            for head in range(heads):
                dot = np.float32(0.0)
                key = keys[slot, head // group]
                for d in range(size):
                    dot += query[head, d] * widen(key[d])
                scores[head, i] = dot * scale
        for head in range(heads):
            top = maxima[head]
            for i in range(count):
                top = max(top, scores[head, i])
            shrink = _exponential(maxima[head] - top)
            total = np.float32(0.0)
            for i in range(count):
                weight = _exponential(scores[head, i] - top)
                scores[head, i] = weight
                total += weight
            maxima[head] = top
            sums[head] = sums[head] * shrink + total
            for d in range(size):
                mixed[head, d] *= shrink
        for i in range(count):
            for head in range(heads):
                weight = scores[head, i]
                value = values[slots[i], head // group]
                for d in range(size):
                    mixed[head, d] += weight * widen(value[d])


@njit(nogil=True, fastmath=FAST)
def _merge_query(maxima, sums, mixed, out):  # type: ignore[no-untyped-def]
    """Merge the partials [parts, heads], [parts, heads], [parts, heads, d] of one query into out [heads, d]."""
    parts, heads = maxima.shape
    for head in range(heads):
        top = maxima[0, head]
        for part in range(1, parts):
            top = max(top, maxima[part, head])
        total = np.float32(0.0)
        for part in range(parts):
            total += sums[part, head] * _exponential(maxima[part, head] - top)
        out[head] = np.float32(0.0)
        for part in range(parts):
            share = _exponential(maxima[part, head] - top) / total
            for d in range(out.shape[1]):
                out[head, d] += mixed[part, head, d] * share


@njit(nogil=True, fastmath=FAST)
def _attend(arguments, dtype):  # type: ignore[no-untyped-def]
    """Every thread's share of the items, then of the merges; arguments as `WorkItems.attend` packs them."""
    a = carray(arguments, (19,), np.int64)
    queries, heads, kv_heads, size, slots, row_pages, table_rows, page_size, items = a[:9]
    query = carray(pointer(a[9]), (queries, heads, size), np.float32)
    keys = carray(pointer(a[10]), (slots, kv_heads, size), dtype)
    values = carray(pointer(a[11]), (slots, kv_heads, size), dtype)
    table = carray(pointer(a[12]), (table_rows, row_pages), np.int32)
    item_table = carray(pointer(a[13]), (4, items), np.int32)
    query_items = carray(pointer(a[14]), (queries + 1,), np.int32)
    maxima = carray(pointer(a[15]), (items, heads), np.float32)
    sums = carray(pointer(a[16]), (items, heads), np.float32)
    mixed = carray(pointer(a[17]), (items, heads, size), np.float32)
    out = carray(pointer(a[18]), (queries, heads, size), np.float32)
    thread, threads = thread_number(), thread_count()
    for item in range(thread, items, threads):
        index, row, start, end = item_table[:, item]
        _attend_item(
            query[index], keys, values, table[row], page_size, start, end, maxima[item], sums[item], mixed[item]
        )
    barrier()
    for index in range(thread, queries, threads):
        first, last = query_items[index], query_items[index + 1]
        _merge_query(maxima[first:last], sums[first:last], mixed[first:last], out[index])


@ParallelKernel
def _attend_float32(arguments):  # type: ignore[no-untyped-def]
    """Paged attention over a float32 pool."""
    _attend(arguments, np.float32)


@ParallelKernel
def _attend_bfloat16(arguments):  # type: ignore[no-untyped-def]
    """Paged attention over a bfloat16 pool."""
    _attend(arguments, np.uint16)


class WorkItems:
    """How the queries of a step are cut: made once a step, used by every layer.

    rows, lengths int32[n]: batch row of each query and how many tokens it sees, its own included. table
    int32[rows_max, pages of a row].
    """

    def __init__(self, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], table: Tensor, page_size: int):
        assert table.is_contiguous() and table.dtype == torch.int32
        self._table = table
        self._page_size = page_size
        parts = -(-lengths // SPLIT_TOKENS)
        self._query_items = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(parts, out=self._query_items[1:])
        queries = np.repeat(np.arange(len(lengths)), parts)
        starts = (np.arange(len(queries)) - self._query_items[queries]) * SPLIT_TOKENS
        ends = np.minimum(starts + SPLIT_TOKENS, lengths[queries])
        # One row each: query, batch row, first history token, end of history.
        self._items = np.ascontiguousarray(np.stack((queries, rows[queries], starts, ends)), np.int32)
        self._partials = np.empty(0, np.float32)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of single queries over paged K and V: float32[n, heads, head_dim]; see `reference`.

        query float32[n, heads, head_dim]; keys, values [slots, kv_heads, head_dim] in float32 or bfloat16.
        """
        count, heads, size = query.shape
        slots, kv_heads, _ = keys.shape
        assert query.dtype == torch.float32 and query.is_contiguous() and count == len(self._query_items) - 1
        assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
        assert keys.dtype == values.dtype and keys.shape[2] == size and heads % kv_heads == 0
        items = self._items.shape[1]
        if self._partials.size != items * heads * (size + 2):
            self._partials = np.empty(items * heads * (size + 2), np.float32)
        maxima = self._partials.ctypes.data
        out = torch.empty_like(query)
        kernel = _attend_bfloat16 if keys.dtype == torch.bfloat16 else _attend_float32
        kernel(
            count, heads, kv_heads, size, slots, self._table.shape[1], self._table.shape[0], self._page_size, items,
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), self._table.data_ptr(), self._items.ctypes.data,
            self._query_items.ctypes.data, maxima, maxima + 4 * items * heads, maxima + 8 * items * heads,
            out.data_ptr(),
        )  # fmt: skip
        return out
