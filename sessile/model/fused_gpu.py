"""The forward pass of a decoder on a GPU: its own weights, with norms, rotation, KV writes and gating fused.

`Decoder.forward` is the twin that says what is computed; tests hold this to it.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from sessile.kernels.flash_attention3 import FlashAttention3, ListedRows
from sessile.kernels.triton_attention import narrow_row_tokens, narrow_tile, paged_attention, wide_tile
from sessile.kernels.triton_layers import add_rms_norm, rms_norm, rotate_and_store
from sessile.kernels.triton_linear import Norm, add_linear, norm_gated_linear, norm_linear
from sessile.kernels.triton_plan import StepLayout
from sessile.kernels.triton_work import AttentionWork, HeadShape
from sessile.model.config import ModelConfig
from sessile.model.gpu_linear import GpuLinears
from sessile.model.layers import Attention, Block, Decoder, RMSNorm
from sessile.units import ceil_div

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GpuCache:
    """What attention reads and writes; owned by the device.

    keys, values [layers, slots, kv_heads, head_dim]. table int32[rows_max, pages of a row].
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    page_size: int


@dataclass(frozen=True)
class BlockKinds:
    """Which kinds of rows a step may have; attention of the others is not launched."""

    narrow: bool
    wide: bool


class FusedDecoder:
    """Runs a decoder's weights on steps that are laid out on the device. Owns nothing.

    flash: attends with prompts in steps of sizes that it is faster at; None: our own kernels do.
    """

    def __init__(self, decoder: Decoder, cache: GpuCache, flash: FlashAttention3 | None = None) -> None:
        self.config: ModelConfig = decoder.config
        self.shape = HeadShape(decoder.config.heads, decoder.config.kv_heads, decoder.config.head_dim)
        self._decoder = decoder
        self._linears = GpuLinears(decoder)
        self._fuses_one_token = not decoder.config.mlp_bias and not self._linears.has_int4()
        self._cache = cache
        self._flash = flash
        self._narrow = narrow_tile(self.shape, cache.keys.dtype)
        self._wide = wide_tile(self.shape, cache.keys.dtype)
        self._beside = torch.cuda.Stream() if cache.keys.device.type == "cuda" else None
        self._frequencies = decoder.rope.frequencies.to(cache.keys.device)

    @property
    def narrow_row_tokens(self) -> int:
        """Rows with at most so many query tokens are narrow."""
        return narrow_row_tokens(self.shape)

    def layout(self, tokens: int, rows: int, places: int, kinds: BlockKinds) -> StepLayout:
        """Memory for the layout of a step of this size."""
        device, narrow_tokens = self._frequencies.device, self.shape.block_tokens(self._narrow.queries)
        narrows = rows if tokens == rows else min(ceil_div(self.narrow_row_tokens, narrow_tokens) * rows, tokens)
        return StepLayout.empty(
            tokens, rows, places,
            AttentionWork.empty(narrows if kinds.narrow else 0, self.shape, self._narrow, device),
            self._wide_work(tokens, rows if kinds.wide else 0),
            self.narrow_row_tokens,
        )  # fmt: skip

    def _wide_work(self, tokens: int, rows: int) -> AttentionWork | ListedRows:
        """Room for the wide rows of a step of this size: for the kernels that attend with them."""
        device = self._frequencies.device
        splits = self._flash.splits(tokens, rows, self.shape.heads, self.shape.kv_heads) if self._flash else None
        if splits is not None:
            return ListedRows.empty(min(rows, tokens // (self.narrow_row_tokens + 1)), tokens, device, splits)
        blocks = min(rows + tokens // self.shape.block_tokens(self._wide.queries), tokens)
        return AttentionWork.empty(blocks if rows else 0, self.shape, self._wide, device)

    def forward(self, layout: StepLayout, layers: int | None = None) -> Tensor:
        """The residual stream after the last layer, [t, hidden]; K and V of all tokens are in the pool then.

        layers: run only the first so many.
        """
        residual = functional.embedding(layout.tokens, self._decoder.embedding)
        turns = layout.positions[:, None] * self._frequencies
        angles = turns.cos(), turns.sin()
        if residual.shape[0] == 1 and self._fuses_one_token:
            for layer in islice(self._decoder.layers, layers):
                self._one_token_layer(layer, residual, angles, layout)
            return residual
        x = torch.zeros_like(residual)
        for layer in islice(self._decoder.layers, layers):
            x = self._layer(layer, x, residual, angles, layout)
        return residual.add_(x if x.dim() == 2 else x.sum(0))

    def logits(self, residual: Tensor, tokens: Tensor) -> Tensor:
        """Raw logits [m, vocab] in the model's dtype, of the tokens int32[m] of what `forward` returned."""
        norm, head = self._decoder.norm, self._decoder.head
        chosen = residual.index_select(0, tokens)
        if chosen.shape[0] == 1 and isinstance(self._linears.weight(head), Tensor):
            return norm_linear(chosen, norm_of(norm), self._linears.weight(head), head.bias)
        return self._linears.whole(head, rms_norm(chosen, norm.weight, norm.epsilon))

    def _layer(self, layer: Block, x: Tensor, residual: Tensor, angles: Angles, layout: StepLayout) -> Tensor:
        """Add the last layer's output x, or its parts, to the residual stream, and return this one's."""
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        x = add_rms_norm(x, residual, norm.weight, norm.epsilon)
        attended = self._attend(attention, self._linears.product(attention.qkv_proj, x), angles, layout)
        norm = layer.post_attention_layernorm
        x = add_rms_norm(self._linears.product(attention.o_proj, attended), residual, norm.weight, norm.epsilon)
        return self._linears.product(mlp.down_proj, self._linears.gated(mlp.gate_up_proj, x))

    def _one_token_layer(self, layer: Block, residual: Tensor, angles: Angles, layout: StepLayout) -> None:
        """Run a layer on the residual stream in place, with norms, gating and sums inside the products."""
        attention, mlp, weight = layer.self_attn, layer.mlp, self._linears.weight
        norm, qkv_proj, o_proj, down_proj = layer.input_layernorm, attention.qkv_proj, attention.o_proj, mlp.down_proj
        qkv = norm_linear(residual, norm_of(norm), weight(qkv_proj), qkv_proj.bias)
        attended = self._attend(attention, qkv, angles, layout)
        add_linear(attended, weight(o_proj), o_proj.bias, residual)
        norm = layer.post_attention_layernorm
        gated = norm_gated_linear(residual, norm_of(norm), weight(mlp.gate_up_proj))
        add_linear(gated, weight(down_proj), down_proj.bias, residual)

    def _attend(self, module: Attention, qkv: Tensor, angles: Angles, layout: StepLayout) -> Tensor:
        """Rotate, store and attend; [t, heads × head_dim]."""
        cache = self._cache
        keys, values = cache.keys[module.layer], cache.values[module.layer]
        norms = (module.q_norm.weight, module.k_norm.weight, module.q_norm.epsilon) if module.head_norm else None
        query = rotate_and_store(qkv, angles, layout.slots, keys, values, norms)
        # Nothing writes the rows of padding tokens, and no other token reads them.
        out = torch.empty_like(query)
        attend = partial(self._attend_with, query, keys, values, layout, out)
        wide, narrow = layout.wide, layout.narrow
        if self._beside and wide.pieces and narrow.pieces:
            # Prompts wait for arithmetic and decoding rows for memory: side by side they take less than in turn.
            # FlashAttention-3 keeps the multiprocessors that it has got to its end, so decoding rows go first.
            first, second = (narrow, wide) if isinstance(wide, ListedRows) else (wide, narrow)
            here = torch.cuda.current_stream()
            self._beside.wait_stream(here)
            try:
                attend(first)
                with torch.cuda.stream(self._beside):
                    attend(second)
            finally:
                # Also where memory ran out half-way: a capture cannot end, nor can memory be used again, before that.
                here.wait_stream(self._beside)
            return out.flatten(1)
        for work in (wide, narrow):
            if work.pieces:
                attend(work)
        return out.flatten(1)

    def _attend_with(
        self, query: Tensor, keys: Tensor, values: Tensor, layout: StepLayout, out: Tensor,
        work: AttentionWork | ListedRows,
    ) -> None:  # fmt: skip
        """Attend with the rows that the work lists, by the kernels that it is listed for."""
        table, page_size = self._cache.table, self._cache.page_size
        if isinstance(work, ListedRows):
            assert self._flash, "rows are listed for FlashAttention-3 only where it is there"
            self._flash.attend(query, keys, values, table, work, page_size, out)
        else:
            paged_attention(query, keys, values, table, layout, work, page_size, out)


def norm_of(module: RMSNorm) -> Norm:
    """The norm as the kernels take it."""
    return Norm(module.weight, module.epsilon)
