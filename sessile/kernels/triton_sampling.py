"""Choosing tokens on the GPU without the host: seeded noise, exact top-k, top-p and min-p, drafts, last tokens.

The twin is `sampling.sample`: same filters, same noise. There the most likely are sorted; here the value that the
last kept token has is found by bisection over the bits of a float, which needs no sort and no memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.contract.plan import (
    BIND_FLOATS,
    BIND_INTS,
    BIND_MIN_P,
    BIND_SEED_HIGH,
    BIND_SEED_LOW,
    BIND_TEMPERATURE,
    BIND_TOP_K,
    BIND_TOP_P,
    SAMPLE,
)
from sessile.kernels.triton_launch import launch
from sessile.kernels.triton_plan import RowState, StepLayout

_BLOCK = tl.constexpr(4096)
_PARTS_MAX = tl.constexpr(64)
PROGRAMS_WANTED = 264
"""The vocabulary is split until about so many programs share the work."""
_SAMPLE = tl.constexpr(SAMPLE)
_INTS, _FLOATS = tl.constexpr(BIND_INTS), tl.constexpr(BIND_FLOATS)
_TOP_K, _SEED_LOW, _SEED_HIGH = tl.constexpr(BIND_TOP_K), tl.constexpr(BIND_SEED_LOW), tl.constexpr(BIND_SEED_HIGH)
_TEMPERATURE, _TOP_P = tl.constexpr(BIND_TEMPERATURE), tl.constexpr(BIND_TOP_P)
_MIN_P = tl.constexpr(BIND_MIN_P)
_NOWHERE = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True)
class Chosen:
    """tokens, faults int32[m]: the token of each place, and whether its logits were not finite."""

    tokens: Tensor
    faults: Tensor


def choose_tokens(logits: Tensor, state: RowState, layout: StepLayout) -> Chosen:
    """Choose a token at each of m places. logits [m, vocab], any float dtype, penalties and bias included."""
    places, vocab = logits.shape
    parts = min(triton.next_power_of_2(triton.cdiv(PROGRAMS_WANTED, places)), _PARTS_MAX.value)
    best = logits.new_empty((places, parts), dtype=torch.float32)
    ids, faults = (logits.new_empty((places, parts), dtype=torch.int32) for _ in range(2))
    chosen = Chosen(*(logits.new_empty(places, dtype=torch.int32) for _ in range(2)))
    rows = (layout.place_rows, layout.place_depths, layout.rows, layout.indices, state.ints, state.floats)
    launch(_best_of_part, (places, parts), logits, vocab, *rows, best, ids, faults, parts, num_warps=8)
    launch(
        _best_of_place, (places,),
        logits, vocab, *rows, best, ids, faults, chosen.tokens, chosen.faults, parts, num_warps=16
    )
    return chosen


def settle_rows(chosen: Chosen, state: RowState, layout: StepLayout, results: Tensor, rows_max: int) -> None:
    """Accept drafts, remember each row's last token, and write what the host wants to know.

    results int32[3 × rows_max + places]: query counts, tokens emitted and faults by plan row, then the token of each
    place.
    """
    launch(
        _settle, (max(layout.rows.numel(), chosen.tokens.numel()),),
        chosen.tokens, chosen.faults, layout.tokens, layout.rows, layout.counts, layout.flags, layout.drafts,
        layout.places_before, layout.place_tokens, state.last_tokens, results, rows_max,
        layout.rows.numel(), chosen.tokens.numel(), num_warps=1,
    )  # fmt: skip


@triton.jit
def _mix_64(x):  # type: ignore[no-untyped-def]
    """The finaliser of SplitMix64 on uint64."""
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _mix_32(x):  # type: ignore[no-untyped-def]
    """The finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _noise_key(ints, row, output_index):  # type: ignore[no-untyped-def]
    """Hash of the row's seed and the output index, uint64."""
    odd = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    low = tl.load(ints + row * _INTS + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(ints + row * _INTS + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    return _mix_64(_mix_64(((high << 32) | low) + odd) + output_index.to(tl.uint64) * odd)


@triton.jit
def _gumbel(key, token):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise float32 of each token id, as `sampling.gumbel_noise` has it."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    hashed = _mix_32(_mix_32(token.to(tl.uint32) ^ low) + high)
    uniform = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - u) exact for small u (Kahan): the large noise that decides comes from there.
    rest = 1.0 - uniform
    logarithm = tl.where(rest == 1.0, -uniform, tl.log(rest) * (uniform / (1.0 - tl.where(rest == 1.0, 0.0, rest))))
    return -tl.log(-logarithm)


@triton.jit(do_not_specialize=["parts"])
def _best_of_part(  # type: ignore[no-untyped-def]
    logits, vocab, place_rows, place_depths, rows, indices, ints, floats, best, ids, faults, parts
):
    """The most likely token, noise included, of one part of the vocabulary; the lowest id wins a tie."""
    place, part = tl.program_id(0), tl.program_id(1)
    plan_row = tl.load(place_rows + place)
    if plan_row < 0:
        return
    row = tl.load(rows + plan_row)
    temperature = tl.load(floats + row * _FLOATS + _TEMPERATURE)
    key = _noise_key(ints, row, tl.load(indices + plan_row) + tl.load(place_depths + place))
    part_tokens = tl.cdiv(tl.cdiv(vocab, parts), _BLOCK) * _BLOCK
    lane = tl.arange(0, _BLOCK)
    top = tl.full((_BLOCK,), float("-inf"), tl.float32)
    top_id = tl.full((_BLOCK,), _NOWHERE, tl.int32)
    fault = tl.zeros((_BLOCK,), tl.int32)
    for first in range(part * part_tokens, min((part + 1) * part_tokens, vocab), _BLOCK):
        token = first + lane
        logit = tl.load(logits + place.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf"))
        value = logit.to(tl.float32)
        fault |= ((value != value) | (value == float("inf"))).to(tl.int32)
        if temperature > 0:
            value = value / temperature + _gumbel(key, token)
        is_better = (value > top) & (token < vocab)
        top = tl.where(is_better, value, top)
        top_id = tl.where(is_better, token, top_id)
    peak = tl.max(top, 0)
    tl.store(best + place * parts + part, peak)
    tl.store(ids + place * parts + part, tl.min(tl.where(top == peak, top_id, _NOWHERE), 0))
    tl.store(faults + place * parts + part, tl.max(fault, 0))


@triton.jit(do_not_specialize=["parts"])
def _best_of_place(  # type: ignore[no-untyped-def]
    logits, vocab, place_rows, place_depths, rows, indices, ints, floats, best, ids, faults, tokens, place_faults,
    parts,
):  # fmt: skip
    """The token of one place: best of its parts, or drawn again under its filters."""
    place = tl.program_id(0)
    plan_row = tl.load(place_rows + place)
    if plan_row < 0:
        return
    part = tl.arange(0, _PARTS_MAX)
    inside = part < parts
    value = tl.load(best + place * parts + part, mask=inside, other=float("-inf"))
    peak = tl.max(value, 0)
    found = tl.load(ids + place * parts + part, mask=inside, other=_NOWHERE)
    token = tl.min(tl.where(value == peak, found, _NOWHERE), 0)
    fault = tl.max(tl.load(faults + place * parts + part, mask=inside, other=0), 0)
    fault = tl.maximum(fault, (token == _NOWHERE).to(tl.int32))
    row = tl.load(rows + plan_row)
    temperature = tl.load(floats + row * _FLOATS + _TEMPERATURE)
    top_k = tl.load(ints + row * _INTS + _TOP_K)
    top_p = tl.load(floats + row * _FLOATS + _TOP_P)
    min_p = tl.load(floats + row * _FLOATS + _MIN_P)
    is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if (temperature > 0) & is_filtered & (fault == 0):
        key = _noise_key(ints, row, tl.load(indices + plan_row) + tl.load(place_depths + place))
        own = logits + place.to(tl.int64) * vocab
        token = _draw_filtered(own, vocab, temperature, tl.where(top_k > 0, top_k, vocab), top_p, min_p, key)
    tl.store(tokens + place, tl.where(fault != 0, 0, token))
    tl.store(place_faults + place, fault)


@triton.jit
def _scaled(logits, token, vocab, temperature):  # type: ignore[no-untyped-def]
    logit = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    return logit.to(tl.float32) / temperature


@triton.jit
def _order(value):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of the floats."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = tl.full((), 0x80000000, tl.uint32)
    return tl.where((bits & sign) != 0, bits ^ tl.full((), 0xFFFFFFFF, tl.uint32), bits | sign)


@triton.jit
def _above(logits, vocab, temperature, peak, bound):  # type: ignore[no-untyped-def]
    """How many values, and how much of exp(value - peak), are at the bound or above."""
    lane = tl.arange(0, _BLOCK)
    count = tl.zeros((_BLOCK,), tl.int32)
    mass = tl.zeros((_BLOCK,), tl.float32)
    for first in range(0, vocab, _BLOCK):
        value = _scaled(logits, first + lane, vocab, temperature)
        is_above = (_order(value) >= bound) & (first + lane < vocab)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, tl.exp(value - peak), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _draw_filtered(logits, vocab, temperature, top_k, top_p, min_p, key):  # type: ignore[no-untyped-def]
    """Draw among the tokens that pass top-k, then top-p of what is left, then min-p against the most likely."""
    lane = tl.arange(0, _BLOCK)
    highest = tl.full((_BLOCK,), float("-inf"), tl.float32)
    for first in range(0, vocab, _BLOCK):
        highest = tl.maximum(highest, _scaled(logits, first + lane, vocab, temperature))
    peak = tl.max(highest, 0)
    one = tl.full((), 1, tl.uint32)
    # The order of the k-th largest value, bit by bit: the largest bound that at least k values reach.
    bound = tl.full((), 0, tl.uint32)
    if top_k < vocab:
        bit = one << 31
        for _ in range(32):
            count, mass = _above(logits, vocab, temperature, peak, bound | bit)
            bound = tl.where(count >= top_k, bound | bit, bound)
            bit = bit >> 1
    count, mass = _above(logits, vocab, temperature, peak, bound + one)  # strictly above
    count_all, mass_all = _above(logits, vocab, temperature, peak, bound)
    # Of the values that tie at the bound only so many are kept, lowest ids first.
    kept_ties = tl.where(top_k < vocab, top_k - count, vocab)
    tie_mass = (mass_all - mass) / tl.maximum(count_all - count, 1).to(tl.float32)
    wanted = top_p * (mass + tl.minimum(kept_ties, count_all - count).to(tl.float32) * tie_mass)
    if top_p < 1.0:
        nucleus = tl.full((), 0, tl.uint32)
        bit = one << 31
        for _ in range(32):
            count, mass = _above(logits, vocab, temperature, peak, nucleus | bit)
            nucleus = tl.where(mass >= wanted, nucleus | bit, nucleus)
            bit = bit >> 1
        if nucleus >= bound:
            count, mass = _above(logits, vocab, temperature, peak, nucleus + one)
            count_all, mass_all = _above(logits, vocab, temperature, peak, nucleus)
            share = (mass_all - mass) / tl.maximum(count_all - count, 1).to(tl.float32)
            nucleus_ties = tl.ceil((wanted - mass) / tl.maximum(share, 1e-30)).to(tl.int32)
            kept_ties = tl.where(nucleus == bound, tl.minimum(kept_ties, nucleus_ties), nucleus_ties)
            bound = nucleus
    return _draw_above(logits, vocab, temperature, peak, bound, tl.maximum(kept_ties, 1), min_p, key)


@triton.jit
def _draw_above(logits, vocab, temperature, peak, bound, kept_ties, min_p, key):  # type: ignore[no-untyped-def]
    """Draw among the values above the bound and the first few that tie with it."""
    lane = tl.arange(0, _BLOCK)
    top = tl.full((_BLOCK,), float("-inf"), tl.float32)
    top_id = tl.full((_BLOCK,), _NOWHERE, tl.int32)
    ties = 0
    for first in range(0, vocab, _BLOCK):
        token = first + lane
        value = _scaled(logits, token, vocab, temperature)
        order = _order(value)
        is_tie = ((order == bound) & (token < vocab)).to(tl.int32)
        rank = ties + tl.cumsum(is_tie, 0) - is_tie
        ties += tl.sum(is_tie, 0)
        is_kept = (order > bound) | ((is_tie != 0) & (rank < kept_ties))
        is_kept = is_kept & (token < vocab) & (tl.exp(value - peak) >= min_p)
        noisy = tl.where(is_kept, value + _gumbel(key, token), float("-inf"))
        is_better = noisy > top
        top = tl.where(is_better, noisy, top)
        top_id = tl.where(is_better, token, top_id)
    best = tl.max(top, 0)
    return tl.min(tl.where(top == best, top_id, _NOWHERE), 0)


@triton.jit(do_not_specialize=["rows_total", "places_total"])
def _settle(  # type: ignore[no-untyped-def]
    chosen, place_faults, tokens, rows, counts, flags, drafts, places_before, place_tokens, last_tokens, results,
    rows_max, rows_total, places_total,
):  # fmt: skip
    """Program i settles plan row i and passes on the token of place i."""
    i = tl.program_id(0)
    if i < places_total:
        tl.store(results + 3 * rows_max + i, tl.load(chosen + i))
    count = tl.load(counts + i, mask=i < rows_total, other=0)
    if count > 0:  # not padding
        emitted, fault = 0, 0
        if (tl.load(flags + i) & _SAMPLE) != 0:
            base = tl.load(places_before + i)
            draft_count = tl.load(drafts + i)
            accepting = 1
            for depth in range(draft_count):
                draft = tl.load(tokens + tl.load(place_tokens + base + depth) + 1)
                accepting = accepting & (tl.load(chosen + base + depth) == draft).to(tl.int32)
                emitted += accepting
            for depth in range(draft_count + 1):
                fault = fault | tl.load(place_faults + base + depth)
            tl.store(last_tokens + tl.load(rows + i), tl.load(chosen + base + emitted).to(tl.int64))
            emitted += 1
        tl.store(results + i, count)
        tl.store(results + rows_max + i, emitted)
        tl.store(results + 2 * rows_max + i, fault)
