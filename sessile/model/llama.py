"""Llama 2 and 3, and models of the same shape such as SmolLM2."""

from sessile.model.config import ModelConfig
from sessile.model.layers import Attention, Block, Decoder, GatedMLP


class Llama(Decoder):
    """Pre-norm decoder with rotary positions, grouped-query attention and a gated MLP (Touvron et al., 2023)."""

    def block(self, config: ModelConfig, layer: int) -> Block:
        return Block(config, Attention(config, layer), GatedMLP(config))
