"""Weights of linear layers in the form that multiplies fastest: plain, or weight-only int8, int4 or fp8.

Each form is called as `weight(x, bias)`: x [tokens, in] in the model's dtype → [tokens, out] in that dtype. Few tokens
go through compiled kernels that read the stored weights as they are; many through torch's matrix product.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sessile.kernels import packing, reference
from sessile.kernels.native import (
    BFLOAT16_INPUTS,
    FLOAT32_INPUTS,
    INT8_INPUTS,
    Linear,
    NativeKernels,
    Product,
    processor_flags,
)

_ROWS_AT_ONCE = 16_384
"""Rows that are rounded at once, so that a large layer does not need several times its size."""


class LinearWeight(Protocol):
    """What multiplies in a linear layer; `shape` is (out, in), `bytes` what it holds in memory."""

    shape: tuple[int, int]
    bytes: int

    @property
    def stored(self) -> Any:
        """The weights as the compiled kernels read them, a `linear_cpu.StoredWeight`; on the CPU only."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


@cache
def compiled_linear() -> ModuleType | None:
    """The compiled kernels, or None where numba or torch's OpenMP is not usable."""
    try:
        importlib.import_module("sessile.kernels.compiled").check_openmp()
        return importlib.import_module("sessile.kernels.linear_cpu")
    except (ImportError, OSError, AttributeError):
        return None


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products; without, torch's are several times slower."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & processor_flags())


@cache
def few_tokens() -> int:
    """Up to so many tokens the compiled kernels are used; beyond, widening a whole weight once pays for itself."""
    return 8 if cpu_multiplies_bfloat16() else 32


class PlainWeight:
    """weight [out, in] in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self.shape = (weight.shape[0], weight.shape[1])
        self.bytes = weight.numel() * weight.element_size()

    @property
    def stored(self) -> Any:
        kernels = _kernels()
        kind = kernels.BFLOAT16 if self.weight.dtype == torch.bfloat16 else kernels.FLOAT32
        return kernels.StoredWeight(kind, *self.shape, self.weight)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = _few_token_product(self, x)
        return _multiply(x, self.weight, bias) if product is None else _finish(product, bias, x.dtype)


def _scaled_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [out, in] of a type and one scale float32 a row; some rows at a time, which bounds memory."""
    is_integer = dtype == torch.int8
    largest = 127.0 if is_integer else torch.finfo(dtype).max
    numbers, scales = [], []
    for rows in weight.split(_ROWS_AT_ONCE):
        rows = rows.float()
        scale = (rows.abs().amax(dim=1) / largest).clamp(min=1e-12)
        scaled = rows / scale[:, None]
        numbers.append((scaled.round_() if is_integer else scaled).to(dtype))
        scales.append(scale)
    return torch.cat(numbers), torch.cat(scales)


class Int8Weight:
    """int8 [out, in] with one symmetric scale float32 a row."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.quantised, self.scales = _scaled_rows(weight, torch.int8)
        self.bytes = self.quantised.numel() + self.scales.numel() * 4

    @property
    def stored(self) -> Any:
        kernels = _kernels()
        return kernels.StoredWeight(kernels.INT8, *self.shape, self.quantised, self.scales)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = _few_token_product(self, x)
        if product is None:
            # The scale of a row is that of an output: it may be taken after the sum.
            product = _multiply(x, self.quantised.to(x.dtype), None).float().mul_(self.scales)
        return _finish(product, bias, x.dtype)


class Fp8Weight:
    """float8_e4m3fn [out, in] with one scale float32 a row; for a GPU, whose kernels widen it."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.quantised, self.scales = _scaled_rows(weight, torch.float8_e4m3fn)
        self.bytes = self.quantised.numel() + self.scales.numel() * 4

    @property
    def stored(self) -> Any:
        raise AssertionError("fp8 weights are for a GPU")

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _finish(_multiply(x, self.quantised.to(x.dtype), None).float().mul_(self.scales), bias, x.dtype)


