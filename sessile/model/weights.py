"""Read a model: find its folder or file, build the family's module, fill it from safetensors, GGUF or a seed."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sessile.errors import StartupError
from sessile.gguf import GgufFile, GgufTensor
from sessile.kernels.packing import Groups
from sessile.model.config import ModelConfig, config_from_folder, config_from_gguf, resolve_model_path
from sessile.model.dequantize import dequantize, dequantized_rows, stored_groups
from sessile.model.layers import EMBEDDING, Checkpoint, Decoder, WeightFormat
from sessile.model.llama import Llama
from sessile.model.mistral import Mistral
from sessile.model.options import ModelOptions
from sessile.model.qwen2 import Qwen2
from sessile.model.qwen3 import Qwen3
from sessile.modelfile import read_json, shown

FAMILIES: dict[str, type[Decoder]] = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}

_ONE_THREAD_WEIGHTS = 500_000_000
"""A model of fewer is loaded by one thread, within a second or so. Several share each of thousands of small steps and
wait for each other at its end: where another program has one of the cores that takes ten times as long."""
_DUMMY_DEVIATION = 0.02
_FILE_NAME_BYTES_MAX = 255


@dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run, where it came from, and the bytes that its weights hold."""

    decoder: Decoder
    path: Path
    weight_bytes: int


def read_config(path: Path) -> ModelConfig:
    """Configuration of the model folder or .gguf file at path."""
    return config_from_gguf(GgufFile(path)) if path.is_file() else config_from_folder(path)


def load_model(options: ModelOptions, form: WeightFormat, progress: Callable[[str, float], None]) -> LoadedModel:
    """Build and fill the model that the options name. progress gets a stage and 0 … 1. Raises StartupError."""
    path = resolve_model_path(options.model)
    checkpoint: Checkpoint
    if path.is_file():
        file = GgufFile(path)
        config = config_from_gguf(file)
        checkpoint = GgufCheckpoint(file, config)
    else:
        config = config_from_folder(path)
        checkpoint = DummyCheckpoint(form.device) if options.load_format == "dummy" else SafetensorsCheckpoint(path)
    if options.load_format == "dummy":
        checkpoint = DummyCheckpoint(form.device)
    decoder = FAMILIES[config.architecture](config).eval()
    with _threads_for(config):
        held = decoder.load(checkpoint, form, lambda done: progress("loading weights", done))
    return LoadedModel(decoder, path, held)


@contextlib.contextmanager
def _threads_for(config: ModelConfig) -> Iterator[None]:
    """One thread of torch's for the loading of a small model, all for that of a large one."""
    threads = torch.get_num_threads()
    if weight_bytes_estimate(config, 1.0) < _ONE_THREAD_WEIGHTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def weight_bytes_estimate(config: ModelConfig, element_bytes: float, embedding_bytes: float | None = None) -> int:
    """About how many bytes the weights will take with so many bytes a weight.

    embedding_bytes: so many a weight of the embedding, which then is no part of a tied head, but beside it.
    """
    heads = config.heads + 2 * config.kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    matrix, layers = config.vocab_size * config.hidden_size, config.layers * (attention + mlp)
    if embedding_bytes is not None:
        return int((layers + matrix) * element_bytes + matrix * embedding_bytes)
    return int((layers + matrix * (1 if config.tied_embeddings else 2)) * element_bytes)


