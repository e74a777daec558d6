"""Qwen 3, dense."""

from sessile.model.config import ModelConfig
from sessile.model.layers import Attention, Block, Decoder, GatedMLP


class Qwen3(Decoder):
    """Llama's layers with an RMS norm on each head's query and key before the rotation (Yang et al., 2025)."""

    def block(self, config: ModelConfig, layer: int) -> Block:
        return Block(config, Attention(config, layer, head_norm=True), GatedMLP(config))
