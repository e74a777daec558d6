"""A decoder's linear layers on a GPU, plain or quantised: which kernel multiplies, and where weights are widened."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sessile.kernels.linear import Fp8Weight, Int4Weight, Int8Weight, LinearWeight, PlainWeight
from sessile.kernels.triton_few import few_gated_linear, few_linear, few_linear_whole, few_tokens_max, tile_of
from sessile.kernels.triton_layers import silu_mul
from sessile.kernels.triton_linear import split_linear
from sessile.kernels.triton_weight import Quantised, Weight
from sessile.kernels.triton_widen import widen
from sessile.model.layers import Decoder, Linear

SPLIT_TOKENS = 256
"""Up to so many tokens cuBLAS leaves multiprocessors idle in a product of many inputs and few outputs."""
GATED_TOKENS = 64
"""With more tokens, sums of gate and up together take more registers than there are."""
_SCRATCH_ELEMENTS = 128 << 20
"""Most weights that are widened before they are multiplied. Few enough to stay in an H100's second cache, 16 and 32
MiB, took longer: cuBLAS leaves multiprocessors idle then."""


class GpuLinears:
    """Multiplies a decoder's linear layers. Owns the scratch in which quantised weights are widened for many tokens.

    The scratch is one for all layers and stays where it is, so that it may be part of a CUDA graph.
    """

    def __init__(self, decoder: Decoder) -> None:
        modules = [part for part in decoder.modules() if isinstance(part, Linear)]
        self._weights: dict[Linear, Weight] = {module: as_kernels_see_it(module.weight) for module in modules}
        self._scratch = decoder.norm.weight.new_empty(_scratch_elements(self._weights.values()))

    def weight(self, module: Linear) -> Weight:
        """The weight [out, in] as the kernels for one token read it."""
        return self._weights[module]

    def has_int4(self) -> bool:
        """Whether some layer is in int4, of which one token is multiplied by matrix units as well."""
        return any(isinstance(weight, Quantised) and weight.is_int4 for weight in self._weights.values())

    def product(self, module: Linear, x: Tensor) -> Tensor:
        """The layer of x [t, in]: [t, out], or its parts [parts, t, out] where that is faster."""
        weight, tokens = self._weights[module], x.shape[0]
        if tokens <= few_tokens_max(weight):
            return few_linear(x, weight, module.bias)
        if tokens <= SPLIT_TOKENS and module.bias is None and x.is_cuda and not isinstance(weight, Quantised):
            outs, ins = weight.shape
            splits = 4 if outs <= 2048 else 2
            if ins >= 2 * outs and ins % splits == 0:
                return split_linear(x, weight, splits)
        return self._of_many_tokens(module, x)

    def whole(self, module: Linear, x: Tensor) -> Tensor:
        """The layer of x [t, in]: [t, out]."""
        weight, tokens = self._weights[module], x.shape[0]
        is_better = isinstance(weight, Quantised) or tile_of(weight, tokens).splits == 1
        if tokens <= few_tokens_max(weight) and is_better:
            return few_linear_whole(x, weight, module.bias)
        return self._of_many_tokens(module, x)

    def gated(self, module: Linear, x: Tensor) -> Tensor:
        """silu(gate) * up of a layer that computes both of x [t, in]: [t, inner]."""
        if module.bias is None and x.shape[0] <= GATED_TOKENS:
            return few_gated_linear(x, self._weights[module])
        return silu_mul(self.whole(module, x))

    def _of_many_tokens(self, module: Linear, x: Tensor) -> Tensor:
        """Some rows of a quantised weight after the other: widened, then multiplied by cuBLAS as a plain one."""
        weight = self._weights[module]
        if not isinstance(weight, Quantised):
            return module(x)
        outs, ins = weight.shape
        out, at_once = x.new_empty(x.shape[0], outs), _rows_at_once(weight)
        for first in range(0, outs, at_once):
            rows = min(at_once, outs - first)
            plain = widen(weight, first, self._scratch[: rows * ins].view(rows, ins)).t()
            target = out[:, first : first + rows]
            if module.bias is None:
                torch.mm(x, plain, out=target)
            else:
                torch.addmm(module.bias[first : first + rows], x, plain, out=target)
        return out


def scratch_bytes(decoder: Decoder) -> int:
    """What `GpuLinears` will hold beside the weights."""
    weights = [as_kernels_see_it(part.weight) for part in decoder.modules() if isinstance(part, Linear)]
    return _scratch_elements(weights) * decoder.norm.weight.element_size()


def _scratch_elements(weights: Iterable[Weight]) -> int:
    quantised = [weight for weight in weights if isinstance(weight, Quantised)]
    return max((_rows_at_once(weight) * weight.shape[1] for weight in quantised), default=0)


def _rows_at_once(weight: Quantised) -> int:
    rows, columns = weight.shape
    return min(rows, max(1, _SCRATCH_ELEMENTS // columns))


def as_kernels_see_it(weight: LinearWeight) -> Weight:
    """The weight for the kernels of a GPU, in the same memory."""
    match weight:
        case PlainWeight():
            return weight.weight
        case Int8Weight() | Fp8Weight():
            return Quantised(weight.quantised, weight.scales)
        case Int4Weight():
            return Quantised(weight.packed, weight.scales.flatten(1).view(torch.int32))
    raise AssertionError(f"{type(weight).__name__} does not run on a GPU")
