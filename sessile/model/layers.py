"""The parts that decoders are built from. t is the number of tokens of a step; all rows of the batch lie end to end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sessile.kernels.attention import AttentionStep
from sessile.kernels.linear import LinearWeight, PackedWeight, pack_linear
from sessile.kernels.native import NativeKernels
from sessile.kernels.packing import Groups, stack_groups
from sessile.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
"""Name of the tensor that is also the head where the two are tied."""


class Checkpoint(Protocol):
    """Tensors by their Hugging Face name."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor on the CPU in a float dtype. Raises StartupError if it is missing, damaged or of another shape."""
        ...

    def read_embedding(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The tensor EMBEDDING, rounded to dtype. Raises as `read` does."""
        ...

    def groups(self, name: str, shape: tuple[int, ...]) -> Groups | None:
        """A weight as it is stored, None if that is not in groups that the kernels know. Raises as `read` does."""
        ...


@dataclass(frozen=True)
class StepInputs:
    """All that one forward pass reads beside the weights.

    tokens int64[t]; positions int64[t]; attention: writes this step's K and V to the pool and attends through the
    page table.
    """

    tokens: Tensor
    positions: Tensor
    attention: AttentionStep


@dataclass(frozen=True)
class WeightFormat:
    """How weights are kept: dtype of everything that is not quantised, device, and how linear layers are quantised.

    quantize: "none", "int8", "int4", "fp8" (on a GPU) or "stored" (on the CPU). native: the C++ kernels that
    weights are packed for, if any. "stored" keeps the checkpoint's own numbers and scales, where it has such; it needs
    native kernels. int8_inputs: whether quantised weights, but not the head's, are multiplied with inputs in int8 where
    the kernels can.
    """

    dtype: torch.dtype
    device: torch.device
    quantize: str = "none"
    native: NativeKernels | None = None
    int8_inputs: bool = False


class Linear(nn.Module):
    """x [t, in] → [t, sum(outs)]: one or several of the checkpoint's projections, fused by stacking their rows."""

    def __init__(self, parts: Sequence[str], in_size: int, out_sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.in_size = in_size
        self.out_sizes = tuple(out_sizes)
        self.has_bias = bias
        self.weight: LinearWeight
        self.bias: Tensor | None = None

    def load(self, checkpoint: Checkpoint, prefix: str, form: WeightFormat) -> int:
        """Fill from the tensors `prefix` + part; return the bytes held."""
        shapes = list(zip(self.parts, self.out_sizes, strict=True))
        names = [(f"{prefix}{part}.weight", (size, self.in_size)) for part, size in shapes]
        self.weight = load_linear(checkpoint, names, form)
        held = self.weight.bytes
        if self.has_bias:
            biases = [checkpoint.read(f"{prefix}{part}.bias", (size,)) for part, size in shapes]
            self.bias = _stack(biases).to(form.device, form.dtype)
            held += self.bias.numel() * self.bias.element_size()
        return held

    def forward(self, x: Tensor) -> Tensor:
        return self.weight(x, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, name: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.name = name
        self.shape = (size,)
        self.epsilon = epsilon
        self.weight: Tensor

    def load(self, checkpoint: Checkpoint, prefix: str, form: WeightFormat) -> int:
        """Fill from the tensor `prefix` + name; return the bytes held."""
        self.weight = checkpoint.read(f"{prefix}{self.name}.weight", self.shape).to(form.device, form.dtype)
        return self.weight.numel() * self.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.shape, self.weight, self.epsilon)


class Rope(nn.Module):
    """Rotary position embedding (Su et al., 2021), pairing dimension i with i + head_dim / 2."""

    def __init__(self, frequencies: Sequence[float]) -> None:
        super().__init__()
        self.frequencies = torch.tensor(frequencies, dtype=torch.float32)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions int64[t], each [t, 1, head_dim / 2]; computed in float32, once a step."""
        angles = positions[:, None, None].float() * self.frequencies.to(positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [t, heads, head_dim] by the angles of its positions."""
    cosine, sine = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV pool, with an optional norm on each head's query and key."""

    def __init__(self, config: ModelConfig, layer: int, *, head_norm: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(
            ("q_proj", "k_proj", "v_proj"), config.hidden_size, (q_size, kv_size, kv_size), config.qkv_bias
        )
        self.o_proj = Linear(("o_proj",), q_size, (config.hidden_size,), config.output_bias)
        self.head_norm = head_norm
        if head_norm:
            self.q_norm = RMSNorm("q_norm", self.head_dim, config.norm_epsilon)
            self.k_norm = RMSNorm("k_norm", self.head_dim, config.norm_epsilon)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: AttentionStep) -> Tensor:
        """x [t, hidden] → [t, hidden]; writes this layer's K and V of all t tokens."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.head_norm:
            query, key = query_key.split((self.heads, self.kv_heads), dim=1)
            query_key = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        query, key = rotate(query_key, angles).split((self.heads, self.kv_heads), dim=1)
        return self.o_proj(attention.run(self.layer, query, key, value).flatten(1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(("gate_proj", "up_proj"), hidden, (inner, inner), bias)
        self.down_proj = Linear(("down_proj",), inner, (hidden,), bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: Attention, mlp: GatedMLP) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm("input_layernorm", config.hidden_size, config.norm_epsilon)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm("post_attention_layernorm", config.hidden_size, config.norm_epsilon)
        self.mlp = mlp

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: AttentionStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module, ABC):
    """Embedding, blocks, final norm and head. A family says in `block` what its layers are made of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config.rope_frequencies)
        self.layers = nn.ModuleList([self.block(config, layer) for layer in range(config.layers)])
        self.norm = RMSNorm("norm", config.hidden_size, config.norm_epsilon)
        self.head = Linear(("embed_tokens" if config.tied_embeddings else "lm_head",), config.hidden_size,
                           (config.vocab_size,))  # fmt: skip
        self.embedding: Tensor

    @abstractmethod
    def block(self, config: ModelConfig, layer: int) -> Block:
        """One layer of this family."""

    def load(self, checkpoint: Checkpoint, form: WeightFormat, progress: Callable[[float], None]) -> int:
        """Fill every weight from a checkpoint, in file order; return the bytes held. progress gets 0 … 1."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = checkpoint.read_embedding(shape, form.dtype).to(form.device)
        held = self._load_head(checkpoint, form)
        for index, layer in enumerate(self.layers):
            progress(index / len(self.layers))
            prefix = f"model.layers.{index}."
            for name, part in layer.named_modules():
                if isinstance(part, (Linear, RMSNorm)):
                    held += part.load(checkpoint, prefix + name[: name.rfind(".") + 1], form)
        held += self.norm.load(checkpoint, "model.", form)
        progress(1.0)
        return held

    def _load_head(self, checkpoint: Checkpoint, form: WeightFormat) -> int:
        """Load the head; a tied one that stays plain is the embedding itself, unless it is packed.

        Its inputs stay in the model's dtype: of all layers it is the one that shows roundings most. For fp8 it is
        int8, which takes the same bytes and rounds less.
        """
        form = replace(form, int8_inputs=False, quantize="int8" if form.quantize == "fp8" else form.quantize)
        embedding_bytes = self.embedding.numel() * self.embedding.element_size()
        if not self.config.tied_embeddings:
            return embedding_bytes + self.head.load(checkpoint, "", form)
        if form.quantize == "stored":
            shape = (self.config.vocab_size, self.config.hidden_size)
            self.head.weight = load_linear(checkpoint, [(EMBEDDING, shape)], form)
        else:
            self.head.weight = pack_linear(self.embedding, form.dtype, form.quantize, form.native)
        is_embedding = form.quantize == "none" and form.native is None
        return embedding_bytes + (0 if is_embedding else self.head.weight.bytes)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Residual stream after the last layer, [t, hidden]; K and V of all t tokens are in the pool then."""
        x = functional.embedding(inputs.tokens, self.embedding)
        angles = self.rope.angles(inputs.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, angles, inputs.attention)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits float32[m, vocab] of residual streams [m, hidden], in the model's dtype or in float32."""
        if isinstance(self.head.weight, PackedWeight):  # which rounds its inputs itself, once
            normed = functional.rms_norm(hidden.float(), self.norm.shape, self.norm.weight.float(), self.norm.epsilon)
            return self.head(normed)
        return self.head(self.norm(hidden.to(self.norm.weight.dtype))).float()


def load_linear(checkpoint: Checkpoint, parts: list[tuple[str, tuple[int, int]]], form: WeightFormat) -> LinearWeight:
    """One linear layer from the names and shapes of the checkpoint's tensors, whose rows are stacked."""
    if form.quantize == "stored" and form.native is not None:
        groups = [checkpoint.groups(name, shape) for name, shape in parts]
        whole = stack_groups([part for part in groups if part is not None])
        if whole is not None and all(part is not None for part in groups):
            return PackedWeight(whole, form.dtype, form.native, form.int8_inputs)
    rows = [checkpoint.read(name, shape) for name, shape in parts]
    return pack_linear(_stack(rows).to(form.device), form.dtype, form.quantize, form.native, form.int8_inputs)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
