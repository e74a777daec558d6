"""Whole models of a few kilobytes, with weights, tokenizer and chat template: as a GGUF file and as a hub folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.unit.gguf_writer import write_gguf
from tests.unit.tiny_folder import EOS_ID, write_tiny_model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
SIZES = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu",
    "sliding_window": None, "eos_token_id": EOS_ID,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (260, 8), "model.norm.weight": (8,), "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,), "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8), "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8), "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8), "model.layers.0.mlp.down_proj.weight": (8, 12),
}  # fmt: skip
IN_GGUF = {
    "token_embd": (24, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (12, 8),
    "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
}  # fmt: skip


def write_tiny_folder(folder: Path) -> Path:
    """A hub folder that can be served; its tokens are bytes. Returns it."""
    write_tiny_model(folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS_ID]}))
    settings = {"eos_token": {"content": "<end>"}, "chat_template": [{"name": "default", "template": TEMPLATE}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, folder / "model.safetensors")
    places = dict.fromkeys(SHAPES, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def gguf_metadata(kind: str) -> dict[str, Any]:
    """Metadata of a model with 24 tokens. kind: of its tokenizer, "gpt2" or "llama"."""
    letters = [chr(ord("a") + index) for index in range(16)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "cd", "▁" if kind == "llama" else "Ġ", "<0x0A>", "abcd"]
    return {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 19, 6, 1],
        "tokenizer.ggml.scores": [-float(index) for index in range(24)],
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_tiny_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with these metadata and the weights of that model. Returns its path."""
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(size=shape).astype("<f4") for name, shape in IN_GGUF.items()}
    tensors = {f"{name}.weight": (array.shape, "F32", array.tobytes()) for name, array in weights.items()}
    return write_gguf(path, metadata, tensors)
