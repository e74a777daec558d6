"""Steps of few tokens on the CPU: a decoder's own weights, run by one compiled call for all layers."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sessile.kernels.attention import SHORT_QUERY_TOKENS, PagedCache, StepRows, compiled_attention
from sessile.kernels.linear import few_tokens
from sessile.model.layers import Attention, Decoder, GatedMLP, Linear, RMSNorm


class FusedCpuDecoder:
    """Runs a decoder's layers on a pool; owns copies of norms and biases in float32 and no other weights.

    The residual stream is float32 whatever the model's dtype.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, kernels: ModuleType) -> None:
        config = decoder.config
        self._decoder, self._cache, self._kernels = decoder, cache, kernels
        self._shape = kernels.DecoderShape(
            config.hidden_size, config.heads, config.kv_heads, config.head_dim, config.intermediate_size,
            config.norm_epsilon,
        )  # fmt: skip
        self._layers = kernels.LayerTable(config.layers)
        for index, block in enumerate(decoder.layers):
            self._put_norm(index, kernels.INPUT_NORM, block.input_layernorm)
            self._put_norm(index, kernels.POST_NORM, block.post_attention_layernorm)
            self._put_attention(index, block.self_attn)
            self._put_mlp(index, block.mlp)
            self._layers.put(index, kernels.KEYS, cache.keys[index])
            self._layers.put(index, kernels.VALUES, cache.values[index])

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, items: Any) -> Tensor:
        """Residual stream after the last layer float32[t, hidden]; K and V of all t tokens are in the pool then.

        tokens, positions, slots int64[t]; items: `WorkItems` of the t queries.
        """
        residual = functional.embedding(tokens, self._decoder.embedding).float().contiguous()
        angles = self._decoder.rope.angles(positions, torch.float32)
        cache = self._cache
        self._kernels.decode(
            self._shape, self._layers, residual, angles, slots, cache.keys, cache.table, items, cache.page_size
        )
        return residual

    def _put_norm(self, index: int, column: int, norm: RMSNorm) -> None:
        self._layers.put(index, column, norm.weight.float().contiguous())

    def _put_linear(self, index: int, column: int, linear: Linear) -> None:
        bias = None if linear.bias is None else linear.bias.float().contiguous()
        self._layers.put_linear(index, column, linear.weight.stored, bias)

    def _put_attention(self, index: int, attention: Attention) -> None:
        self._put_linear(index, self._kernels.QKV, attention.qkv_proj)
        self._put_linear(index, self._kernels.OUTPUT, attention.o_proj)
        if attention.head_norm:
            self._put_norm(index, self._kernels.Q_NORM, attention.q_norm)
            self._put_norm(index, self._kernels.K_NORM, attention.k_norm)

    def _put_mlp(self, index: int, mlp: GatedMLP) -> None:
        self._put_linear(index, self._kernels.GATE_UP, mlp.gate_up_proj)
        self._put_linear(index, self._kernels.DOWN, mlp.down_proj)


def fuse_for_cpu(decoder: Decoder, cache: PagedCache) -> FusedCpuDecoder | None:
    """The compiled twin of the decoder's layers, or None where compiled kernels are not usable."""
    if cache.keys.device.type != "cpu" or compiled_attention() is None:
        return None
    return FusedCpuDecoder(decoder, cache, importlib.import_module("sessile.kernels.decoder_cpu"))


def is_few_tokens(rows: StepRows) -> bool:
    """Whether a step is one for the compiled call: few tokens in all, and no row with a prompt's chunk."""
    return int(rows.counts.sum()) <= few_tokens() and int(rows.counts.max()) <= SHORT_QUERY_TOKENS


def query_items(rows: StepRows) -> Any:
    """`WorkItems` of every token of the step as a query of its own."""
    kernels = compiled_attention()
    assert kernels is not None
    counts = rows.counts
    within: npt.NDArray[np.int32] = np.arange(counts.sum(), dtype=np.int32) - np.repeat(
        np.cumsum(counts, dtype=np.int32) - counts, counts
    )
    return kernels.WorkItems(np.repeat(rows.rows, counts), np.repeat(rows.starts, counts) + within + np.int32(1))
