"""Linear layers of few tokens on the GPU: as fast as the weights are read, where cuBLAS is not yet.

A product of at most some dozens of tokens is bound by the bytes of its weight, so every multiprocessor has to read some
of it from the first moment to the last. Rows alone are too few programs in most layers; so the inputs are split as
well, and each split leaves float32 sums of its own, its part. Whoever reads the product next adds the parts up: the
norm behind it, or the rotation. Nothing has to be zeroed, waited for or read again.
"""

from dataclasses import dataclass, replace
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_early import LINE_BYTES, ask_for, have_read, launch_options, next_begins, wait_for_inputs
from sessile.kernels.triton_int4 import few_tokens_int4
from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_weight import Quantised, Weight
from sessile.kernels.triton_widen import fast_for, widen_rows
from sessile.units import ceil_div

FEW_TOKENS = 64
"""Most tokens of a product that is computed here; with more, what reads the parts loses what their making gains."""
FEW_TOKENS_EIGHT_BITS, FEW_TOKENS_FOUR_BITS = 256, 128
"""Of quantised weights, which anywhere else would have to be widened into memory before they are multiplied."""
_TOKEN_SIZES = (8, 32, 64, 128)
"""Tokens that one program computes; fewer are padded. The matrix units multiply 8 at once."""
_AHEAD_BYTES = 256
"""How much of each of its rows a program asks for before it waits for what it multiplies them with."""
_OUTS_AT_A_TIME = 7_600
"""Rows times splits of all programs together that keep an H100's 132 multiprocessors reading."""


@dataclass(frozen=True)
class FewTile:
    """How a weight is cut. outs, ins: what a program reads at a time, of `stages` such tiles on their way to it.

    splits: programs that share the inputs of the same rows.
    """

    outs: int
    ins: int
    splits: int
    stages: int
    warps: int


