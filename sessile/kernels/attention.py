"""Attention over the paged KV pool behind one interface: `plan` once a step with host counts, `run` once a layer.

Decode rows and short queries read K and V in place through the page table; a prompt chunk gathers its history once a
layer and multiplies matrices.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sessile.kernels import reference
from sessile.kernels.linear import cpu_multiplies_bfloat16

SHORT_QUERY_TOKENS = 8
"""Rows with at most so many query tokens are attended query by query, in place."""


class AttentionStep(Protocol):
    """Attention of one step, ready to run layer by layer."""

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write K and V of the step's t tokens to the pool, then attend.

        query [t, heads, head_dim], key and value [t, kv_heads, head_dim] → [t, heads, head_dim].
        """
        ...


@dataclass(frozen=True)
class StepRows:
    """Which tokens of a step belong to which row; all on the host, int32[n].

    rows: batch rows. starts: tokens of the row before this step. counts: its tokens in this step, end to end in the
    order of rows.
    """

    rows: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]


@dataclass(frozen=True)
class PagedCache:
    """Views of the pool that attention reads and writes; owned by the device.

    keys, values: [layers, pages × page_size, kv_heads, head_dim]. table int32[rows_max, pages of a row]. key_scales,
    value_scales float32[layers, pages × page_size, kv_heads]: of keys and values in int8, for the C++ kernels alone.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    page_size: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@cache
def compiled_attention() -> ModuleType | None:
    """The compiled kernels, or None where numba or torch's OpenMP is not usable; `attention_name` tells which."""
    try:
        importlib.import_module("sessile.kernels.compiled").check_openmp()
        return importlib.import_module("sessile.kernels.attention_cpu")
    except (ImportError, OSError, AttributeError):
        return None


def attention_name() -> str:
    """What attends on the CPU: "numba", or "torch (numba is not usable)"."""
    return "numba" if compiled_attention() else "torch (numba is not usable)"


def prepare_attention(dtype: torch.dtype) -> None:
    """Compile the kernels that a step may need for a pool of this dtype, so that no step waits for it."""
    kernels = compiled_attention()
    if kernels is not None:
        kernels.prepare(dtype)


class CpuAttentionStep:
    """Attention of one step on the CPU. slots int64[t]: where each token's K and V go."""

    def __init__(self, cache: PagedCache, rows: StepRows, slots: Tensor) -> None:
        self._cache = cache
        self._slots = slots
        offsets = np.cumsum(rows.counts) - rows.counts
        short = rows.counts <= SHORT_QUERY_TOKENS
        self._shorts = _short_queries(cache, rows, offsets, short) if short.any() else None
        self._prompts = [
            _Prompt(cache, int(rows.rows[i]), int(rows.starts[i]), int(offsets[i]), int(rows.counts[i]))
            for i in np.flatnonzero(~short)
        ]

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)
        if self._shorts is not None and self._shorts.is_all:
            return self._shorts.run(keys, values, query).to(query.dtype)
        out = torch.empty_like(query)
        if self._shorts is not None:
            index = self._shorts.index
            out[index] = self._shorts.run(keys, values, query[index]).to(query.dtype)
        for prompt in self._prompts:
            span = prompt.span
            history = keys[prompt.history], values[prompt.history]
            out[span] = prompt_attention(query[span], key[span], value[span], *history)
        return out


class _Prompt:
    """A chunk of one row: its span of the step's tokens and the pool slots int64[past] of its history."""

    def __init__(self, cache: PagedCache, row: int, start: int, offset: int, count: int) -> None:
        self.span = slice(offset, offset + count)
        self.history = reference.row_slots(cache.table, row, start, cache.page_size)


class _TorchQueries:
    """Short queries through the gathering twin."""

    def __init__(self, cache: PagedCache, rows: Tensor, lengths: Tensor, index: Tensor, is_all: bool) -> None:
        self.index, self.is_all = index, is_all
        self._cache, self._rows, self._lengths = cache, rows, lengths

    def run(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        cache = self._cache
        return reference.paged_attention(query, keys, values, cache.table, self._rows, self._lengths, cache.page_size)


class _CompiledQueries:
    """Short queries through the compiled kernels."""

    def __init__(self, kernels: ModuleType, cache: PagedCache, rows: Tensor, lengths: Tensor, index: Tensor,
                 is_all: bool) -> None:  # fmt: skip
        self.index, self.is_all = index, is_all
        self._kernels, self._cache = kernels, cache
        self._items = kernels.WorkItems(rows.numpy(), lengths.numpy())

    def run(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        cache, query = self._cache, query.float().contiguous()
        out: Tensor = self._kernels.paged_attention(query, keys, values, cache.table, self._items, cache.page_size)
        return out


def _short_queries(
    cache: PagedCache, rows: StepRows, offsets: npt.NDArray[np.int64], short: npt.NDArray[np.bool_]
) -> _CompiledQueries | _TorchQueries:
    """Lay out the short rows query by query: batch row and visible tokens of each, and their index in the step."""
    counts = rows.counts[short]
    within = np.arange(counts.sum(), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
    index = torch.from_numpy(np.repeat(offsets[short], counts) + within)
    query_rows = torch.from_numpy(np.repeat(rows.rows[short], counts).astype(np.int32))
    lengths = torch.from_numpy((np.repeat(rows.starts[short], counts) + within + 1).astype(np.int32))
    kernels = compiled_attention()
    if kernels is None:
        return _TorchQueries(cache, query_rows, lengths, index, bool(short.all()))
    return _CompiledQueries(kernels, cache, query_rows, lengths, index, bool(short.all()))


def prompt_attention(query: Tensor, key: Tensor, value: Tensor, history_keys: Tensor, history_values: Tensor) -> Tensor:
    """Causal attention of a chunk that follows a history, in the query's dtype; shapes as in `reference`.

    Two unmasked-or-causal passes merged by their log-sum-exps: a mask of [t, past + t] would cost more than it hides.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    dtype = query.dtype if cpu_multiplies_bfloat16() else torch.float32
    parts = (query, key, value, history_keys, history_values)
    q, k, v, past_k, past_v = (part.to(dtype).transpose(0, 1).unsqueeze(0) for part in parts)
    own, own_sum = flash(q, k, v, 0.0, True)
    if past_k.shape[2]:
        past, past_sum = flash(q, past_k, past_v, 0.0, False)
        own = own + torch.sigmoid(past_sum - own_sum).unsqueeze(-1) * (past.float() - own)
    return own.to(query.dtype).squeeze(0).transpose(0, 1)
