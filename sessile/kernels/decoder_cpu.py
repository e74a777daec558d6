"""All layers of a decoder for a step of few tokens in one compiled call, on the CPU.

With few tokens the arithmetic of a layer takes a few hundred microseconds, and some forty tensor operations would cost
as much again. `Decoder.forward` is the twin that says what is computed; tests hold this to it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import carray
from torch import Tensor

from sessile.kernels.attention_cpu import WorkItems, attend_items, exponential
from sessile.kernels.compiled import (
    ParallelKernel,
    barrier,
    bits_from_float,
    float_from_bits,
    piece,
    pointer,
    thread_count,
    thread_number,
)
from sessile.kernels.linear_cpu import StoredWeight, multiply_stored, share_of

# Columns of the table of layers: addresses (0 where the model has none), and how each of the four weights is stored.
INPUT_NORM, POST_NORM, Q_NORM, K_NORM, KEYS, VALUES = range(6)
QKV, OUTPUT, GATE_UP, DOWN = 6, 10, 14, 18
KIND, WEIGHT, SCALES, BIAS = range(4)
COLUMNS = 22


@piece
def _norm_vector(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """out = x / rms(x) × weight, for vectors [k]; out may be x."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + epsilon)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@piece
def _rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """`_norm_vector` for each token of x [t, k]."""
    for t in range(x.shape[0]):
        _norm_vector(x[t], weight, epsilon, out[t])


@piece
def _product(x, layer, column, out):  # type: ignore[no-untyped-def]
    """This thread's share of the outputs of one linear layer, bias included: out [t, n] from x [t, k]."""
    first, last = share_of(out.shape[1])
    multiply_stored(x, out, layer[column + KIND], layer[column + WEIGHT], layer[column + SCALES], first, last)
    if layer[column + BIAS]:
        bias = carray(pointer(layer[column + BIAS]), (out.shape[1],), np.float32)
        for t in range(out.shape[0]):
            for row in range(first, last):
                out[t, row] += bias[row]


@piece
def _add_product(x, layer, column, product, residual):  # type: ignore[no-untyped-def]
    """residual += the linear layer of x, this thread's share; product is scratch of residual's shape."""
    _product(x, layer, column, product)
    first, last = share_of(residual.shape[1])
    for t in range(residual.shape[0]):
        for row in range(first, last):
            residual[t, row] += product[t, row]


@piece
def _gated_product(x, layer, product, out):  # type: ignore[no-untyped-def]
    """out [t, inner] = silu(gate) × up, this thread's share; product [t, 2 × inner] is scratch."""
    inner = out.shape[1]
    first, last = share_of(inner)
    for start in (0, inner):
        multiply_stored(
            x, product, layer[GATE_UP + KIND], layer[GATE_UP + WEIGHT], layer[GATE_UP + SCALES], start + first,
            start + last,
        )  # fmt: skip
    if layer[GATE_UP + BIAS]:
        bias = carray(pointer(layer[GATE_UP + BIAS]), (2 * inner,), np.float32)
        for t in range(out.shape[0]):
            for row in range(first, last):
                product[t, row] += bias[row]
                product[t, inner + row] += bias[inner + row]
    for t in range(out.shape[0]):
        for row in range(first, last):
            gate = product[t, row]
            # Of the two ways to write the sigmoid, the one whose exponential cannot overflow.
            decay = exponential(-abs(gate))
            share = (np.float32(1.0) if gate >= 0 else decay) / (np.float32(1.0) + decay)
            out[t, row] = gate * share * product[t, inner + row]


@piece
def _rotate(head, cosine, sine):  # type: ignore[no-untyped-def]
    """Rotate one head float32[d] in place by the angles [d / 2] of its position."""
    half = cosine.shape[0]
    for i in range(half):
        low, high = head[i], head[half + i]
        head[i] = low * cosine[i] - high * sine[i]
        head[half + i] = high * cosine[i] + low * sine[i]


