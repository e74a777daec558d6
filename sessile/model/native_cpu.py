"""Steps of any size on the CPU: a decoder's own weights, run by one call of the C++ kernels for all layers.

`Decoder.forward` is the twin that says what is computed; tests hold this to it.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sessile.kernels.attention import SHORT_QUERY_TOKENS, PagedCache, StepRows
from sessile.kernels.linear import PackedWeight
from sessile.kernels.native import BFLOAT16_INPUTS, PHASES, POOL_TYPES, Layer, NativeKernels, Step
from sessile.kernels.native import Linear as PlacedLinear
from sessile.kernels.packing import GROUP
from sessile.model.config import ModelConfig
from sessile.model.layers import Decoder, Linear, RMSNorm
from sessile.units import ceil_div

SPLITS_TOKENS = ((1024, 128), (4096, 256))
"""A row with at most so many history tokens is cut into work items of so many: alone, it keeps all threads busy."""
SPLIT_TOKENS = 512
"""Tokens of a longer row's items: within one, memory is read in order."""
KEY_TILE, QUERY_TILE = 64, 16
"""Keys and positions of one tile of a chunk's attention, as in cpp/attention.h."""

Table = npt.NDArray[np.int32]


class NativeCpuDecoder:
    """Runs a decoder's layers on a pool; owns copies of norms and biases in float32 and no other weights.

    The residual stream is float32 whatever the model's dtype.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, kernels: NativeKernels) -> None:
        assert cache.keys.is_contiguous() and cache.values.is_contiguous() and cache.table.is_contiguous()
        assert cache.keys.shape == cache.values.shape and cache.table.dtype == torch.int32
        assert (cache.key_scales is None) == (cache.value_scales is None) == (cache.keys.dtype != torch.int8)
        self._decoder, self._cache, self._kernels = decoder, cache, kernels
        self._kept: list[Tensor] = []
        self.nanoseconds: npt.NDArray[np.int64] = np.zeros(len(PHASES), np.int64)
        """Of the steps so far, by PHASES; kept only while `is_timed`."""
        self.is_timed = False
        self._inputs = _common_inputs(decoder)
        self._layers = (Layer * decoder.config.layers)()
        for index, block in enumerate(decoder.layers):
            layer, attention = self._layers[index], block.self_attn
            layer.input_norm = self._place_norm(block.input_layernorm)
            layer.post_norm = self._place_norm(block.post_attention_layernorm)
            if attention.head_norm:
                layer.q_norm, layer.k_norm = self._place_norm(attention.q_norm), self._place_norm(attention.k_norm)
            layer.keys, layer.values = cache.keys[index].data_ptr(), cache.values[index].data_ptr()
            if cache.key_scales is not None and cache.value_scales is not None:
                layer.key_scales = cache.key_scales[index].data_ptr()
                layer.value_scales = cache.value_scales[index].data_ptr()
            layer.qkv, layer.output = self._place(attention.qkv_proj), self._place(attention.o_proj)
            layer.gate_up, layer.down = self._place(block.mlp.gate_up_proj), self._place(block.mlp.down_proj)

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: StepRows, *, is_read: bool = True
    ) -> Tensor:
        """Residual stream after the last layer float32[t, hidden]; K and V of all t tokens are in the pool then.

        tokens, positions, slots int64[t]. is_read: whether anybody reads what is returned; else it means nothing.
        """
        config, cache = self._decoder.config, self._cache
        residual = functional.embedding(tokens, self._decoder.embedding).float().contiguous()
        cosine, sine = (angle.contiguous() for angle in self._decoder.rope.angles(positions, torch.float32))
        slots = slots.contiguous()
        queries, items, chunks = work_tables(rows)
        tiles = -(-(chunks[:, 2] + chunks[:, 3]) // KEY_TILE)
        self._kernels.step(Step(
            layers=config.layers, tokens=tokens.numel(), hidden=config.hidden_size, heads=config.heads,
            kv_heads=config.kv_heads, d=config.head_dim, inner=config.intermediate_size,
            inputs=self._inputs, pool=POOL_TYPES[cache.keys.dtype],
            row_pages=cache.table.shape[1], page_size=cache.page_size, epsilon=config.norm_epsilon,
            layer_table=ctypes.addressof(self._layers), residual=residual.data_ptr(), cosine=cosine.data_ptr(),
            sine=sine.data_ptr(), slots=slots.data_ptr(), table=cache.table.data_ptr(), queries=len(queries),
            query_table=queries.ctypes.data, items=len(items), item_table=items.ctypes.data, chunks=len(chunks),
            chunk_table=chunks.ctypes.data, key_tiles=int(tiles.sum()),
            query_tiles=int((-(-chunks[:, 3] // QUERY_TILE)).sum()),
            is_read=is_read, nanoseconds=self.nanoseconds.ctypes.data if self.is_timed else 0,
        ))  # fmt: skip
        return residual

    def _place_norm(self, norm: RMSNorm) -> int:
        return self._keep(norm.weight.float().contiguous()).data_ptr()

    def _place(self, linear: Linear) -> PlacedLinear:
        assert isinstance(linear.weight, PackedWeight)
        return linear.weight.place(None if linear.bias is None else self._keep(linear.bias.float().contiguous()))

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


def _common_inputs(decoder: Decoder) -> int:
    """What all linear layers of a step are multiplied with: int8 only if none of them wants more."""
    weights = [
        linear.weight
        for block in decoder.layers
        for linear in (block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj)
    ]
    kinds = {weight.inputs for weight in weights if isinstance(weight, PackedWeight)}
    return kinds.pop() if len(kinds) == 1 else BFLOAT16_INPUTS


def native_decoder(decoder: Decoder, cache: PagedCache) -> NativeCpuDecoder | None:
    """The decoder as one call of the kernels that its weights are packed for; None if they are not packed."""
    weight = decoder.head.weight
    return NativeCpuDecoder(decoder, cache, weight.kernels) if isinstance(weight, PackedWeight) else None


def suits_native(config: ModelConfig) -> bool:
    """Whether the C++ kernels can run a model of these sizes: their weights lie in groups of 32."""
    widths = (config.hidden_size, config.heads * config.head_dim, config.intermediate_size)
    return all(width % GROUP == 0 for width in widths) and config.head_dim % 8 == 0


def work_tables(rows: StepRows) -> tuple[Table, Table, Table]:
    """How a step's attention is cut: (queries [q, 4], items [m, 3], chunks [c, 5]), as cpp/decoder.cpp names them.

    Rows of few tokens are attended query by query, in place; the others as chunks.
    """
    counts = rows.counts
    offsets = np.cumsum(counts, dtype=np.int32) - counts
    short = counts <= SHORT_QUERY_TOKENS
    few = counts[short]
    within = np.arange(few.sum(), dtype=np.int32) - np.repeat(np.cumsum(few, dtype=np.int32) - few, few)
    lengths = np.repeat(rows.starts[short], few) + within + 1
    # By its own length alone, so that a row's output does not depend on who is beside it.
    splits = np.full(lengths.size, SPLIT_TOKENS)
    for upto, size in reversed(SPLITS_TOKENS):
        splits[lengths <= upto] = size
    parts = -(-lengths // splits)
    firsts = np.cumsum(parts) - parts
    queries = np.stack((np.repeat(offsets[short], few) + within, np.repeat(rows.rows[short], few), firsts, parts), 1)
    index = np.repeat(np.arange(lengths.size), parts)
    begins = (np.arange(index.size) - firsts[index]) * splits[index]
    items = np.stack((index, begins, np.minimum(begins + splits[index], lengths[index])), 1)
    ends = rows.starts[~short] + counts[~short]
    tiles = np.array([ceil_div(int(end), KEY_TILE) for end in ends], np.int32)
    chunks = np.stack((offsets[~short], rows.rows[~short], rows.starts[~short], counts[~short],
                       np.cumsum(tiles) - tiles), 1)  # fmt: skip
    return _as_table(queries), _as_table(items), _as_table(chunks)


def _as_table(columns: npt.NDArray[np.signedinteger[Any]]) -> Table:
    return np.ascontiguousarray(columns, np.int32)

