"""Qwen 2 and 2.5, dense."""

from sessile.model.config import ModelConfig
from sessile.model.layers import Attention, Block, Decoder, GatedMLP


class Qwen2(Decoder):
    """Llama's layers with a bias on query, key and value, which the configuration carries (Yang et al., 2024)."""

    def block(self, config: ModelConfig, layer: int) -> Block:
        assert config.qkv_bias, "Qwen2 has biases on query, key and value"
        return Block(config, Attention(config, layer), GatedMLP(config))
