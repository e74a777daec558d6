"""`sessile bench quality`: how far a way to compute is from float32, on text that the model did not write.

The text is what the documentation strings of Python's standard library say. Every way reads the same windows; at each
place its distribution of the next token is compared with that of plain float32 weights: mean of the Kullback-Leibler
divergence, and how often both take the same token for the likeliest. The gate for a default is MEAN_KL_MAX and
TOP_1_MIN.
"""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sessile.device.config import DeviceOptions
from sessile.device.factory import choose_format, choose_kv_dtype, choose_native
from sessile.device.kv_pool import KvPool
from sessile.device.memory import available_cores
from sessile.device.worker import CpuModel
from sessile.errors import StartupError
from sessile.kernels.attention import StepRows
from sessile.model.config import ModelConfig, resolve_model_path
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model, read_config
from sessile.options import option
from sessile.text.load import load_tokenizer
from sessile.units import ceil_div

MEAN_KL_MAX, TOP_1_MIN = 0.01, 0.97
PAGE_SIZE = 16
SCORED_TOKENS = 128
"""Places whose distributions are compared at once: each is a row of the vocabulary, twice."""
PROSE_CHARACTERS_MIN = 300
"""Shorter documentation strings say little that could be foreseen."""


@dataclass(frozen=True)
class QualityBenchOptions:
    """What to compare."""

    model: str = option("default", "The model: a folder, a .gguf file, or `default`.")
    ways: str = option(
        "bfloat16:auto,bfloat16:auto:none:model,bfloat16:auto:int8,bfloat16:none,bfloat16:int8,bfloat16:int4",
        "What is compared with float32:none, as DTYPE:QUANTIZE[:QUANTIZE_ACTIVATIONS[:KV_DTYPE]], with commas between.",
    )
    cpu_kernels: str = option("auto", "As of `sessile serve`.", choices=("auto", "native", "numba"))
    tokens: int = option(20_000, "Of text, in all.", unit="tokens", low=100)
    window: int = option(1024, "Tokens that are read without what was before them.", unit="tokens", low=16, high=4096)
    step_tokens: int = option(
        512, "Tokens of a step: few take other kernels than many, so 8 measures what decoding is like.", unit="tokens",
        low=1, high=4096,
    )  # fmt: skip


@dataclass
class Distance:
    """How far one way is from the other, summed over places."""

    places: int = 0
    divergence: float = 0.0
    same_tops: int = 0

    def add(self, exact: torch.Tensor, other: torch.Tensor) -> None:
        """Compare logits float32[m, vocab]."""
        exact, other = exact.log_softmax(dim=-1), other.log_softmax(dim=-1)
        self.places += exact.shape[0]
        self.divergence += float((exact.exp() * (exact - other)).sum())
        self.same_tops += int((exact.argmax(dim=-1) == other.argmax(dim=-1)).sum())

    @property
    def mean_kl(self) -> float:
        return self.divergence / self.places

    @property
    def top_1(self) -> float:
        return self.same_tops / self.places

    @property
    def passes(self) -> bool:
        """Whether this may be a default."""
        return self.mean_kl <= MEAN_KL_MAX and self.top_1 >= TOP_1_MIN


class Reader:
    """A model that reads windows of text in one way, a step at a time."""

    def __init__(
        self, options: QualityBenchOptions, config: ModelConfig, dtype: str, quantize: str, activations: str = "none",
        kv_dtype: str = "auto",
    ) -> None:  # fmt: skip
        native = choose_native(options.cpu_kernels, config)
        model = ModelOptions(options.model, dtype=dtype, quantize=quantize, quantize_activations=activations)
        self.form = choose_format(model, native)
        self.kv_dtype = choose_kv_dtype(DeviceOptions(kv_dtype=kv_dtype), self.form)
        loaded = load_model(ModelOptions(options.model), self.form, lambda stage, share: None)
        pages = ceil_div(options.window, PAGE_SIZE)
        pool = KvPool(config, pages + 1, PAGE_SIZE, self.kv_dtype, self.form.device)
        table = torch.arange(1, pages + 1, dtype=torch.int32)[None]
        self._model = CpuModel(loaded.decoder, pool.cache(table))
        self.decoder = loaded.decoder
        self._step_tokens = options.step_tokens

    def read(self, window: torch.Tensor) -> torch.Tensor:
        """Residual streams [t, hidden] of a window int64[t]."""
        parts = []
        for positions in torch.arange(window.numel()).split(self._step_tokens):
            rows = StepRows(*(np.array([number], np.int32) for number in (0, int(positions[0]), positions.numel())))
            slots = positions + PAGE_SIZE
            parts.append(self._model.forward(window[positions], positions, slots, rows, is_read=True).clone())
        return torch.cat(parts)


def measure_quality(options: QualityBenchOptions) -> int:
    """Compare, print a table; the exit status: 1 if a way does not pass. Raises StartupError."""
    torch.set_num_threads(available_cores())
    config = read_config(resolve_model_path(options.model))
    windows = read_windows(options, load_tokenizer(options.model))
    exact = Reader(options, config, "float32", "none")
    table = Table("way", "mean KL", "same top token", "passes", box=None, title=f"{options.tokens:,} tokens of prose")
    failed = False
    for way in options.ways.split(","):
        reader = Reader(options, config, *parts_of(way))
        with torch.inference_mode():
            distance = compare(exact, reader, windows)
        failed |= not distance.passes
        name = f"{way.partition(':')[0]}, {reader.form.quantize}, KV in {str(reader.kv_dtype).removeprefix('torch.')}"
        name += ", inputs in int8" if reader.form.int8_inputs else ""
        table.add_row(name, f"{distance.mean_kl:.5f}", f"{distance.top_1:.2%}", "yes" if distance.passes else "no")
    Console().print(table)
    return int(failed)


def parts_of(way: str) -> Sequence[str]:
    """DTYPE, QUANTIZE, QUANTIZE_ACTIVATIONS and KV_DTYPE of a way. Raises StartupError."""
    given = way.split(":")
    parts = given + ["", "", "none", "auto"][len(given) :]
    allowed = ("float32", "bfloat16"), ("auto", "none", "int8", "int4"), ("none", "int8"), ("auto", "model", "int8")
    if len(parts) > len(allowed) or any(part not in some for part, some in zip(parts, allowed, strict=True)):
        raise StartupError(f"--ways: {way!r} is no DTYPE:QUANTIZE such as bfloat16:auto, with what may follow.")
    return parts


def compare(exact: Reader, other: Reader, windows: Sequence[torch.Tensor]) -> Distance:
    """How far the other is from the exact one, over all windows."""
    distance = Distance()
    for window in windows:
        parts = zip(exact.read(window).split(SCORED_TOKENS), other.read(window).split(SCORED_TOKENS), strict=True)
        for one, two in parts:
            distance.add(exact.decoder.logits(one), other.decoder.logits(two))
    return distance


def read_windows(options: QualityBenchOptions, tokenizer: Any) -> Sequence[torch.Tensor]:
    """Prose as int64[window] each, tokens in all."""
    ids: list[int] = []
    for text in prose():
        ids += tokenizer.encode(text + "\n\n")
        if len(ids) >= options.tokens:
            break
    return [part for part in torch.tensor(ids[: options.tokens]).split(options.window) if part.numel() > 1]


def prose() -> Iterator[str]:
    """Documentation strings of the standard library, in the order of its files."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library are tests of just that
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= PROSE_CHARACTERS_MIN and ">>>" not in text:
                    yield text
