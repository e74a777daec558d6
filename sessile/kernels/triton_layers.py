"""The small operations between the matrix products, fused: each reads its inputs and writes its outputs once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ACTIVATION_BLOCK = 1024
_HEADS_AT_ONCE = 8


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of x [t, hidden], computed in float32; a new tensor of x's dtype."""
    normed = torch.empty_like(x)
    _add_rms_norm[(x.shape[0],)](
        x, x, weight, normed, epsilon, x.shape[1], triton.next_power_of_2(x.shape[1]), False,
        num_warps=_norm_warps(x.shape[1]),
    )  # fmt: skip
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Add x [t, hidden] to the residual in place, and return the norm of the sum as a new tensor."""
    normed = torch.empty_like(x)
    _add_rms_norm[(x.shape[0],)](
        x, residual, weight, normed, epsilon, x.shape[1], triton.next_power_of_2(x.shape[1]), True,
        num_warps=_norm_warps(x.shape[1]),
    )  # fmt: skip
    return normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [t, 2 × inner], gate first: [t, inner]."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    _silu_mul[(tokens, triton.cdiv(inner, _ACTIVATION_BLOCK))](gate_up, out, inner, _ACTIVATION_BLOCK)
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

    qkv [t, (heads + 2 × kv_heads) × head_dim], heads of the query first, then of key and value. angles: cosine and
    sine float32[t, head_dim / 2]. slots int32[t]: where each token's K and V go in keys, values
    [slots, kv_heads, head_dim]. head_norms: weights of the norms of each head's query and key before the rotation,
    and their epsilon.
    """
    kv_heads, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(qkv.shape[0], heads, head_dim)
    q_norm, k_norm, epsilon = head_norms or (qkv, qkv, 0.0)
    grid = (qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, _HEADS_AT_ONCE))
    _rotate_and_store[grid](
        qkv, angles[0], angles[1], slots, query, keys, values, q_norm, k_norm, epsilon,
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        AT_ONCE=_HEADS_AT_ONCE, HAS_NORMS=head_norms is not None, num_warps=2,
    )  # fmt: skip
    return query


def _norm_warps(size: int) -> int:
    return 8 if size >= 4096 else 4


@triton.jit
def _add_rms_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, normed, epsilon, size, BLOCK: tl.constexpr, ADDS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    element = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        element += tl.load(residual + first + column, mask=inside, other=0.0).to(tl.float32)
        rounded = element.to(residual.dtype.element_ty)
        tl.store(residual + first + column, rounded, mask=inside)
        element = rounded.to(tl.float32)
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
    qkv, cosines, sines, slots, query, keys, values, q_norm, k_norm, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr,
    AT_ONCE: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """A few heads of one token; heads count through query, key and value."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
    lane = tl.arange(0, PADDED_HALF)[None, :]
    is_lane = lane < HALF
    inside = is_lane & (head < HEADS + 2 * KV_HEADS)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
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