@piece
def _narrow_into(values, target):  # type: ignore[no-untyped-def]
    """Store float32 values in a pool: as they are, or rounded to bfloat16, ties to even, as bits in uint16."""
    for i in range(values.shape[0]):
        if target.itemsize == 4:
            target[i] = values[i]
        else:
            bits = bits_from_float(values[i])
            rounded = np.uint32(bits) + np.uint32(0x7FFF) + ((np.uint32(bits) >> np.uint32(16)) & np.uint32(1))
            target[i] = np.uint16(rounded >> np.uint32(16))


@piece
def _rotate_and_store(qkv, heads, layer, epsilon, cosine, sine, slots, keys, values, query):  # type: ignore[no-untyped-def]
    """Norm and rotate queries into query [t, heads, d] and keys into the pool, and store values: this thread's share.

    qkv [t, heads + 2 × kv_heads, d], whose keys are changed in place.
    """
    tokens, all_heads, size = qkv.shape
    kv_heads = keys.shape[1]
    q_norm = carray(pointer(layer[Q_NORM]), (size,), np.float32)
    k_norm = carray(pointer(layer[K_NORM]), (size,), np.float32)
    for job in range(thread_number(), tokens * all_heads, thread_count()):
        t, head = job // all_heads, job % all_heads
        vector = qkv[t, head]
        if head < heads:
            if layer[Q_NORM]:
                _norm_vector(vector, q_norm, epsilon, vector)
            _rotate(vector, cosine[t], sine[t])
            for i in range(size):
                query[t, head, i] = vector[i]
        elif head < heads + kv_heads:
            if layer[K_NORM]:
                _norm_vector(vector, k_norm, epsilon, vector)
            _rotate(vector, cosine[t], sine[t])
            _narrow_into(vector, keys[slots[t], head - heads])
        else:
            _narrow_into(vector, values[slots[t], head - heads - kv_heads])