class Int4Weight:
    """uint8 [out, in / 2], two weights a byte, with a scale and a minimum in bfloat16 for each 32 weights of a row."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        parts = [self._quantise(rows.float()) for rows in weight.split(_ROWS_AT_ONCE)]
        self.packed, self.scales = (torch.cat(kind) for kind in zip(*parts, strict=True))
        self.bytes = self.packed.numel() + self.scales.numel() * 2

    @staticmethod
    def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = rows.unflatten(1, (-1, reference.INT4_GROUP))
        low, high = groups.aminmax(dim=2)
        # Rounded first, so that the weights are fitted to the scales that will be used.
        scales = torch.stack([((high - low) / 15).clamp(min=1e-12), low], dim=-1).to(torch.bfloat16)
        step, start = scales.float().unsqueeze(-2).unbind(dim=-1)
        quarters = ((groups - start) / step).round_().clamp_(0, 15).to(torch.uint8)
        return (quarters[..., :16] | quarters[..., 16:] << 4).flatten(1), scales

    @property
    def stored(self) -> Any:
        kernels = _kernels()
        return kernels.StoredWeight(kernels.INT4, *self.shape, self.packed, self.scales)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = _few_token_product(self, x)
        if product is not None:
            return _finish(product, bias, x.dtype)
        kernels = compiled_linear() if x.device.type == "cpu" else None
        weight = kernels.unpack_int4(self.stored) if kernels else reference.unpack_int4(self.packed, self.scales)
        return _multiply(x, weight.to(x.dtype), bias)


class PackedWeight:
    """Weights as the C++ kernels stream them: plain, or numbers with a scale for each 32 of a row.

    inputs: what they are multiplied with. Where the model is of bfloat16 and the build multiplies it, inputs are
    rounded to bfloat16; if so wished and the weights are quantised, to int8 with a scale for each 32. Sums are float32.
    """

    def __init__(
        self, weight: Tensor | packing.Groups, dtype: torch.dtype, kernels: NativeKernels, int8_inputs: bool = False
    ) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        if isinstance(weight, packing.Groups):
            self.kind, self.packed = weight.kind, packing.pack_groups(weight)
        else:
            self.kind = packing.BFLOAT16 if weight.dtype == torch.bfloat16 else packing.FLOAT32
            self.packed = packing.pack_plain(weight)
        self.bytes = self.packed.numel()
        self.kernels = kernels
        self.inputs = FLOAT32_INPUTS
        if dtype == torch.bfloat16 and kernels.multiplies_bfloat16:
            is_int8 = int8_inputs and kernels.multiplies_int8 and self.kind in (packing.NIBBLES, packing.BYTES)
            self.inputs = INT8_INPUTS if is_int8 else BFLOAT16_INPUTS

    @property
    def stored(self) -> Any:
        raise AssertionError("packed weights are for the C++ kernels")

    def place(self, bias: Tensor | None) -> Linear:
        """By address, for the kernels; bias float32, which the caller keeps alive."""
        assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
        rows, columns = self.shape
        return Linear(self.kind, self.packed.data_ptr(), rows, columns, 0 if bias is None else bias.data_ptr())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        inputs = x.float().contiguous()
        tokens, columns = inputs.shape
        assert columns == self.shape[1]
        out = torch.empty(tokens, self.shape[0], dtype=torch.float32)
        if tokens:
            self.kernels.product(Product(
                linear=self.place(None), tokens=tokens, inputs=self.inputs,
                x=inputs.data_ptr(), out=out.data_ptr(),
            ))  # fmt: skip
        return _finish(out, bias, x.dtype)


def pack_linear(
    weight: Tensor, dtype: torch.dtype, quantize: str, native: NativeKernels | None = None, int8_inputs: bool = False
) -> LinearWeight:
    """The form of weight [out, in] that `--quantize` asks for: "none", "int8", "int4" or "fp8".

    int4 needs rows of whole groups; where they are not, the layer is int8. With native kernels all is packed for them.
    """
    if native is not None:
        kind = {"int4": packing.NIBBLES, "int8": packing.BYTES}.get(quantize)
        stored = weight.to(dtype) if kind is None else packing.quantise(weight, kind)
        return PackedWeight(stored, dtype, native, int8_inputs)
    if quantize == "int4" and weight.shape[1] % reference.INT4_GROUP == 0:
        return Int4Weight(weight)
    if quantize == "fp8":
        return Fp8Weight(weight)
    if quantize in ("int4", "int8"):
        return Int8Weight(weight)
    return PlainWeight(weight.to(dtype))


def _kernels() -> ModuleType:
    kernels = compiled_linear()
    assert kernels is not None, "stored weights are for the compiled kernels"
    return kernels


def _few_token_product(weight: LinearWeight, x: Tensor) -> Tensor | None:
    """x @ weightᵀ in float32 through the compiled kernels; None if they are not the way to go for this input."""
    if x.device.type != "cpu" or x.shape[0] > few_tokens():
        return None
    kernels = compiled_linear()
    return kernels.linear(x.float().contiguous(), weight.stored) if kernels else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weightᵀ + bias through torch; in float32 where bfloat16 products would be emulated."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16():
        return _finish(functional.linear(x.float(), weight.float()), bias, x.dtype)
    return functional.linear(x, weight, bias)


def _finish(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add the bias and round to the model's dtype."""
    return (product if bias is None else product.add_(bias)).to(dtype)
