"""Weights in the layout that the C++ kernels stream: blocks of 16 rows, pairs of neighbouring columns together.

cpp/linear.h draws the layouts. Rows are filled up with zeros to a multiple of 32, columns are a multiple of 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sessile.units import ceil_div

FLOAT32, BFLOAT16, NIBBLES, BYTES = range(4)
"""Kinds, as cpp/linear.h numbers them."""

GROUP = 32
"""Weights of one row that share a scale."""
_ROWS_AT_ONCE = 1024
"""Rows that are packed at once, so that what lies between stays in the cache; whole pairs of blocks."""
_SMALLEST_SCALE = 2.0**-24
"""Of float16."""


@dataclass(frozen=True)
class Groups:
    """Quantised weights, not yet packed: weight = scale × number + minimum.

    numbers: for NIBBLES uint8[rows, groups, 16], of which byte i has weight i in its low and weight 16 + i in its high
    half, as GGUF has them; for BYTES int8[rows, groups, 32]. scales float16[rows, groups]; minima likewise, None for
    BYTES.
    """

    kind: int
    numbers: Tensor
    scales: Tensor
    minima: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.scales.shape[1] * GROUP


def quantise(weight: Tensor, kind: int) -> Groups:
    """Round weight [rows, columns] to NIBBLES or BYTES, with the scales that fit each group best at its ends."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    if kind == BYTES:
        scales = (groups.abs().amax(dim=2) / 127).clamp(min=_SMALLEST_SCALE).to(torch.float16)
        numbers = (groups / scales.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return Groups(BYTES, numbers, scales, None)
    low, high = groups.aminmax(dim=2)
    # Rounded first, so that the weights are fitted to the scales that will be used.
    minima = low.to(torch.float16)
    scales = ((high - minima.float()) / 15).clamp(min=_SMALLEST_SCALE).to(torch.float16)
    numbers = ((groups - minima.float()[..., None]) / scales.float()[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return Groups(NIBBLES, numbers[..., :16] | numbers[..., 16:] << 4, scales, minima)


def widen(groups: Groups) -> Tensor:
    """float32[rows, columns] of quantised weights: what the kernels multiply with."""
    numbers = groups.numbers
    if groups.kind == NIBBLES:
        numbers = torch.cat((numbers & 15, numbers >> 4), dim=2)
    weights = numbers.float() * groups.scales.float()[..., None]
    return (weights if groups.minima is None else weights + groups.minima.float()[..., None]).flatten(1)


def round_inputs(x: Tensor) -> Tensor:
    """Inputs [t, k] rounded as int8 with a scale for each 32, in float32: what INT8_INPUTS of the kernels means."""
    groups = x.float().unflatten(1, (-1, GROUP))
    most = groups.abs().amax(dim=2, keepdim=True)
    numbers = (groups * torch.where(most > 0, 127 / most, 0)).round()
    return (numbers * (most / 127)).flatten(1)


def stack_groups(parts: Sequence[Groups]) -> Groups | None:
    """Rows of all parts one below the other; None if they are not of one kind."""
    if len({part.kind for part in parts}) != 1:
        return None
    if len(parts) == 1:
        return parts[0]
    minima = [part.minima for part in parts if part.minima is not None]
    return Groups(
        parts[0].kind, torch.cat([part.numbers for part in parts]), torch.cat([part.scales for part in parts]),
        torch.cat(minima) if minima else None,
    )  # fmt: skip


def pack_plain(weight: Tensor) -> Tensor:
    """uint8[bytes] of weight [rows, columns] in float32 or bfloat16."""
    blocks = _in_blocks(weight).unflatten(2, (-1, 2))  # [blocks, 16, pairs, 2]
    order = (0, 2, 1, 3) if weight.dtype == torch.bfloat16 else (0, 2, 3, 1)
    return blocks.permute(order).contiguous().view(torch.uint8).flatten()


def pack_groups(groups: Groups) -> Tensor:
    """uint8[bytes] of quantised weights."""
    scales = [groups.scales] if groups.minima is None else [groups.scales, groups.minima]
    octets = groups.numbers.contiguous().view(torch.int64)  # eight bytes of a row are moved as one
    rows, count, eights = octets.shape
    packed = torch.empty(ceil_div(rows, 32) * 2, count, 128 * eights + 32 * len(scales), dtype=torch.uint8)
    words, halves = packed.view(torch.int32), packed.view(torch.float16)
    for first in range(0, rows, _ROWS_AT_ONCE):
        some, blocks = slice(first, first + _ROWS_AT_ONCE), slice(first // 16, (first + _ROWS_AT_ONCE) // 16)
        body = words[blocks, :, : 32 * eights]
        (_pack_nibbles if groups.kind == NIBBLES else _pack_bytes)(_rows_last(octets[some]), body)
        for index, part in enumerate(scales):
            start = 64 * eights + 16 * index
            halves[blocks, :, start : start + 16] = _rows_last(part[some].unsqueeze(2)).squeeze(2)
    return packed.flatten()


def _pack_nibbles(octets: Tensor, words: Tensor) -> None:
    """octets int64[blocks, groups, 2, 16], halves of bytes as Groups has them → words int32[blocks, groups, 64]."""
    for half, lanes in enumerate(words.unflatten(2, (2, 2, 16)).unbind(dim=2)):
        # Each byte has one weight in its low half; two bytes further lies the one for the high half.
        lone = octets >> 4 * half & 0x0F0F0F0F_0F0F0F0F
        lanes.copy_(_first_of_fours(lone | lone >> 12))


def _pack_bytes(octets: Tensor, words: Tensor) -> None:
    """octets int64[blocks, groups, 4, 16] of int8 → words int32[blocks, groups, 128]."""
    for half, lanes in enumerate(words.unflatten(2, (4, 2, 16)).unbind(dim=3)):
        lanes.copy_(_first_of_fours(octets >> 16 * half))


def _first_of_fours(octets: Tensor) -> Tensor:
    """Bytes 0, 4, 1, 5 of each int64 as an int32: in this order pairs and their halves follow each other."""
    apart = octets & 0x000000FF_000000FF | (octets & 0x0000FF00_0000FF00) << 8
    return (apart | apart >> 24).view(torch.int32)[..., ::2]


def _rows_last(rows: Tensor) -> Tensor:
    """[rows, groups, n] → [blocks, groups, n, 16]."""
    return _in_blocks(rows).permute(0, 2, 3, 1).contiguous()


def _in_blocks(rows: Tensor) -> Tensor:
    """[rows, …] → [blocks, 16, …], an even number of blocks, filled up with zeros."""
    missing = -rows.shape[0] % 32
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))
    return rows.unflatten(0, (-1, 16))
