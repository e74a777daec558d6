"""FlashAttention-3's operator as three packages declare it, computed in plain torch on any device.

What it does with its arguments is what hopper/flash_api.cpp of FlashAttention does: tests see what we hand over.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sessile.kernels import reference
from sessile.kernels.flash_attention3 import FlashAttention3

_COMMON = (
    "k_new,v_new,q_v,out,cu_seqlens_q,cu_seqlens_k,cu_seqlens_k_new,seqused_q,seqused_k,max_seqlen_q:int,"
    "max_seqlen_k:int,page_table,kv_batch_idx,leftpad_k,rotary_cos,rotary_sin,seqlens_rotary,q_descale,k_descale,"
    "v_descale"
)  # fmt: skip
_TAILS = {
    "flash-attn-3": (
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
        "int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor(a!), Tensor, Tensor, Tensor)"
    ),
    "sglang-kernel": (
        "float? softmax_scale, bool is_causal, int window_size_left, int window_size_right, int attention_chunk, "
        "float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, "
        "int sm_margin, Tensor? sinks, Tensor? sparse_mask_fine, bool only_qv) -> (Tensor(a!), Tensor, Tensor, Tensor)"
    ),
    "vllm": (
        "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
        "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
        "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) "
        "-> (Tensor(a!), Tensor, Tensor, Tensor)"
    ),
}
PACKAGES = tuple(_TAILS)
_NEUTRAL = {
    "is_causal": True, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0,
    "only_qv": False, "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip
"""Values that leave attention plain and causal, of the arguments that have one."""


def schema(package: str) -> str:
    """How the package declares the operator."""
    middle = []
    for name in _COMMON.split(","):
        default = "=None" if package == "flash-attn-3" else ""
        kind = "int?" if name.endswith(":int") else "Tensor(a!)?" if name == "out" else "Tensor?"
        middle.append(f"{kind} {name.removesuffix(':int')}{default}")
    return f"fwd(Tensor q, Tensor k, Tensor v, {', '.join(middle)}, {_TAILS[package]}"


def fake_flash_attention3(package: str) -> FlashAttention3:
    """Our binding of an operator that is declared as that package's."""
    return FlashAttention3(package, declared(f"sessile_{package.replace('-', '_')}", schema(package)))


@cache
def declared(namespace: str, text: str) -> Any:
    """The operator of such a schema, known to torch's dispatcher."""
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(text)
    names = [argument.name for argument in getattr(torch.ops, namespace).fwd.default._schema.arguments]
    library.impl(
        "fwd", lambda *given: _attend(**dict(zip(names, given, strict=False))), "CompositeExplicitAutograd"
    )  # fmt: skip
    _LIBRARIES.append(library)
    return getattr(torch.ops, namespace).fwd.default


_LIBRARIES: list[Any] = []
"""They take back what they declared when they are let go."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_q: Tensor, seqused_k: Tensor,
    max_seqlen_q: int, page_table: Tensor, kv_batch_idx: Tensor, leftpad_k: Tensor, softmax_scale: float, **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Paged causal attention of the rows' used queries, aligned to the end of their used keys."""
    rows, page_size = seqused_q.numel(), k.shape[1]
    lists = (cu_seqlens_q[:-1], seqused_q, seqused_k, kv_batch_idx, leftpad_k)
    assert all(given.shape == (rows,) and given.dtype == torch.int32 and given.is_contiguous() for given in lists)
    assert page_table.dtype == torch.int32
    assert softmax_scale == q.shape[-1] ** -0.5
    wrong = {name: value for name, value in others.items() if value is not None and value != _NEUTRAL.get(name, value)}
    assert not wrong, wrong
    for first, count, length, row, pads in zip(*(given.tolist() for given in lists), strict=True):
        assert count <= max_seqlen_q and not pads
        if not count:
            continue
        slots = reference.row_slots(page_table, row, length, page_size)
        keys, values = k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]
        past = length - count
        out[first : first + count] = reference.prompt_attention(
            q[first : first + count], keys[past:], values[past:], keys[:past], values[:past]
        )
    nothing = q.new_empty(0)
    return out, nothing, nothing.clone(), nothing.clone()
