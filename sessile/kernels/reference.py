"""Plain-torch twins of the kernels: slow, obvious, and on any device. Tests hold the kernels to them."""

import torch
from torch import Tensor

INT4_GROUP = 32
"""Weights of one row that share a scale and a minimum; byte i of a group holds weights i and i + 16."""


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Tensor, lengths: Tensor, page_size: int
) -> Tensor:
    """Attention of single queries over paged K and V: what `paged_attention` in `attention_cpu` computes.

    query [n, heads, head_dim]; keys, values [slots, kv_heads, head_dim], where slot = page × page_size + offset;
    table int32[rows_max, pages]; rows, lengths int[n]: batch row of each query and how many tokens it sees, its own
    included. Returns float32[n, heads, head_dim].
    """
    count, heads, head_dim = query.shape
    out = query.new_zeros((count, heads, head_dim), dtype=torch.float32)
    for index in range(count):
        slots = row_slots(table, int(rows[index]), int(lengths[index]), page_size)
        key = keys[slots].float().repeat_interleave(heads // keys.shape[1], dim=1)
        value = values[slots].float().repeat_interleave(heads // keys.shape[1], dim=1)
        scores = torch.einsum("hd,khd->hk", query[index].float(), key) * head_dim**-0.5
        out[index] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), value)
    return out


def row_slots(table: Tensor, row: int, length: int, page_size: int) -> Tensor:
    """Pool slots int64[length] of the first tokens of a row."""
    positions = torch.arange(length, device=table.device)
    return table[row, positions // page_size].long() * page_size + positions % page_size


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, history_keys: Tensor, history_values: Tensor
) -> Tensor:
    """Causal attention of a chunk that follows a history: what `prompt_attention` in `attention` computes.

    query [t, heads, head_dim]; key, value [t, kv_heads, head_dim] of the chunk; history_* [past, kv_heads, head_dim].
    Query i sees the whole history and chunk tokens 0 … i. Returns float32[t, heads, head_dim].
    """
    tokens, heads, head_dim = query.shape
    all_keys = torch.cat((history_keys, key)).float().repeat_interleave(heads // key.shape[1], dim=1)
    all_values = torch.cat((history_values, value)).float().repeat_interleave(heads // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), all_keys) * head_dim**-0.5
    past = history_keys.shape[0]
    visible = torch.ones(tokens, past + tokens, dtype=torch.bool, device=query.device).tril(past)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, all_values)


def unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """float32[n, k] of packed uint8[n, k / 2] and scales [n, k / 32, 2] (scale, minimum)."""
    halves = packed.unflatten(1, (-1, INT4_GROUP // 2))
    numbers = torch.cat((halves & 15, halves >> 4), dim=-1).float()
    return (numbers * scales[..., :1].float() + scales[..., 1:].float()).flatten(1)
