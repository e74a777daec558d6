"""Unpack the block formats of GGUF to float32. Layouts: ggml-common.h and ggml-quants.c of ggml.

Each function takes uint8[blocks, bytes a block] and returns float32[blocks, weights a block]; scales are float16.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sessile.errors import StartupError
from sessile.gguf import GgufTensor
from sessile.kernels.packing import BYTES, NIBBLES

Blocks = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 1024


def dequantize(tensor: GgufTensor) -> Floats:
    """float32 array of the tensor's shape; a view of the mapping where it is stored as F32, else fresh.

    Raises StartupError for a format that we do not read.
    """
    plain = {"F32": "<f4", "F16": "<f2"}.get(tensor.type)
    if plain:
        return tensor.raw.view(plain).astype(np.float32, copy=False).reshape(tensor.shape)
    if tensor.type == "BF16":
        return (tensor.raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    if tensor.type not in _BLOCKS:
        raise StartupError(
            f"tensor {tensor.name!r} is stored as {tensor.type}, which is not supported; use a file with "
            f"{', '.join(_BLOCKS)}, F16, BF16 or F32."
        )
    block_bytes, unpack = _BLOCKS[tensor.type]
    return unpack(tensor.raw.reshape(-1, block_bytes)).reshape(tensor.shape)


def dequantized_rows(tensor: GgufTensor) -> Iterator[Floats]:
    """`dequantize` of a matrix, float32[some rows, columns] at a time."""
    rows, columns = tensor.shape
    row_bytes = tensor.raw.size // rows
    for first in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - first)
        raw = tensor.raw[first * row_bytes : (first + count) * row_bytes]
        yield dequantize(replace(tensor, shape=(count, columns), raw=raw))


Halves = npt.NDArray[np.float16]


def stored_groups(tensor: GgufTensor) -> tuple[int, npt.NDArray[Any], Halves, Halves | None] | None:
    """Kind, numbers, scales and minima as they are stored, in the shapes of `packing.Groups`.

    None for a format that is no number × scale (+ minimum) of 32 weights each. Nothing is rounded but the scales and
    minima of Q4_K, which are products of two numbers, to float16: that moves a weight by a hundredth of its step.
    """
    if tensor.type not in _GROUPED or len(tensor.shape) != 2:
        return None
    rows = tensor.shape[0]
    blocks = tensor.raw.reshape(-1, _BLOCKS[tensor.type][0])
    if tensor.type == "Q4_K":
        return _q4_k_groups(blocks, rows)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").reshape(rows, -1)
    if tensor.type == "Q8_0":
        return BYTES, np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(rows, -1, 32), scales, None
    if tensor.type == "Q5_0":
        fives = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).view(np.int8) - np.int8(16)
        return BYTES, fives.reshape(rows, -1, 32), scales, None
    if tensor.type == "Q4_1":
        minima = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").reshape(rows, -1)
        return NIBBLES, np.ascontiguousarray(blocks[:, 4:]).reshape(rows, -1, 16), scales, minima
    minima = scales * np.float16(-8)
    if not np.isfinite(minima).all():
        return None
    return NIBBLES, np.ascontiguousarray(blocks[:, 2:]).reshape(rows, -1, 16), scales, minima


_GROUPED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K")


def _q4_k_groups(blocks: Blocks, rows: int) -> tuple[int, npt.NDArray[Any], Halves, Halves | None] | None:
    """`stored_groups` of Q4_K: 64 weights lie in 32 bytes, those of one group below those of the next."""
    with np.errstate(over="ignore"):
        scales, minima = (part.astype(np.float16).reshape(rows, -1) for part in _q4_k_scales(blocks))
    if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
        return None
    quarters = blocks[:, 16:].reshape(-1, 4, 1, 2, 16)
    first, second = quarters[..., 0, :], quarters[..., 1, :]
    numbers = np.concatenate((first & 15 | second << 4, first >> 4 | second & 240), axis=2)
    return NIBBLES, numbers.reshape(rows, -1, 16), scales, -minima


def _half(blocks: Blocks, start: int) -> Floats:
    """The float16 at byte start of each block, float32[blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Blocks) -> npt.NDArray[np.uint8]:
    """Low halves of the bytes, then high halves."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _fifth_bits(blocks: Blocks, start: int) -> npt.NDArray[np.uint8]:
    """32 bits from byte start on, as the fifth bit (16) of 32 weights."""
    bits: npt.NDArray[np.uint8] = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return bits * np.uint8(16)


def _q8_0(blocks: Blocks) -> Floats:
    weights = blocks[:, 2:].view(np.int8).astype(np.float32)
    weights *= _half(blocks, 0)
    return weights


def _q4_0(blocks: Blocks) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: Blocks) -> Floats:
    weights = _nibbles(blocks[:, 4:]).astype(np.float32)
    weights *= _half(blocks, 0)
    weights += _half(blocks, 2)
    return weights


def _q5_0(blocks: Blocks) -> Floats:
    fives = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (fives.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: Blocks) -> Floats:
    fives = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return fives.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q4_k(blocks: Blocks) -> Floats:
    """256 weights: 8 groups of 32."""
    scales, minima = _q4_k_scales(blocks)
    quarters = blocks[:, 16:].reshape(-1, 4, 32)
    fours = np.stack((quarters & 15, quarters >> 4), axis=2).reshape(-1, 8, 32).astype(np.float32)
    return (fours * scales[:, :, None] - minima[:, :, None]).reshape(-1, 256)


def _q4_k_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """Scales and what is to be subtracted, of each group: two times eight 6-bit numbers are packed in 12 bytes."""
    packed = blocks[:, 4:16]
    low, high = packed[:, 8:] & 15, packed[:, 8:] >> 4
    scales = np.concatenate((packed[:, 0:4] & 63, low | (packed[:, 0:4] >> 6 << 4)), axis=1).astype(np.float32)
    minima = np.concatenate((packed[:, 4:8] & 63, high | (packed[:, 4:8] >> 6 << 4)), axis=1).astype(np.float32)
    return scales * _half(blocks, 0), minima * _half(blocks, 2)


def _q6_k(blocks: Blocks) -> Floats:
    """256 weights: 16 groups of 16, each with an int8 scale; 4 low bits and 2 high bits lie apart."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = np.concatenate((low & 15, low >> 4), axis=2)
    twos = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    sixes = (fours | twos << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return (sixes * scales[:, :, None]).reshape(-1, 256)


_BLOCKS: dict[str, tuple[int, Callable[[Blocks], Floats]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q6_K": (210, _q6_k),
}
"""Type → (bytes a block, function)."""
