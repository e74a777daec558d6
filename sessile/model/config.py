"""What a checkpoint says about itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessile.errors import StartupError
from sessile.gguf import GgufFile, default_gguf_path
from sessile.modelfile import read_json, shown

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

_SIZES_MAX: Mapping[str, int] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "layers": 1 << 12,
    "heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "context_tokens": 1 << 24,  # float32, in which angles are computed, counts positions exactly up to there
}
"""Field of ModelConfig → the largest value that is believed: ten times what the largest models have, or more."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one decoder, as its checkpoint states it.

    heads: query heads; kv_heads divides them. rope_frequencies: float32[head_dim / 2], radians a position, scaling
    included. sliding_window: tokens a query sees if the model limits them, else None; we serve contexts up to it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_frequencies: tuple[float, ...]
    context_tokens: int
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES_MAX:
            _check_size(name, getattr(self, name))
        if not math.isfinite(self.norm_epsilon) or self.norm_epsilon < 0:
            raise StartupError(f"the model's configuration is damaged: norm_epsilon is {self.norm_epsilon}.")
        if not all(math.isfinite(frequency) and frequency > 0 for frequency in self.rope_frequencies):
            raise StartupError("the model's configuration is damaged: its rotary frequencies are not positive numbers.")
        if self.heads % self.kv_heads or self.head_dim % 2 or len(self.rope_frequencies) != self.head_dim // 2:
            raise StartupError(
                f"the model's configuration is damaged: {self.heads} query heads, {self.kv_heads} KV heads and "
                f"head dimension {self.head_dim} do not fit together."
            )

    def serving_context_tokens(self, asked: int | None) -> int:
        """Longest sequence to serve: what was asked for, or what the model allows. Refuses more than that."""
        allowed = self.context_tokens
        reason = "its positions end there"
        if self.sliding_window is not None and self.sliding_window < allowed:
            allowed = self.sliding_window
            reason = "beyond it the model needs sliding-window attention, which is not supported"
        if asked is not None and asked > allowed:
            raise StartupError(
                f"--context-tokens {asked} is more than this model's {allowed}: {reason}. Ask for at most {allowed}."
            )
        return asked or allowed


def resolve_model_path(model: str) -> Path:
    """The folder or .gguf file that `--model` names. Raises StartupError if there is none."""
    path = default_gguf_path() if model == "default" else Path(model).expanduser()
    if not path.exists():
        raise StartupError(
            f"--model {model}: no such file or folder. Give a folder with config.json and *.safetensors, a .gguf file, "
            "or `default`."
        )
    if path.is_file() and path.suffix != ".gguf":
        raise StartupError(f"--model {model}: a file must be a .gguf; give the folder for safetensors.")
    return path


def config_from_folder(folder: Path) -> ModelConfig:
    """Read config.json of a folder in the Hugging Face layout. Raises StartupError for what we cannot serve."""
    path = folder / "config.json"
    raw = read_json(path)
    try:
        return _config_from_json(raw, path)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise StartupError(f"{path} is incomplete or damaged ({shown(error)}). Download it again.") from error


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read the metadata of a GGUF file. Raises StartupError for what we cannot serve."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise _unsupported(architecture, file.path)
    try:
        return _config_from_metadata(architecture, file)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise StartupError(f"{file.path} lacks metadata or is damaged ({shown(error)}). Download it again.") from error


def _check_size(name: str, size: int) -> None:
    if not 1 <= size <= _SIZES_MAX[name]:
        raise StartupError(f"the model's configuration is damaged: {name} is {size}, not 1 to {_SIZES_MAX[name]}.")


def _unsupported(architecture: object, path: Path) -> StartupError:
    return StartupError(
        f"{path}: the architecture {shown(architecture)} is not supported; supported are {', '.join(ARCHITECTURES)}."
    )


