"""Weights in the layout that the C++ kernels stream: blocks of 16 rows, pairs of neighbouring columns together.

cpp/linear.h draws the layouts. Rows are filled up with zeros to a multiple of 32, columns are a multiple of 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FLOAT32, BFLOAT16, NIBBLES, BYTES = range(4)
"""Kinds, as cpp/linear.h numbers them."""

GROUP = 32
"""Weights of one row that share a scale."""
OCTET_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which BYTES and the int8 inputs of products lie, of every eight: that of NIBBLES once masked."""
_SMALLEST_SCALE = 2.0**-24
"""Of float16."""


@dataclass(frozen=True)
class Groups:
    """Quantised weights, not yet packed: weight = scale × number + minimum.

    numbers [rows, groups, 32]: uint8 of 0 … 15 for NIBBLES, int8 for BYTES. scales float16[rows, groups]; minima
    likewise, None for BYTES.
    """

    kind: int
    numbers: Tensor
    scales: Tensor
    minima: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.numbers.shape[0], self.numbers.shape[1] * GROUP


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
    return Groups(NIBBLES, numbers, scales, minima)


def widen(groups: Groups) -> Tensor:
    """float32[rows, columns] of quantised weights: what the kernels multiply with."""
    weights = groups.numbers.float() * groups.scales.float()[..., None]
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
    numbers = _in_blocks(groups.numbers)  # [blocks, 16, groups, 32]
    if groups.kind == BYTES:
        # [blocks, 16, groups, octets, quads of an octet, 4]
        quads = numbers.unflatten(3, (4, 8))[..., list(OCTET_ORDER)].unflatten(4, (2, 4))
        body = quads.permute(0, 2, 3, 4, 1, 5).contiguous().view(torch.uint8).flatten(2)
    else:
        # [blocks, 16, groups, words of 4 pairs, byte of a word, pair of a byte, k of a pair]
        nibbles = numbers.unflatten(3, (4, 2, 2, 2))
        packed = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
        # → [blocks, groups, words, 16, k of a pair, byte of a word]
        body = packed.permute(0, 2, 3, 1, 5, 4).contiguous().flatten(2)
    parts = [body, _scale_bytes(groups.scales)]
    if groups.minima is not None:
        parts.append(_scale_bytes(groups.minima))
    return torch.cat(parts, dim=2).flatten()


def _scale_bytes(scales: Tensor) -> Tensor:
    """float16[rows, groups] → uint8[blocks, groups, 32]."""
    return _in_blocks(scales).transpose(1, 2).contiguous().view(torch.uint8)


def _in_blocks(rows: Tensor) -> Tensor:
    """[rows, …] → [blocks, 16, …], an even number of blocks, filled up with zeros."""
    missing = -rows.shape[0] % 32
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))
    return rows.unflatten(0, (-1, 16))