class SafetensorsCheckpoint:
    """A folder with model.safetensors, or with several files and model.safetensors.index.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._places = self._index()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        place = self._places.get(name)
        if place is None:
            raise StartupError(f"{self._folder} lacks the tensor {name!r}. Download it again.")
        try:
            tensor: Tensor = self._open(place).get_tensor(name)
        except SafetensorError as error:
            raise _corrupt(self._folder / place, error) from error
        _check_shape(name, tuple(tensor.shape), shape, self._folder)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise StartupError(f"{self._folder}: tensor {name!r} is {tensor.dtype}; only float weights are supported.")
        return tensor

    def read_embedding(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.read(EMBEDDING, shape).to(dtype)

    def groups(self, name: str, shape: tuple[int, ...]) -> None:
        """None: such files hold plain weights."""

    def _index(self) -> dict[str, str]:
        """Which file holds which tensor."""
        index = self._folder / "model.safetensors.index.json"
        if not index.exists():
            single = "model.safetensors"
            return dict.fromkeys(self._open(single).keys(), single)
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(_is_file_name(place) for place in places.values()):
            raise _corrupt(index, "weight_map does not map names to files of its folder")
        return places

    def _open(self, place: str) -> Any:
        if place not in self._files:
            path = self._folder / place
            try:
                self._files[place] = safe_open(str(path), framework="pt")
            except FileNotFoundError as error:
                raise StartupError(f"{path} does not exist. Is {self._folder} a complete model folder?") from error
            except (SafetensorError, OSError) as error:
                raise _corrupt(path, error) from error
        return self._files[place]


class GgufCheckpoint:
    """A GGUF file, read under Hugging Face names; weights are unpacked to float32 one tensor at a time."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return _as_tensor(self._in_our_order(name, dequantize(self._find(name, shape))))

    def read_embedding(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Some rows at a time: to take memory for float32 of them all costs more time than the arithmetic."""
        embedding, first = torch.empty(shape, dtype=dtype), 0
        for part in dequantized_rows(self._find(EMBEDDING, shape)):
            embedding[first : first + len(part)] = _as_tensor(part)
            first += len(part)
        return embedding

    def groups(self, name: str, shape: tuple[int, ...]) -> Groups | None:
        stored = stored_groups(self._find(name, shape))
        if stored is None:
            return None
        kind, *parts = stored
        numbers, scales, minima = (
            None if part is None else torch.from_numpy(self._in_our_order(name, part)) for part in parts
        )
        return Groups(kind, numbers, scales, minima)

    def _find(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        place = _gguf_name(name)
        tensor = self._file.tensors.get(place)
        if tensor is None:
            raise StartupError(f"{self._file.path} lacks the tensor {place!r}. Download it again.")
        _check_shape(place, tensor.shape, shape, self._file.path)
        return tensor

    def _in_our_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a tensor as our rotation expects them.

        llama.cpp rotates neighbouring dimensions where we pair the halves; its converter reorders the rows of the
        llama architecture so (`LlamaModel.permute` in convert_hf_to_gguf.py). The others keep the order.
        """
        if self._config.architecture == "llama" and ".q_proj." in name:
            return _pair_halves(rows, self._config.heads)
        if self._config.architecture == "llama" and ".k_proj." in name:
            return _pair_halves(rows, self._config.kv_heads)
        return rows


class DummyCheckpoint:
    """Seeded random weights of any shape, made on the device: norms are one, the rest normal, of small deviation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read_embedding(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.read(EMBEDDING, shape).to(dtype)

    def groups(self, name: str, shape: tuple[int, ...]) -> None:
        """None: the weights are plain."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        # The seed hangs on the name alone, so that a layer's weights do not depend on the order of reading.
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        weights = torch.empty(math.prod(shape), device=self._device)
        return weights.normal_(0, _DUMMY_DEVIATION, generator=generator).reshape(shape)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor: model.layers.3.mlp.up_proj.weight → blk.3.ffn_up.weight."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def _as_tensor(weights: np.ndarray) -> Tensor:
    """The array's memory as a tensor. A view of the mapping is read-only, which torch cannot express: it is copied."""
    return torch.from_numpy(weights if weights.flags.writeable else weights.copy())


def _pair_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of each head: (pair, half) → (half, pair)."""
    return np.ascontiguousarray(
        weights.reshape(heads, -1, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def _is_file_name(place: object) -> bool:
    """Whether an index names a file beside it: what leads out of the model's folder is not read."""
    if not isinstance(place, str) or not place.isprintable() or not 0 < len(place.encode()) <= _FILE_NAME_BYTES_MAX:
        return False
    return Path(place).name == place and place != ".."


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: Path) -> None:
    if found != expected:
        raise StartupError(
            f"{path}: tensor {name!r} has shape {list(found)} but its configuration says {list(expected)}. "
            "Configuration and weights do not belong together."
        )


def _corrupt(path: Path, cause: object) -> StartupError:
    return StartupError(f"{path} is corrupt or truncated ({shown(str(cause))}). Download it again.")
