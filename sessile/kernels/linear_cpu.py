"""Products of few tokens with stored weights on the CPU, compiled: weights are widened in registers as they stream by.

With few tokens a linear layer waits for memory, so what counts is to read each weight once, in its stored width.
"""

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sessile.kernels.compiled import FAST, ParallelKernel, pointer, thread_count, thread_number, widen
from sessile.kernels.reference import INT4_GROUP


@njit(nogil=True, fastmath=FAST)
def _multiply(x, weight, out, first, last):  # type: ignore[no-untyped-def]
    """out[:, first:last] = x [t, k] @ weight[first:last]ᵀ; four tokens share each widened weight."""
    tokens, size = x.shape
    for row in range(first, last):
        for t in range(0, tokens - 3, 4):
            sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0.0)
            for i in range(size):
                w = widen(weight[row, i])
                sum_0 += x[t, i] * w
                sum_1 += x[t + 1, i] * w
                sum_2 += x[t + 2, i] * w
                sum_3 += x[t + 3, i] * w
            out[t, row], out[t + 1, row], out[t + 2, row], out[t + 3, row] = sum_0, sum_1, sum_2, sum_3
        for t in range(tokens // 4 * 4, tokens):
            total = np.float32(0.0)
            for i in range(size):
                total += x[t, i] * widen(weight[row, i])
            out[t, row] = total


@njit(nogil=True, fastmath=FAST)
def _share(rows):  # type: ignore[no-untyped-def]
    """First and last row of this thread."""
    thread, threads = np.int64(thread_number()), np.int64(thread_count())
    return rows * thread // threads, rows * (thread + 1) // threads


@njit(nogil=True, fastmath=FAST)
def _linear(arguments, dtype):  # type: ignore[no-untyped-def]
    a = carray(arguments, (6,), np.int64)
    tokens, rows, size = a[:3]
    x = carray(pointer(a[3]), (tokens, size), np.float32)
    weight = carray(pointer(a[4]), (rows, size), dtype)
    out = carray(pointer(a[5]), (tokens, rows), np.float32)
    first, last = _share(rows)
    _multiply(x, weight, out, first, last)


@ParallelKernel
def _linear_float32(arguments):  # type: ignore[no-untyped-def]
    """x @ weightᵀ for float32 weights."""
    _linear(arguments, np.float32)


@ParallelKernel
def _linear_bfloat16(arguments):  # type: ignore[no-untyped-def]
    """x @ weightᵀ for bfloat16 weights."""
    _linear(arguments, np.uint16)


@ParallelKernel
def _linear_int8(arguments):  # type: ignore[no-untyped-def]
    """x @ (weight × scale of its row)ᵀ for int8 weights."""
    a = carray(arguments, (7,), np.int64)
    tokens, rows = a[:2]
    _linear(arguments, np.int8)
    out = carray(pointer(a[5]), (tokens, rows), np.float32)
    scales = carray(pointer(a[6]), (rows,), np.float32)
    first, last = _share(rows)
    for t in range(tokens):
        for row in range(first, last):
            out[t, row] *= scales[row]


@njit(nogil=True, fastmath=FAST)
def _unpack_group(packed, scale, minimum, group):  # type: ignore[no-untyped-def]
    """The 32 weights of 16 bytes, into group float32[32]."""
    for i in range(16):
        group[i] = np.float32(packed[i] & np.uint8(15)) * scale + minimum
    for i in range(16):
        group[i + 16] = np.float32(packed[i] >> np.uint8(4)) * scale + minimum


@njit(nogil=True, fastmath=FAST)
def _unpack_row(packed, scales, weights):  # type: ignore[no-untyped-def]
    """One row: packed uint8[k / 2], scales uint16[k / 32, 2] (bfloat16 scale and minimum) → weights float32[k]."""
    for group in range(scales.shape[0]):
        half, whole = group * 16, group * 32
        _unpack_group(
            packed[half : half + 16], widen(scales[group, 0]), widen(scales[group, 1]), weights[whole : whole + 32]
        )


@ParallelKernel
def _linear_int4(arguments):  # type: ignore[no-untyped-def]
    """x @ weightᵀ for int4 weights; each row is unpacked into the first-level cache and used for all tokens."""
    a = carray(arguments, (7,), np.int64)
    tokens, rows, size = a[:3]
    x = carray(pointer(a[3]), (tokens, size), np.float32)
    packed = carray(pointer(a[4]), (rows, size // 2), np.uint8)
    out = carray(pointer(a[5]), (tokens, rows), np.float32)
    scales = carray(pointer(a[6]), (rows, size // 32, 2), np.uint16)
    weights = np.empty((1, size), np.float32)
    first, last = _share(rows)
    for row in range(first, last):
        _unpack_row(packed[row], scales[row], weights[0])
        _multiply(x, weights, out[:, row : row + 1], 0, 1)


@ParallelKernel
def _unpack_int4(arguments):  # type: ignore[no-untyped-def]
    """All rows of int4 weights as float32."""
    a = carray(arguments, (5,), np.int64)
    rows, size = a[:2]
    packed = carray(pointer(a[2]), (rows, size // 2), np.uint8)
    scales = carray(pointer(a[3]), (rows, size // 32, 2), np.uint16)
    weights = carray(pointer(a[4]), (rows, size), np.float32)
    first, last = _share(rows)
    for row in range(first, last):
        _unpack_row(packed[row], scales[row], weights[row])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x float32[t, k] @ weight[n, k]ᵀ → float32[t, n]; weight float32 or bfloat16."""
    out = _product(x, weight, weight.shape[0])
    kernel = _linear_bfloat16 if weight.dtype == torch.bfloat16 else _linear_float32
    assert weight.dtype in (torch.bfloat16, torch.float32) and weight.shape[1] == x.shape[1]
    kernel(x.shape[0], weight.shape[0], x.shape[1], x.data_ptr(), weight.data_ptr(), out.data_ptr())
    return out


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x float32[t, k] @ (weight int8[n, k] × scales float32[n, 1])ᵀ → float32[t, n]."""
    out = _product(x, weight, weight.shape[0])
    assert weight.dtype == torch.int8 and weight.shape[1] == x.shape[1]
    assert scales.dtype == torch.float32 and scales.numel() == weight.shape[0]
    _linear_int8(x.shape[0], weight.shape[0], x.shape[1], x.data_ptr(), weight.data_ptr(), out.data_ptr(),
                 scales.data_ptr())  # fmt: skip
    return out


def linear_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x float32[t, k] @ weightᵀ → float32[t, n]; packed uint8[n, k / 2], scales bfloat16[n, k / 32, 2]."""
    out = _product(x, packed, packed.shape[0])
    _check_int4(packed, scales, x.shape[1])
    _linear_int4(x.shape[0], packed.shape[0], x.shape[1], x.data_ptr(), packed.data_ptr(), out.data_ptr(),
                 scales.data_ptr())  # fmt: skip
    return out


def unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """float32[n, k] of packed uint8[n, k / 2] and scales bfloat16[n, k / 32, 2]."""
    rows, size = packed.shape[0], packed.shape[1] * 2
    _check_int4(packed, scales, size)
    weights = torch.empty(rows, size, dtype=torch.float32)
    _unpack_int4(rows, size, packed.data_ptr(), scales.data_ptr(), weights.data_ptr())
    return weights


def _product(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The output of a product, its inputs checked: compiled code reads what it is told to."""
    assert x.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous() and x.dim() == 2
    return torch.empty(x.shape[0], rows, dtype=torch.float32)


def _check_int4(packed: Tensor, scales: Tensor, size: int) -> None:
    assert packed.dtype == torch.uint8 and packed.is_contiguous() and packed.shape[1] * 2 == size
    assert scales.dtype == torch.bfloat16 and scales.is_contiguous()
    assert scales.shape == (packed.shape[0], size // INT4_GROUP, 2) and size % INT4_GROUP == 0
