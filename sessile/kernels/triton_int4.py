"""Linear layers of few tokens on a GPU whose weights are int4: unpacked between memory and the matrix units.

Byte i of a group of 32 weights holds weights i and i + 16 (`linear.Int4Weight`), so that a tile of bytes is two tiles
of weights, each multiplied with its own half of the inputs. Nothing is shuffled: the inputs are read in the order in
which the weights lie.
"""

import triton
import triton.language as tl

from sessile.kernels.triton_early import ask_for, have_read, wait_for_inputs
from sessile.kernels.triton_widen import HALF, widen_groups


@triton.jit(do_not_specialize=["tokens"])
def few_tokens_int4(  # type: ignore[no-untyped-def]
    x, weight, words, bias, out, tokens, outs, ins, split_ins, token_blocks,
    HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, IS_EVEN: tl.constexpr, IS_FAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """As `_few_tokens` of `triton_few`, of bytes [out, in / 2] and words [out, in / 32]."""
    # Programs side by side read the same rows of the weight, once from memory, for all tokens.
    row = tl.program_id(0) // token_blocks * OUTS + tl.arange(0, OUTS)
    split = tl.program_id(1)
    token = tl.program_id(0) % token_blocks * TOKENS + tl.arange(0, TOKENS)
    byte, group = tl.arange(0, INS // 2), tl.arange(0, INS // 32)
    lane = byte // HALF * 32 + byte % HALF
    is_row, is_token = row < outs, token < tokens
    first = split * split_ins
    kind: tl.constexpr = x.dtype.element_ty
    rows = weight + row[:, None].to(tl.int64) * (ins // 2) + first // 2 + byte[None, :]
    row_words = words + row[:, None].to(tl.int64) * (ins // 32) + first // 32 + group[None, :]
    up_rows, up_words = rows + outs.to(tl.int64) * (ins // 2), row_words + outs.to(tl.int64) * (ins // 32)
    columns = x + token[None, :] * ins + first + lane[:, None]
    if NEXT > 0:
        ask_for(weight, row, first // 2, outs, ins // 2, AHEAD)
        if IS_GATED:
            ask_for(weight + outs.to(tl.int64) * (ins // 2), row, first // 2, outs, ins // 2, AHEAD)
    wait_for_inputs(NEXT)
    product = tl.zeros((OUTS, TOKENS), tl.float32)
    second = tl.zeros((OUTS, TOKENS), tl.float32)
    for done in tl.range(0, split_ins, INS, num_stages=STAGES):
        is_input = first + done + lane < ins
        is_word = is_row[:, None] & (first + done + group * 32 < ins)[None, :]
        is_byte = is_row[:, None] & is_input[None, :]
        a = tl.load(columns + done, mask=is_token[None, :] & is_input[:, None], other=0.0)
        b = tl.load(columns + done + HALF, mask=is_token[None, :] & is_input[:, None], other=0.0)
        if IS_EVEN:
            w = tl.load(rows + done // 2, eviction_policy="evict_first")
            s = tl.load(row_words + done // 32)
        else:
            w = tl.load(rows + done // 2, mask=is_byte, other=0)
            s = tl.load(row_words + done // 32, mask=is_word, other=0)
        low, high = widen_groups(w, s, kind, IS_FAST)
        product = tl.dot(low, a, product, input_precision="ieee")
        product = tl.dot(high, b, product, input_precision="ieee")
        if IS_GATED:
            if IS_EVEN:
                w = tl.load(up_rows + done // 2, eviction_policy="evict_first")
                s = tl.load(up_words + done // 32)
            else:
                w = tl.load(up_rows + done // 2, mask=is_byte, other=0)
                s = tl.load(up_words + done // 32, mask=is_word, other=0)
            low, high = widen_groups(w, s, kind, IS_FAST)
            second = tl.dot(low, a, second, input_precision="ieee")
            second = tl.dot(high, b, second, input_precision="ieee")
    have_read(NEXT)
    if HAS_BIAS:
        if split == 0:
            product += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        product = product / (1.0 + tl.exp(-product)) * second
    target = out + (split * tokens + token[None, :]).to(tl.int64) * outs + row[:, None]
    tl.store(target, product.to(out.dtype.element_ty), mask=is_token[None, :] & is_row[:, None])


@triton.jit
def one_token_int4(  # type: ignore[no-untyped-def]
    x, weight, words, bias, gain, out, outs, ins, epsilon,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr, ADDS: tl.constexpr,
    IS_EVEN: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, AHEAD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """As `_one_token` of `triton_linear`, of bytes [out, in / 2] and words [out, in / 32]."""
    column = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    is_column = column < outs
    byte, group = tl.arange(0, INS // 2), tl.arange(0, INS // 32)
    lane = byte // HALF * 32 + byte % HALF
    product = tl.zeros((OUTS, INS // 32), tl.float32)
    second = tl.zeros((OUTS, INS // 32), tl.float32)
    squares = tl.zeros((INS // 2,), tl.float32)
    rows = weight + column[:, None].to(tl.int64) * (ins // 2) + byte[None, :]
    row_words = words + column[:, None].to(tl.int64) * (ins // 32) + group[None, :]
    up_rows, up_words = rows + outs.to(tl.int64) * (ins // 2), row_words + outs.to(tl.int64) * (ins // 32)
    if NEXT > 0:
        ask_for(weight, column, 0, outs, ins // 2, AHEAD)
        if IS_GATED:
            ask_for(weight + outs.to(tl.int64) * (ins // 2), column, 0, outs, ins // 2, AHEAD)
    wait_for_inputs(NEXT)
    for first in range(0, ins, INS):
        is_input = first + lane < ins
        is_byte = is_column[:, None] & is_input[None, :]
        is_word = is_column[:, None] & (first + group * 32 < ins)[None, :]
        if IS_EVEN:
            w = tl.load(rows + first // 2)
            s = tl.load(row_words + first // 32)
        else:
            w = tl.load(rows + first // 2, mask=is_byte, other=0)
            s = tl.load(row_words + first // 32, mask=is_word, other=0)
        a = tl.load(x + first + lane, mask=is_input, other=0.0).to(tl.float32)
        b = tl.load(x + first + HALF + lane, mask=is_input, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += a * a + b * b
            a *= tl.load(gain + first + lane, mask=is_input, other=0.0).to(tl.float32)
            b *= tl.load(gain + first + HALF + lane, mask=is_input, other=0.0).to(tl.float32)
        product += _group_sums(w, s, a, b)
        if IS_GATED:
            if IS_EVEN:
                w = tl.load(up_rows + first // 2)
                s = tl.load(up_words + first // 32)
            else:
                w = tl.load(up_rows + first // 2, mask=is_byte, other=0)
                s = tl.load(up_words + first // 32, mask=is_word, other=0)
            second += _group_sums(w, s, a, b)
    total = tl.sum(product, 1)
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(squares, 0) / ins + epsilon)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.sum(second, 1) * tl.rsqrt(tl.sum(squares, 0) / ins + epsilon)
        total = total / (1.0 + tl.exp(-total)) * up
    if ADDS:
        total += tl.load(out + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _group_sums(packed, words, a, b):  # type: ignore[no-untyped-def]
    """Products of bytes [rows, n] with the inputs a and b [n] of their halves, summed by group: [rows, n / 16]."""
    rows: tl.constexpr = packed.shape[0]
    groups: tl.constexpr = packed.shape[1] // HALF
    numbers = (packed & 15).to(tl.float32) * a[None, :] + (packed >> 4).to(tl.float32) * b[None, :]
    sums = tl.sum(numbers.reshape(rows, groups, HALF), 2)
    inputs = tl.sum((a + b).reshape(groups, HALF), 1)
    scale = (words << 16).to(tl.float32, bitcast=True)
    minimum = (words & -65536).to(tl.float32, bitcast=True)
    return scale * sums + minimum * inputs[None, :]
