"""Mistral 7B and its kin, served up to the length of their sliding window."""

from sessile.model.config import ModelConfig
from sessile.model.layers import Attention, Block, Decoder, GatedMLP


class Mistral(Decoder):
    """Llama's layers with a head dimension of its own choice (Jiang et al., 2023)."""

    def block(self, config: ModelConfig, layer: int) -> Block:
        return Block(config, Attention(config, layer), GatedMLP(config))