def few_tile(outs: int, ins: int, tokens: int) -> FewTile:
    """The tile for a weight [outs, ins], by measurement on an H100."""
    rows = 32 if tokens <= 16 and outs < 16_384 else 64
    if tokens > 32 and 16_384 <= outs < 65_536:
        rows = 128
    columns = 128 if ins >= 4096 or outs >= 65_536 else 64
    blocks = ceil_div(ins, columns)
    most = max(1, blocks // 2)
    wanted = min(most, ceil_div(_OUTS_AT_A_TIME, outs))
    splits = next((splits for splits in range(wanted, most + 1) if blocks % splits == 0), wanted)
    return FewTile(rows, columns, splits, stages=3 if outs >= 65_536 else 4, warps=rows // 16)


_EIGHT_BIT_TILES = {
    8: (300, FewTile(32, 256, 1, 3, 2)), 32: (400, FewTile(64, 128, 1, 3, 2)),
    64: (256, FewTile(64, 128, 1, 3, 4)), 128: (256, FewTile(64, 128, 1, 3, 4)),
}  # fmt: skip
"""By tokens: programs that keep an H100 reading, and the tile that was fastest there, before inputs are split.

Two warps multiply by instructions for which a thread's bytes lie together; from 64 rows and four warps on, Triton takes
those of a whole group of warps, which gather bytes in pairs, but overlap with it. Two such groups in a program (eight
warps) once gave a wrong sum (int8, 128 × 64, 128 tokens), so there is never more than one.
"""
_FOUR_BIT_TILES = _EIGHT_BIT_TILES | {
    8: (300, FewTile(64, 256, 1, 3, 4)), 64: (256, FewTile(128, 64, 1, 4, 4)), 128: (256, FewTile(128, 64, 1, 4, 4)),
}  # fmt: skip
_SMALL_TILE = (300, FewTile(32, 128, 1, 4, 2))
"""Of at most 8 tokens with a weight of few rows and inputs."""
_GATED_TILES = {8: FewTile(64, 256, 1, 3, 4), 32: FewTile(64, 128, 1, 4, 4), 64: FewTile(128, 128, 1, 3, 8)}
_FOUR_BIT_GATED_TILES = _GATED_TILES | {32: FewTile(128, 128, 1, 3, 4)}
"""Rows and warps are halved between gate and up."""


def few_tokens_max(weight: Weight) -> int:
    """Most tokens of a product with this weight that is computed here."""
    if not isinstance(weight, Quantised):
        return FEW_TOKENS
    return FEW_TOKENS_FOUR_BITS if weight.is_int4 else FEW_TOKENS_EIGHT_BITS


def tile_of(weight: Weight, tokens: int) -> FewTile:
    """The tile for a product of so many tokens with this weight."""
    outs, ins = weight.shape
    if not isinstance(weight, Quantised):
        return few_tile(outs, ins, tokens)
    size = _token_size(tokens)
    programs, tile = _FOUR_BIT_TILES[size] if weight.is_int4 else _EIGHT_BIT_TILES[size]
    if size == 8 and ins < 4096 and outs < 16_384:
        programs, tile = _SMALL_TILE
    blocks, rows = ceil_div(ins, tile.ins), ceil_div(outs, tile.outs)
    even = [splits for splits in range(1, max(1, blocks // 2) + 1) if blocks % splits == 0]
    return replace(tile, splits=min(even, key=lambda splits: abs(log(rows * splits / programs))))


def gated_tile_of(weight: Weight, tokens: int) -> FewTile:
    """The tile of gate and up together, whose rows and warps are halved between the two."""
    if not isinstance(weight, Quantised):
        return few_tile(weight.shape[0], weight.shape[1], tokens)
    return (_FOUR_BIT_GATED_TILES if weight.is_int4 else _GATED_TILES)[_token_size(tokens)]


def few_linear(x: Tensor, weight: Weight, bias: Tensor | None, tile: FewTile | None = None) -> Tensor:
    """The linear layer of x [t, in], in parts float32[splits, t, out] that have to be summed. weight [out, in]."""
    tile = tile or tile_of(weight, x.shape[0])
    parts = x.new_empty(tile.splits, x.shape[0], weight.shape[0], dtype=torch.float32)
    return _launch(x, weight, bias, parts, tile, is_gated=False)


def few_linear_whole(x: Tensor, weight: Weight, bias: Tensor | None, tile: FewTile | None = None) -> Tensor:
    """The same without splits, for a weight of many rows: [t, out] in x's dtype."""
    tile = tile or replace(tile_of(weight, x.shape[0]), splits=1)
    assert tile.splits == 1, f"{weight.shape[0]} rows are split"
    return _launch(x, weight, bias, x.new_empty(x.shape[0], weight.shape[0]), tile, is_gated=False)


def few_gated_linear(x: Tensor, weight: Weight, tile: FewTile | None = None) -> Tensor:
    """silu(gate) * up of x [t, in]: [t, inner] in x's dtype. weight [2 × inner, in], gate first."""
    tile = tile or gated_tile_of(weight, x.shape[0])
    gated = x.new_empty(x.shape[0], weight.shape[0] // 2)
    half = FewTile(tile.outs // 2, tile.ins, 1, tile.stages, max(1, tile.warps // 2))
    return _launch(x, weight, None, gated, half, is_gated=True)


def _launch(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, tile: FewTile, *, is_gated: bool) -> Tensor:
    assert x.is_contiguous() and x.shape[0] >= 1
    tokens, ins, outs = x.shape[0], x.shape[1], out.shape[-1]
    split_ins = ceil_div(ceil_div(ins, tile.ins), tile.splits) * tile.ins
    block = _token_size(tokens)
    following = next_begins(x, tokens)
    numbers, scales = (weight.numbers, weight.scales) if isinstance(weight, Quantised) else (weight, weight)
    assert numbers.is_contiguous()
    common = {
        "HAS_BIAS": bias is not None, "IS_GATED": is_gated,
        "IS_EVEN": outs % tile.outs == 0 and split_ins * tile.splits == ins,
        "TOKENS": block, "OUTS": tile.outs, "INS": tile.ins,
        "STAGES": tile.stages, "AHEAD": _AHEAD_BYTES // LINE_BYTES.value, "NEXT": following.value,
        "IS_FAST": isinstance(weight, Quantised) and fast_for(x), "num_warps": tile.warps, **launch_options(following),
    }  # fmt: skip
    token_blocks = ceil_div(tokens, block)
    grid = triton.cdiv(outs, tile.outs) * token_blocks, tile.splits
    given = x, numbers, scales, bias if bias is not None else x, out, tokens, outs, ins, split_ins, token_blocks
    if isinstance(weight, Quantised) and weight.is_int4:
        launch(few_tokens_int4, grid, *given, **common)
    else:
        launch(_few_tokens, grid, *given, HAS_SCALES=isinstance(weight, Quantised), **common)
    return out


def _token_size(tokens: int) -> int:
    return next((size for size in _TOKEN_SIZES if tokens <= size), _TOKEN_SIZES[-1])


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, out, tokens, outs, ins, split_ins, token_blocks,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, IS_EVEN: tl.constexpr,
    IS_FAST: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A few rows of the weight times all tokens, over one split of the inputs: the weight is the left operand."""
    # Programs side by side read the same rows of the weight, once from memory, for all tokens.
    row = tl.program_id(0) // token_blocks * OUTS + tl.arange(0, OUTS)
    split = tl.program_id(1)
    token = tl.program_id(0) % token_blocks * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, INS)
    is_row, is_token = row < outs, token < tokens
    kind: tl.constexpr = x.dtype.element_ty
    first = split * split_ins
    rows = weight + row[:, None].to(tl.int64) * ins + first + lane[None, :]
    ups = rows + outs.to(tl.int64) * ins
    columns = x + token[None, :] * ins + first + lane[:, None]
    if NEXT > 0:
        ask_for(weight, row, first, outs, ins, AHEAD)
        if IS_GATED:
            ask_for(weight + outs.to(tl.int64) * ins, row, first, outs, ins, AHEAD)
    wait_for_inputs(NEXT)
    product = tl.zeros((OUTS, TOKENS), tl.float32)
    second = tl.zeros((OUTS, TOKENS), tl.float32)
    for done in tl.range(0, split_ins, INS, num_stages=STAGES):
        inside = first + done + lane < ins
        if IS_EVEN:
            w = tl.load(rows + done, eviction_policy="evict_first")
        else:
            w = tl.load(rows + done, mask=is_row[:, None] & inside[None, :], other=0.0)
        a = tl.load(columns + done, mask=is_token[None, :] & inside[:, None], other=0.0)
        product = tl.dot(widen_rows(w, kind, IS_FAST), a, product, input_precision="ieee")
        if IS_GATED:
            if IS_EVEN:
                u = tl.load(ups + done, eviction_policy="evict_first")
            else:
                u = tl.load(ups + done, mask=is_row[:, None] & inside[None, :], other=0.0)
            second = tl.dot(widen_rows(u, kind, IS_FAST), a, second, input_precision="ieee")
    have_read(NEXT)
    if HAS_SCALES:  # of a row each, so that they may be applied to the sums
        product *= tl.load(scales + row, mask=is_row, other=0.0)[:, None]
        if IS_GATED:
            second *= tl.load(scales + outs + row, mask=is_row, other=0.0)[:, None]
    if HAS_BIAS:
        if split == 0:
            product += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        product = product / (1.0 + tl.exp(-product)) * second
    target = out + (split * tokens + token[None, :]).to(tl.int64) * outs + row[:, None]
    tl.store(target, product.to(out.dtype.element_ty), mask=is_token[None, :] & is_row[:, None])
