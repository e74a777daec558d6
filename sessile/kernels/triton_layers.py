"""The small operations between the matrix products, fused: each reads its inputs and writes its outputs once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_early import have_read, launch_options, next_begins, wait_for_inputs
from sessile.kernels.triton_launch import launch

_ACTIVATION_BLOCK = 1024
_HEADS_AT_ONCE = 8


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of x [t, hidden], computed in float32; a new tensor of x's dtype."""
    normed = torch.empty_like(x)
    following = next_begins(x, x.shape[0])
    launch(
        _add_rms_norm, (x.shape[0],),
        x, x, weight, normed, epsilon, x.shape[1], 0, triton.next_power_of_2(x.shape[1]), 0, following.value,
        num_warps=_norm_warps(x.shape[1]), **launch_options(following),
    )  # fmt: skip
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Add x [t, hidden], or all its parts [parts, t, hidden], to the residual [t, hidden] in place.

    Returns the norm of the sum as a new tensor.
    """
    tokens, size = residual.shape
    normed = torch.empty_like(residual)
    following = next_begins(x, tokens)
    launch(
        _add_rms_norm, (tokens,),
        x, residual, weight, normed, epsilon, size, tokens * size, triton.next_power_of_2(size), parts_of(x),
        following.value,
        num_warps=_norm_warps(size), **launch_options(following),
    )  # fmt: skip
    return normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [t, 2 × inner], gate first: [t, inner]."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    launch(_silu_mul, (tokens, triton.cdiv(inner, _ACTIVATION_BLOCK)), gate_up, out, inner, _ACTIVATION_BLOCK)
    return out


def rotate_and_store(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    head_norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Rotate query and key, write key and value to the pool, and return the query [t, heads, head_dim].

    qkv [t, (heads + 2 × kv_heads) × head_dim], or all its parts [parts, t, the same]: heads of the query first, then of
    key and value. angles: cosine and sine float32[t, head_dim / 2]. slots int32[t]: where each token's K and V go in
    keys, values [slots, kv_heads, head_dim]. head_norms: weights of the norms of each head's query and key before the
    rotation, and their epsilon.
    """
    kv_heads, head_dim = keys.shape[1:]
    tokens, size = qkv.shape[-2:]
    heads = size // head_dim - 2 * kv_heads
    query = keys.new_empty(tokens, heads, head_dim)
    q_norm, k_norm, epsilon = head_norms or (qkv, qkv, 0.0)
    following = next_begins(qkv, tokens)
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS_AT_ONCE))
    launch(
        _rotate_and_store, grid,
        qkv, tokens * size, angles[0], angles[1], slots, query, keys, values, q_norm, k_norm, epsilon,
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        AT_ONCE=_HEADS_AT_ONCE, HAS_NORMS=head_norms is not None, PARTS=parts_of(qkv), NEXT=following.value,
        num_warps=2, **launch_options(following),
    )  # fmt: skip
    return query


def parts_of(x: Tensor) -> int:
    """How many parts x [t, n] or [parts, t, n] has; more than one are summed by whoever reads them."""
    return x.shape[0] if x.dim() == 3 else 1


def _norm_warps(size: int) -> int:
    return 8 if size >= 4096 else 4


@triton.jit
def _add_rms_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, normed, epsilon, size, part_size, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """One token. PARTS: how many of x are added to the residual; 0: x is what is normed."""
    first = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(NEXT)
    element = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            element += tl.load(x + part * part_size + first + column, mask=inside, other=0.0).to(tl.float32)
        element += tl.load(residual + first + column, mask=inside, other=0.0).to(tl.float32)
        rounded = element.to(residual.dtype.element_ty)
        tl.store(residual + first + column, rounded, mask=inside)
        element = rounded.to(tl.float32)
    have_read(NEXT)
    scale = tl.rsqrt(tl.sum(element * element) / size + epsilon)
    tl.store(normed + first + column, (element * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + token * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * inner + column, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, part_size, cosines, sines, slots, query, keys, values, q_norm, k_norm, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr,
    AT_ONCE: tl.constexpr, HAS_NORMS: tl.constexpr, PARTS: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """A few heads of one token; heads count through query, key and value."""
    wait_for_inputs(NEXT)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
    lane = tl.arange(0, PADDED_HALF)[None, :]
    is_lane = lane < HALF
    inside = is_lane & (head < HEADS + 2 * KV_HEADS)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        first += tl.load(source + part * part_size, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(source + part * part_size + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + epsilon)[:, None]
        low = tl.where(is_query, tl.load(q_norm + lane, mask=is_lane), tl.load(k_norm + lane, mask=is_lane))
        high = tl.where(
            is_query, tl.load(q_norm + HALF + lane, mask=is_lane), tl.load(k_norm + HALF + lane, mask=is_lane)
        )
        first = tl.where(is_value, first, first * scale * low.to(tl.float32))
        second = tl.where(is_value, second, second * scale * high.to(tl.float32))
    cosine = tl.load(cosines + token * HALF + lane, mask=is_lane, other=0.0)
    sine = tl.load(sines + token * HALF + lane, mask=is_lane, other=0.0)
    have_read(NEXT)
    kind = keys.dtype.element_ty
    turned_first = tl.where(is_value, first, first * cosine - second * sine).to(kind)
    turned_second = tl.where(is_value, second, second * cosine + first * sine).to(kind)
    target = query + (token * HEADS + head) * (2 * HALF) + lane
    tl.store(target, turned_first, mask=inside & is_query)
    tl.store(target + HALF, turned_second, mask=inside & is_query)
    slot = tl.load(slots + token).to(tl.int64)
    target = keys + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + lane
    tl.store(target, turned_first, mask=is_lane & is_key)
    tl.store(target + HALF, turned_second, mask=is_lane & is_key)
    target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + lane
    tl.store(target, turned_first, mask=inside & is_value)
    tl.store(target + HALF, turned_second, mask=inside & is_value)
