"""From the numbers that a quantised weight is stored as to those that matrix units multiply, in registers.

A GPU converts numbers of eight bits at a quarter of the rate at which it computes; so bfloat16 is put together from
bits, two weights at a time, wherever the interpreter does not run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_weight import Quantised

_ROWS, _COLUMNS = 8, 512
"""What a program of `widen` writes."""

HALF: tl.constexpr = tl.constexpr(16)
"""Bytes of a group of 32 weights."""


def widen(weight: Quantised, first_row: int, out: Tensor) -> Tensor:
    """Write rows of a weight [out, in], from one on, as plain ones to out [rows, in]; return it."""
    rows, ins = out.shape
    assert out.is_contiguous() and first_row + rows <= weight.shape[0] and ins == weight.shape[1]
    numbers, scales = weight.numbers[first_row : first_row + rows], weight.scales[first_row : first_row + rows]
    launch(
        _widen, (triton.cdiv(rows, _ROWS), triton.cdiv(ins, _COLUMNS)), numbers, scales, out, rows, ins,
        IS_INT4=weight.is_int4, IS_FAST=fast_for(out), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def fast_for(x: Tensor) -> bool:
    """Whether numbers for products with x are put together from bits."""
    return x.is_cuda and x.dtype == torch.bfloat16


@triton.jit
def _widen(  # type: ignore[no-untyped-def]
    numbers, scales, out, rows, ins,
    IS_INT4: tl.constexpr, IS_FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    is_row = (row < rows)[:, None]
    place = row[:, None].to(tl.int64)
    kind: tl.constexpr = out.dtype.element_ty
    if IS_INT4:
        byte, group = tl.arange(0, COLUMNS // 2), tl.arange(0, COLUMNS // (2 * HALF))
        lane = first + byte // HALF * (2 * HALF) + byte % HALF
        inside = is_row & (lane < ins)[None, :]
        is_word = is_row & (first + group * (2 * HALF) < ins)[None, :]
        packed = tl.load(numbers + place * (ins // 2) + first // 2 + byte[None, :], mask=inside, other=0)
        words = tl.load(scales + place * (ins // 32) + first // 32 + group[None, :], mask=is_word, other=0)
        low, high = widen_groups(packed, words, kind, IS_FAST)
        tl.store(out + place * ins + lane[None, :], low, mask=inside)
        tl.store(out + place * ins + lane[None, :] + HALF, high, mask=inside)
    else:
        lane = first + tl.arange(0, COLUMNS)
        inside = is_row & (lane < ins)[None, :]
        element = tl.load(numbers + place * ins + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        tl.store(out + place * ins + lane[None, :], (element * scale[:, None]).to(kind), mask=inside)


@triton.jit
def widen_groups(packed, words, kind: tl.constexpr, IS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lower and upper weights of bytes [rows, n], both [rows, n] in the type `kind`.

    words int32[rows, n / 16]: scale and minimum of each group, both bfloat16, the scale in the lower half.
    IS_FAST: kind is bfloat16, and two weights are computed at once by instructions that the interpreter lacks.
    """
    rows: tl.constexpr = packed.shape[0]
    groups: tl.constexpr = packed.shape[1] // HALF
    spread = tl.broadcast_to(words[:, :, None], rows, groups, HALF).reshape(rows, groups * HALF)
    if IS_FAST:
        # A nibble in the last bits of 128 in bfloat16 is 128 + nibble: 128 is taken off, which is exact, and scale and
        # minimum come in one operation that rounds once.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t0, t1, s0, s1, m0, m1, n0, n1, n2, n3, one, off;
            mov.b32 one, 0x3f803f80;
            mov.b32 off, 0xc300c300;
            prmt.b32 t0, $4, 0x43434343, 0x4140;
            prmt.b32 t1, $4, 0x43434343, 0x4342;
            prmt.b32 s0, $5, $6, 0x5410;
            prmt.b32 s1, $7, $8, 0x5410;
            prmt.b32 m0, $5, $6, 0x7632;
            prmt.b32 m1, $7, $8, 0x7632;
            and.b32 n0, t0, 0x430f430f;
            and.b32 n1, t1, 0x430f430f;
            shr.b32 t0, t0, 4;
            shr.b32 t1, t1, 4;
            lop3.b32 n2, t0, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 n3, t1, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 n0, n0, one, off;
            fma.rn.bf16x2 n1, n1, one, off;
            fma.rn.bf16x2 n2, n2, one, off;
            fma.rn.bf16x2 n3, n3, one, off;
            fma.rn.bf16x2 $0, n0, s0, m0;
            fma.rn.bf16x2 $1, n1, s1, m1;
            fma.rn.bf16x2 $2, n2, s0, m0;
            fma.rn.bf16x2 $3, n3, s1, m1;
            }
            """,
            "=r,=r,=r,=r,r,r,r,r,r", [packed, spread], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        scale = (spread << 16).to(tl.float32, bitcast=True)
        minimum = (spread & -65536).to(tl.float32, bitcast=True)
        low = ((packed & 15).to(tl.float32) * scale + minimum).to(kind)
        high = ((packed >> 4).to(tl.float32) * scale + minimum).to(kind)
    return low, high


@triton.jit
def widen_rows(numbers, kind: tl.constexpr, IS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers in int8 or e4m3, or in `kind` already, exactly in the type `kind`; IS_FAST as above."""
    if not IS_FAST:
        wide = numbers.to(kind)
    elif numbers.dtype == tl.int8:
        # The lower seven bits in those of 128 are 128 + bits; the sign in the exponent's last makes 256 of 128.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t0, t1, n0, n1, one;
            mov.b32 one, 0x3f803f80;
            prmt.b32 t0, $2, 0x43434343, 0x4140;
            prmt.b32 t1, $2, 0x43434343, 0x4342;
            and.b32 n0, t0, 0x437f437f;
            and.b32 n1, t1, 0x437f437f;
            lop3.b32 t0, t0, 0x43804380, 0x80008000, 0x6a;
            lop3.b32 t1, t1, 0x43804380, 0x80008000, 0x6a;
            fma.rn.bf16x2 $0, n0, one, t0;
            fma.rn.bf16x2 $1, n1, one, t1;
            }
            """,
            "=r,=r,r", [numbers], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        # Exponent and mantissa in the places of bfloat16's are the number times 2^(7 - 127), subnormal ones too.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t0, t1, s0, s1, back, zero;
            mov.b32 back, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            prmt.b32 t0, $2, 0, 0x1404;
            prmt.b32 t1, $2, 0, 0x3424;
            and.b32 s0, t0, 0x80008000;
            and.b32 s1, t1, 0x80008000;
            shr.b32 t0, t0, 4;
            shr.b32 t1, t1, 4;
            lop3.b32 t0, t0, 0x07f007f0, s0, 0xea;
            lop3.b32 t1, t1, 0x07f007f0, s1, 0xea;
            fma.rn.bf16x2 $0, t0, back, zero;
            fma.rn.bf16x2 $1, t1, back, zero;
            }
            """,
            "=r,=r,r", [numbers], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return wide


@triton.jit
def as_float(numbers, IS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of any kind, exactly in float32; IS_FAST: they are int8, and are not converted one by one."""
    if IS_FAST:
        # A byte in the last bits of 2^23 is 2^23 + byte.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, n0, n1, n2, n3, high;
            .reg .f32 off;
            mov.b32 high, 0x4b000000;
            mov.b32 off, 0x4b000080;
            xor.b32 t, $4, 0x80808080;
            prmt.b32 n0, t, high, 0x7650;
            prmt.b32 n1, t, high, 0x7651;
            prmt.b32 n2, t, high, 0x7652;
            prmt.b32 n3, t, high, 0x7653;
            sub.f32 $0, n0, off;
            sub.f32 $1, n1, off;
            sub.f32 $2, n2, off;
            sub.f32 $3, n3, off;
            }
            """,
            "=f,=f,=f,=f,r", [numbers], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = numbers.to(tl.float32)
    return wide