def _config_from_json(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    architecture = raw.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise _unsupported(architecture, path)
    if raw.get("hidden_act", "silu") != "silu":
        raise StartupError(f"{path}: hidden_act {shown(raw['hidden_act'])} is not supported, only 'silu'.")
    if raw.get("quantization_config"):
        raise StartupError(f"{path}: quantised checkpoints are not supported; give plain weights and use --quantize.")
    heads = int(raw["num_attention_heads"])
    hidden_size = int(raw["hidden_size"])
    head_dim = int(raw.get("head_dim") or hidden_size // heads)
    bias = bool(raw.get("attention_bias", False))
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {})}
    rope.update(raw.get("rope_parameters") or {})
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        norm_epsilon=float(raw["rms_norm_eps"]),
        rope_frequencies=_rope_frequencies(head_dim, rope, path),
        context_tokens=int(raw["max_position_embeddings"]),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or architecture == "qwen2",
        output_bias=bias and architecture != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        sliding_window=_sliding_window(raw, architecture),
    )


def _sliding_window(raw: Mapping[str, Any], architecture: str) -> int | None:
    window = raw.get("sliding_window")
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        return _window(window) if "sliding_attention" in layer_types else None
    if architecture in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return None
    return _window(window)


def _window(tokens: Any) -> int | None:
    """A sliding window as a checkpoint states it, 0 for none. Raises ValueError for a negative one."""
    if tokens is None:
        return None
    if int(tokens) < 0:
        raise ValueError(f"a sliding window of {int(tokens)} tokens")
    return int(tokens) or None


def _rope_frequencies(head_dim: int, rope: Mapping[str, Any], path: Path) -> tuple[float, ...]:
    """Radians a position for each pair of dimensions; see `_llama3_scaled` for the one scaling that is not a factor."""
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise StartupError(f"{path}: partial rotary embeddings are not supported.")
    _check_size("head_dim", head_dim)
    theta = np.float32(float(rope["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    # float32 throughout, as the models were trained: at position 100,000 the last bits matter. What overflows is no
    # warning but a frequency that ModelConfig refuses.
    with np.errstate(all="ignore"):
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (np.float32(1.0) / theta**exponents).astype(np.float32)
        if isinstance(kind, str) and kind == "linear":
            frequencies /= np.float32(float(rope["factor"]))
        elif isinstance(kind, str) and kind == "llama3":
            frequencies = _llama3_scaled(frequencies, rope)
        elif kind is not None and not (isinstance(kind, str) and kind == "default"):
            raise StartupError(
                f"{path}: rope scaling {shown(kind)} is not supported; supported are 'linear' and 'llama3'."
            )
    return tuple(frequencies.tolist())


def _llama3_scaled(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: wavelengths beyond the old context are divided by factor, short ones kept, a ramp in between."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old_context = float(rope["original_max_position_embeddings"])
    wavelengths = np.float32(2 * math.pi) / frequencies
    ramp = ((np.float32(old_context) / wavelengths - low) / (high - low)).astype(np.float32)
    between = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = np.where(wavelengths > old_context / low, frequencies / factor, frequencies)
    middle = (wavelengths >= old_context / high) & (wavelengths <= old_context / low)
    return np.where(middle, between, scaled).astype(np.float32)


def _config_from_metadata(architecture: str, file: GgufFile) -> ModelConfig:
    metadata, tensors = file.metadata, file.tensors

    def value(name: str) -> Any:
        return metadata[f"{architecture}.{name}"]

    heads = int(value("attention.head_count"))
    hidden_size = int(value("embedding_length"))
    head_dim = int(metadata.get(f"{architecture}.attention.key_length") or hidden_size // heads)
    rope: dict[str, Any] = {"rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0)}
    rope["rope_type"] = metadata.get(f"{architecture}.rope.scaling.type", "default")
    if isinstance(rope["rope_type"], str) and rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    rope["factor"] = metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    frequencies = np.array(_rope_frequencies(head_dim, rope, file.path), np.float32)
    if "rope_freqs.weight" in tensors:  # Llama 3.1 scaling, written as divisors by the converter.
        with np.errstate(all="ignore"):
            frequencies = frequencies / tensors["rope_freqs.weight"].raw.view("<f4")
    return ModelConfig(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=int(value("feed_forward_length")),
        layers=int(value("block_count")),
        heads=heads,
        kv_heads=int(metadata.get(f"{architecture}.attention.head_count_kv") or heads),
        head_dim=head_dim,
        norm_epsilon=float(value("attention.layer_norm_rms_epsilon")),
        rope_frequencies=tuple(frequencies.tolist()),
        context_tokens=int(value("context_length")),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        sliding_window=_window(metadata.get(f"{architecture}.attention.sliding_window")),
    )