@piece
def _decode(arguments, dtype):  # type: ignore[no-untyped-def]
    """Every thread's share of every layer; arguments as `decode` packs them. Changes the residual stream."""
    a = carray(arguments, (27,), np.int64)
    layers, tokens, hidden, heads, kv_heads, size, inner = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    pool_slots, table_rows, row_pages, page_size, items = a[7], a[8], a[9], a[10], a[11]
    epsilon = float_from_bits(np.int32(a[12]))
    all_heads = heads + 2 * kv_heads
    layer_table = carray(pointer(a[13]), (layers, COLUMNS), np.int64)
    residual = carray(pointer(a[14]), (tokens, hidden), np.float32)
    cosine = carray(pointer(a[15]), (tokens, size // 2), np.float32)
    sine = carray(pointer(a[16]), (tokens, size // 2), np.float32)
    slots = carray(pointer(a[17]), (tokens,), np.int64)
    table = carray(pointer(a[18]), (table_rows, row_pages), np.int32)
    item_table, partials = a[19], a[20]
    qkv = carray(pointer(a[21]), (tokens, all_heads * size), np.float32)
    qkv_heads = carray(pointer(a[21]), (tokens, all_heads, size), np.float32)
    query = carray(pointer(a[22]), (tokens, heads, size), np.float32)
    attended = carray(pointer(a[23]), (tokens, heads, size), np.float32)
    attended_flat = carray(pointer(a[23]), (tokens, heads * size), np.float32)
    product = carray(pointer(a[24]), (tokens, hidden), np.float32)
    gate_up = carray(pointer(a[25]), (tokens, 2 * inner), np.float32)
    gated = carray(pointer(a[26]), (tokens, inner), np.float32)
    normed = np.empty((tokens, hidden), np.float32)  # each thread has its own: cheaper than to wait for another's
    for index in range(layers):
        layer = layer_table[index]
        keys = carray(pointer(layer[KEYS]), (pool_slots, kv_heads, size), dtype)
        values = carray(pointer(layer[VALUES]), (pool_slots, kv_heads, size), dtype)
        _rms_norm(residual, carray(pointer(layer[INPUT_NORM]), (hidden,), np.float32), epsilon, normed)
        _product(normed, layer, QKV, qkv)
        barrier()
        _rotate_and_store(qkv_heads, heads, layer, epsilon, cosine, sine, slots, keys, values, query)
        barrier()
        attend_items(query, keys, values, table, page_size, items, item_table, partials, attended)
        barrier()
        _add_product(attended_flat, layer, OUTPUT, product, residual)
        barrier()
        _rms_norm(residual, carray(pointer(layer[POST_NORM]), (hidden,), np.float32), epsilon, normed)
        _gated_product(normed, layer, gate_up, gated)
        barrier()
        _add_product(gated, layer, DOWN, product, residual)
        barrier()


@ParallelKernel
def _decode_float32(arguments):  # type: ignore[no-untyped-def]
    """All layers over a float32 pool."""
    _decode(arguments, np.float32)


@ParallelKernel
def _decode_bfloat16(arguments):  # type: ignore[no-untyped-def]
    """All layers over a bfloat16 pool."""
    _decode(arguments, np.uint16)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes that the layers share."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    epsilon: float


class LayerTable:
    """Addresses of everything that the layers read; keeps the tensors alive."""

    def __init__(self, layers: int) -> None:
        self.addresses: npt.NDArray[np.int64] = np.zeros((layers, COLUMNS), np.int64)
        self._kept: list[object] = []

    def put(self, layer: int, column: int, tensor: Tensor) -> None:
        """A norm's weight float32, or a layer of the pool."""
        assert tensor.is_contiguous()
        self.addresses[layer, column] = tensor.data_ptr()
        self._kept.append(tensor)

    def put_linear(self, layer: int, column: int, stored: StoredWeight, bias: Tensor | None) -> None:
        """One of the four linear layers, with its bias in float32."""
        assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
        address = 0 if bias is None else bias.data_ptr()
        self.addresses[layer, column : column + 4] = (stored.kind, *stored.addresses, address)
        self._kept += [stored, bias]


def decode(
    shape: DecoderShape,
    layers: LayerTable,
    residual: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    pool: Tensor,
    table: Tensor,
    items: WorkItems,
    page_size: int,
) -> None:
    """Run all layers: changes residual float32[t, hidden] in place and writes K and V of t tokens to the pool.

    angles: cosine and sine float32[t, head_dim / 2]. slots int64[t]. pool: keys [layers, slots, kv_heads, head_dim],
    for its shape and dtype; the layers' own addresses are in the table. table int32[rows_max, pages of a row]. items:
    of the t queries in order.
    """
    tokens, heads, kv_heads, size = residual.shape[0], shape.heads, shape.kv_heads, shape.head_dim
    cosine, sine = angles
    for tensor in (residual, cosine, sine):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape[0] == tokens
    assert residual.shape[1] == shape.hidden and cosine.shape[-1] == sine.shape[-1] == size // 2
    assert slots.dtype == torch.int64 and slots.is_contiguous() and slots.shape == (tokens,)
    assert table.dtype == torch.int32 and table.is_contiguous() and items.queries == tokens
    assert pool.is_contiguous() and pool.shape[2:] == (kv_heads, size) and pool.shape[0] == len(layers.addresses)
    widths = (heads + 2 * kv_heads) * size, heads * size, heads * size, shape.hidden, 2 * shape.inner, shape.inner
    scratch = np.empty(tokens * sum(widths), np.float32)
    starts = scratch.ctypes.data + 4 * tokens * (np.cumsum(widths) - widths)
    kernel = _decode_bfloat16 if pool.dtype == torch.bfloat16 else _decode_float32
    kernel(
        pool.shape[0], tokens, shape.hidden, heads, kv_heads, size, shape.inner, pool.shape[1], table.shape[0],
        table.shape[1], page_size, items.count, int(np.float32(shape.epsilon).view(np.int32)),
        layers.addresses.ctypes.data, residual.data_ptr(), cosine.data_ptr(), sine.data_ptr(), slots.data_ptr(),
        table.data_ptr(), items.table.ctypes.data, items.partials(heads, size).ctypes.data, *starts.tolist(),
    )  # fmt: skip
