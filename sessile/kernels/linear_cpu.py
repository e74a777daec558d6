"""Products of few tokens with stored weights on the CPU, compiled: weights are widened in registers as they stream by.

With few tokens a linear layer waits for memory, so what counts is to read each weight once, in its stored width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sessile.kernels.compiled import (
    ParallelKernel,
    piece,
    pointer,
    thread_count,
    thread_number,
    unpack_nibbles,
    widen,
)
from sessile.kernels.reference import INT4_GROUP

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
"""How weights [n, k] are stored: plain; int8 with a scale float32[n]; two int4 a byte, uint8[n, k / 2], with scale and
minimum as bfloat16[n, k / 32, 2]."""

ROW_TILE = 8
"""Rows of weights that stay in the first-level cache while all tokens pass over them."""


@piece
def multiply_rows(x, weight, out, first, last):  # type: ignore[no-untyped-def]
    """out[:, first:last] = x [t, k] @ weight[first:last]ᵀ; four tokens share each widened weight."""
    tokens, size = x.shape
    for tile in range(first, last, ROW_TILE):
        end = min(tile + ROW_TILE, last)
        for t in range(0, tokens - 3, 4):
            for row in range(tile, end):
                sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0.0)
                for i in range(size):
                    w = widen(weight[row, i])
                    sum_0 += x[t, i] * w
                    sum_1 += x[t + 1, i] * w
                    sum_2 += x[t + 2, i] * w
                    sum_3 += x[t + 3, i] * w
                out[t, row], out[t + 1, row], out[t + 2, row], out[t + 3, row] = sum_0, sum_1, sum_2, sum_3
        for t in range(tokens // 4 * 4, tokens):
            for row in range(tile, end):
                total = np.float32(0.0)
                for i in range(size):
                    total += x[t, i] * widen(weight[row, i])
                out[t, row] = total


@piece
def share_of(rows):  # type: ignore[no-untyped-def]
    """First and last row of this thread."""
    thread, threads = np.int64(thread_number()), np.int64(thread_count())
    return rows * thread // threads, rows * (thread + 1) // threads


@piece
def _unpack_row(packed, scales, weights):  # type: ignore[no-untyped-def]
    """One row: packed uint8[k / 2], scales uint16[k / 32, 2] (bfloat16 scale and minimum) → weights float32[k]."""
    source, target = packed.ctypes.data, weights.ctypes.data
    for group in range(scales.shape[0]):
        unpack_nibbles(
            np.int64(source + 16 * group), np.int64(target + 128 * group), widen(scales[group, 0]),
            widen(scales[group, 1]),
        )  # fmt: skip


@piece
def multiply_stored(x, out, kind, address, scales_address, first, last):  # type: ignore[no-untyped-def]
    """out[:, first:last] = x @ weightᵀ for rows of weights stored as `kind` at an address; n, k from out and x."""
    rows, size = out.shape[1], x.shape[1]
    if kind == FLOAT32:
        multiply_rows(x, carray(pointer(address), (rows, size), np.float32), out, first, last)
    elif kind == BFLOAT16:
        multiply_rows(x, carray(pointer(address), (rows, size), np.uint16), out, first, last)
    elif kind == INT8:
        multiply_rows(x, carray(pointer(address), (rows, size), np.int8), out, first, last)
        scales = carray(pointer(scales_address), (rows,), np.float32)
        for t in range(x.shape[0]):
            for row in range(first, last):
                out[t, row] *= scales[row]
    else:
        packed = carray(pointer(address), (rows, size // 2), np.uint8)
        group_scales = carray(pointer(scales_address), (rows, size // INT4_GROUP, 2), np.uint16)
        unpacked = np.empty((ROW_TILE, size), np.float32)
        for tile in range(first, last, ROW_TILE):
            count = min(ROW_TILE, last - tile)
            for i in range(count):
                _unpack_row(packed[tile + i], group_scales[tile + i], unpacked[i])
            multiply_rows(x, unpacked, out[:, tile : tile + count], 0, count)


@ParallelKernel
def _linear(arguments):  # type: ignore[no-untyped-def]
    """x @ weightᵀ; every thread takes a share of the rows."""
    a = carray(arguments, (8,), np.int64)
    tokens, rows, size, kind = a[0], a[1], a[2], a[3]
    x = carray(pointer(a[4]), (tokens, size), np.float32)
    out = carray(pointer(a[5]), (tokens, rows), np.float32)
    first, last = share_of(rows)
    multiply_stored(x, out, kind, a[6], a[7], first, last)


@ParallelKernel
def _unpack_int4(arguments):  # type: ignore[no-untyped-def]
    """All rows of int4 weights as float32."""
    a = carray(arguments, (5,), np.int64)
    rows, size = a[0], a[1]
    packed = carray(pointer(a[2]), (rows, size // 2), np.uint8)
    scales = carray(pointer(a[3]), (rows, size // 32, 2), np.uint16)
    weights = carray(pointer(a[4]), (rows, size), np.float32)
    first, last = share_of(rows)
    for row in range(first, last):
        _unpack_row(packed[row], scales[row], weights[row])


@dataclass(frozen=True)
class StoredWeight:
    """Where weights lie and how; keeps their tensors alive. scales: of int8 and int4, else None."""

    kind: int
    rows: int
    size: int
    weight: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        dtypes = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, INT8: torch.int8, INT4: torch.uint8}
        assert self.weight.is_contiguous() and self.weight.dtype == dtypes[self.kind]
        assert self.weight.shape == (self.rows, self.size // 2 if self.kind == INT4 else self.size)
        if self.kind == INT8:
            assert self.scales is not None and self.scales.is_contiguous() and self.scales.dtype == torch.float32
            assert self.scales.numel() == self.rows
        if self.kind == INT4:
            assert self.scales is not None and self.scales.is_contiguous() and self.scales.dtype == torch.bfloat16
            assert self.scales.shape == (self.rows, self.size // INT4_GROUP, 2) and self.size % INT4_GROUP == 0

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the weights and of their scales (0 without)."""
        return self.weight.data_ptr(), 0 if self.scales is None else self.scales.data_ptr()


def linear(x: Tensor, stored: StoredWeight) -> Tensor:
    """x float32[t, k] @ weightᵀ → float32[t, n]."""
    assert x.dtype == torch.float32 and x.is_contiguous() and x.dim() == 2 and x.shape[1] == stored.size
    out = torch.empty(x.shape[0], stored.rows, dtype=torch.float32)
    _linear(x.shape[0], stored.rows, stored.size, stored.kind, x.data_ptr(), out.data_ptr(), *stored.addresses)
    return out


def unpack_int4(stored: StoredWeight) -> Tensor:
    """float32[n, k] of int4 weights."""
    assert stored.kind == INT4
    weights = torch.empty(stored.rows, stored.size, dtype=torch.float32)
    _unpack_int4(stored.rows, stored.size, *stored.addresses, weights.data_ptr())
    return weights
