"""Weights of linear layers in the form that multiplies fastest: plain, or weight-only int8 or int4.

Each form is called as `weight(x, bias)`: x [tokens, in] in the model's dtype → [tokens, out] in that dtype.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

INT4_GROUP = 32
"""Weights of one row that share a scale and a zero."""


class LinearWeight(Protocol):
    """What multiplies in a linear layer; `shape` is (out, in), `bytes` what it holds in memory."""

    shape: tuple[int, int]
    bytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


class PlainWeight:
    """weight [out, in] in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])
        self.bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.weight, bias)


class Int8Weight:
    """int8 [out, in] with one symmetric scale a row."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)
        self.quantised = (weight.float() / scales[:, None]).round_().to(torch.int8)
        self.scales = scales.to(dtype)
        self.bytes = self.quantised.numel() + self.scales.numel() * self.scales.element_size()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch._weight_int8pack_mm(x, self.quantised, self.scales)
        return product if bias is None else product + bias


class Int4Weight:
    """Packed int4 [out, in] with a scale and a zero for each 32 weights of a row; `in` divides by 32, `out` by 16."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        groups = weight.float().unflatten(1, (-1, INT4_GROUP))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low) / 15).clamp(min=1e-12)
        quantised = ((groups - low[..., None]) / scales[..., None]).round_().clamp_(0, 15).flatten(1)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(quantised.to(torch.int32), 1)
        # The kernel computes (q - 8) * scale + zero.
        self.scales_and_zeros = torch.stack([scales, low + 8 * scales], dim=-1).transpose(0, 1).contiguous().to(dtype)
        extra = self.scales_and_zeros
        self.bytes = self.packed.numel() * self.packed.element_size() + extra.numel() * extra.element_size()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu(x, self.packed, INT4_GROUP, self.scales_and_zeros)
        return product if bias is None else product + bias


def pack_linear(weight: Tensor, dtype: torch.dtype, quantize: str) -> LinearWeight:
    """The form of weight [out, in] that `--quantize` asks for: "none", "int8" or "int4".

    int4 needs shapes that its kernel accepts; where they do not fit, the layer is int8.
    """
    if quantize == "int4" and weight.shape[1] % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4Weight(weight, dtype)
    if quantize in ("int4", "int8"):
        return Int8Weight(weight, dtype)
    return PlainWeight(weight.to(dtype))
