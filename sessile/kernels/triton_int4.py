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
