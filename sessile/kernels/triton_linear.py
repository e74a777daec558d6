"""Linear layers of one token on the GPU, with what comes before and after fused into them.

One token's product is as fast as its weights are read, and everything else is launches. So the norm before a product,
the gating after it and the sum with the residual stream happen in the kernel that reads the weights, which needs no
matrix units. A few dozens of tokens have kernels of their own (`triton_few`); more are multiplied by cuBLAS.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_early import LINE_BYTES, ask_for, launch_options, next_begins, wait_for_inputs
from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_weight import Quantised, Weight
from sessile.kernels.triton_widen import as_float

_AHEAD_BYTES = 1024
"""How much of each of its rows a program asks for before it waits for what it multiplies them with."""


@dataclass(frozen=True)
class LinearTile:
    """Rows and columns of the weight that one program reads at a time, and its warps."""

    outs: int
    ins: int
    warps: int


@dataclass(frozen=True)
class Norm:
    """Weight [in] and epsilon of a root-mean-square norm."""

    weight: Tensor
    epsilon: float


def linear_tile(outs: int, ins: int) -> LinearTile:
    """The tile for a weight [outs, ins] that reads it fastest, by measurement on an H100."""
    if outs <= 2048 and ins >= 4096:
        return LinearTile(2, 1024, 4)  # few and long rows: more programs
    return LinearTile(8 if outs >= 16384 and ins < 4096 else 4, 512, 4)


def _tile_of(weight: Weight, ins: int) -> LinearTile:
    outs = weight.shape[0]
    if not isinstance(weight, Quantised):
        return linear_tile(outs, ins)
    if outs < 2048:
        return LinearTile(2, 2048, 4)
    return LinearTile(8, 1024 if 2048 < outs <= 4096 else 512, 4)


def norm_linear(x: Tensor, norm: Norm, weight: Weight, bias: Tensor | None, tile: LinearTile | None = None) -> Tensor:
    """Linear layer of the norm of x [1, in]: [1, out]. weight [out, in]."""
    return _launch(x, weight, x.new_empty(1, weight.shape[0]), bias=bias, norm=norm, tile=tile)


def norm_gated_linear(x: Tensor, norm: Norm, weight: Weight, tile: LinearTile | None = None) -> Tensor:
    """silu(gate) * up of the norm of x [1, in]: [1, out]. weight [2 × out, in], gate first."""
    return _launch(x, weight, x.new_empty(1, weight.shape[0] // 2), norm=norm, is_gated=True, tile=tile)


def add_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor, tile: LinearTile | None = None
) -> None:
    """Add the linear layer of x [1, in] to the residual stream [1, out] in place."""
    _launch(x, weight, residual, bias=bias, adds=True, tile=tile)


def split_linear(x: Tensor, weight: Tensor, splits: int) -> Tensor:
    """The linear layer of x [t, in], in parts float32[splits, t, out] that have to be summed, multiplied by cuBLAS.

    weight [out, in], with inputs that can be split evenly.
    """
    tokens, (outs, ins) = x.shape[0], weight.shape
    assert ins % splits == 0, f"{ins} inputs are not {splits} times the same"
    here = x.view(tokens, splits, ins // splits).transpose(0, 1)
    there = weight.view(outs, splits, ins // splits).permute(1, 2, 0)
    return torch.bmm(here, there) if x.dtype == torch.float32 else torch.bmm(here, there, out_dtype=torch.float32)


def _launch(
    x: Tensor, weight: Weight, out: Tensor, *, bias: Tensor | None = None, norm: Norm | None = None,
    is_gated: bool = False, adds: bool = False, tile: LinearTile | None = None,
) -> Tensor:  # fmt: skip
    assert x.shape[0] == 1 and x.is_contiguous()
    assert not isinstance(weight, Quantised) or not weight.is_int4, "int4 is for the matrix units alone"
    outs, ins = out.shape[1], x.shape[1]
    tile = tile or _tile_of(weight, ins)
    following = next_begins(x, 1)
    numbers, scales = (weight.numbers, weight.scales) if isinstance(weight, Quantised) else (weight, weight)
    assert numbers.is_contiguous()
    common = {
        "HAS_BIAS": bias is not None, "HAS_NORM": norm is not None, "IS_GATED": is_gated, "ADDS": adds,
        "IS_EVEN": outs % tile.outs == 0 and ins % tile.ins == 0, "OUTS": tile.outs, "INS": tile.ins,
        "AHEAD": _AHEAD_BYTES // LINE_BYTES.value, "NEXT": following.value, "num_warps": tile.warps,
        **launch_options(following),
    }  # fmt: skip
    given = (
        x, numbers, scales, bias if bias is not None else x, norm.weight if norm else x, out, outs, ins,
        norm.epsilon if norm else 0.0,
    )  # fmt: skip
    grid = (triton.cdiv(outs, tile.outs),)
    is_fast = x.is_cuda and numbers.dtype == torch.int8
    launch(_one_token, grid, *given, HAS_SCALES=isinstance(weight, Quantised), IS_FAST=is_fast, **common)
    return out


@triton.jit
def _one_token(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, gain, out, outs, ins, epsilon,
    HAS_SCALES: tl.constexpr, IS_FAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr, ADDS: tl.constexpr, IS_EVEN: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    AHEAD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A few elements of the output. The norm's scale is one factor, so it is applied to the sums."""
    column = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    is_column = column < outs
    lane = tl.arange(0, INS)
    product = tl.zeros((OUTS, INS), tl.float32)
    second = tl.zeros((OUTS, INS), tl.float32)
    squares = tl.zeros((INS,), tl.float32)
    rows = weight + column[:, None].to(tl.int64) * ins + lane[None, :]
    if NEXT > 0:
        ask_for(weight, column, 0, outs, ins, AHEAD)
        if IS_GATED:
            ask_for(weight + outs.to(tl.int64) * ins, column, 0, outs, ins, AHEAD)
    wait_for_inputs(NEXT)
    for first in range(0, ins, INS):
        inside = first + lane < ins
        if IS_EVEN:
            w = tl.load(rows + first)
        else:
            w = tl.load(rows + first, mask=inside[None, :] & is_column[:, None], other=0.0)
        if IS_GATED:
            up_rows = rows + first + outs.to(tl.int64) * ins
            if IS_EVEN:
                u = tl.load(up_rows)
            else:
                u = tl.load(up_rows, mask=inside[None, :] & is_column[:, None], other=0.0)
        a = tl.load(x + first + lane, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += a * a
            a *= tl.load(gain + first + lane, mask=inside, other=0.0).to(tl.float32)
        product += as_float(w, IS_FAST) * a[None, :]
        if IS_GATED:
            second += as_float(u, IS_FAST) * a[None, :]
    total = tl.sum(product, 1)
    up = tl.sum(second, 1)
    if HAS_SCALES:
        total *= tl.load(scales + column, mask=is_column, other=0.0)
        if IS_GATED:
            up *= tl.load(scales + outs + column, mask=is_column, other=0.0)
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(squares, 0) / ins + epsilon)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    if IS_GATED:
        up *= tl.rsqrt(tl.sum(squares, 0) / ins + epsilon)
        total = total / (1.0 + tl.exp(-total)) * up
    if ADDS:
        total += tl.load(out + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=is_column)
