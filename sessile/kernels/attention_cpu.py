"""Paged attention on the CPU, compiled by numba: reads K and V in place through the page table, copies no history.

The work is cut into items of one query and at most SPLIT_TOKENS of its history, so that one long row keeps all
threads busy; partial results are merged by their running maxima (FlashDecoding, Dao et al., 2023).
"""

import numba
import numpy as np
import numpy.typing as npt
from numba import njit, prange
from numba.extending import overload

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

SPLIT_TOKENS = 512
"""Most history tokens of one work item."""

TILE_TOKENS = 32
"""Tokens whose scores are taken together, so that exponentials and products run in vector registers."""

# Sums may be reordered, which is what lets a dot product use vectors; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


def _widen(element):  # type: ignore[no-untyped-def]
    """A pool element as float32: float32 itself, or the bits of a bfloat16 in a uint16."""
    return element


@overload(_widen, inline="always")
def _widen_typed(element):  # type: ignore[no-untyped-def]
    if isinstance(element, numba.types.Integer):
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: np.float32(element)


@njit(inline="always", fastmath=_FAST)
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
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, fastmath=_FAST, cache=True)
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
                    dot += query[head, d] * _widen(key[d])
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
                    mixed[head, d] += weight * _widen(value[d])


@njit(nogil=True, fastmath=_FAST, cache=True)
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


@njit(nogil=True, parallel=True, fastmath=_FAST, cache=True)
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, table, rows, page_size, item_queries, item_starts, item_ends, query_items, out
):
    """All items in parallel, then all merges in parallel."""
    items = item_queries.size
    heads, size = query.shape[1:]
    maxima = np.empty((items, heads), np.float32)
    sums = np.empty((items, heads), np.float32)
    mixed = np.empty((items, heads, size), np.float32)
    for item in prange(items):
        index = item_queries[item]
        _attend_item(
            query[index], keys, values, table[rows[index]], page_size, item_starts[item], item_ends[item],
            maxima[item], sums[item], mixed[item],
        )  # fmt: skip
    for index in prange(query.shape[0]):
        first, last = query_items[index], query_items[index + 1]
        _merge_query(maxima[first:last], sums[first:last], mixed[first:last], out[index])


class WorkItems:
    """How the queries of a step are cut: made once a step, used by every layer.

    queries, starts, ends int32[items]: query and history range of each item; query_items int32[n + 1]: the items of
    query i are query_items[i] … query_items[i + 1] - 1.
    """

    def __init__(self, lengths: Ints) -> None:
        parts = -(-lengths // SPLIT_TOKENS)
        self.query_items = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(parts, out=self.query_items[1:])
        self.queries = np.repeat(np.arange(len(lengths), dtype=np.int32), parts)
        part = np.arange(len(self.queries), dtype=np.int32) - self.query_items[self.queries]
        self.starts = (part * SPLIT_TOKENS).astype(np.int32)
        self.ends = np.minimum(self.starts + SPLIT_TOKENS, lengths[self.queries]).astype(np.int32)


def paged_attention(
    query: Floats,
    keys: npt.NDArray[np.generic],
    values: npt.NDArray[np.generic],
    table: Ints,
    rows: Ints,
    items: WorkItems,
    page_size: int,
    out: Floats,
) -> None:
    """Attention of single queries over paged K and V; writes out float32[n, heads, head_dim] and nothing else.

    query float32[n, heads, head_dim]; keys, values [slots, kv_heads, head_dim] as float32, or bfloat16 bits in uint16;
    table int32[rows_max, pages]; rows int32[n]: batch row of each query.
    """
    _attend(
        query, keys, values, table, rows, page_size, items.queries, items.starts, items.ends, items.query_items, out
    )
