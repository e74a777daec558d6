"""Tiny, randomly initialised models of every family, saved as folders, with what transformers says of them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 211
CONTEXT = 1024
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip

MODELS: dict[str, Any] = {
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    "llama-tied-biases-rope3": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**COMMON, head_dim=24, sliding_window=None, tie_word_embeddings=False)
    ),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=False)),
    "qwen3-tied-biases": lambda: Qwen3ForCausalLM(
        Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True, attention_bias=True)
    ),
}


@dataclass(frozen=True)
class Tiny:
    """A saved model, and the same model in transformers to compare with."""

    folder: Path
    twin: PreTrainedModel

    @torch.inference_mode()
    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        """What transformers generates greedily, end-of-sequence ignored."""
        tokens = torch.tensor([prompt])
        ended = self.twin.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, eos_token_id=None,
        )  # fmt: skip
        return ended[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Raw logits float32[tokens, vocab]."""
        return self.twin(torch.tensor([tokens])).logits[0].float()


def make_tiny(name: str, folder: Path, **save: Any) -> Tiny:
    """Build the named model with random weights, norms and biases included, and save it to the folder."""
    torch.manual_seed(len(name))
    return save_tiny(MODELS[name](), folder, **save)


def save_tiny(model: PreTrainedModel, folder: Path, **save: Any) -> Tiny:
    """Make norms and biases of a fresh model random as well, and save it to the folder."""
    twin = model.float().eval()
    with torch.no_grad():
        for parameter_name, parameter in twin.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
    twin.save_pretrained(folder, **save)
    return Tiny(folder, twin)


@cache
def prompts() -> list[list[int]]:
    """Prompts around the edges of pages and chunks, and one of several chunks."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (1, 6, 16, 65, 257, 530)]
