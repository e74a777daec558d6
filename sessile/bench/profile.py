"""`sessile bench profile`: where a step on the CPU goes, at batches of 1, 8 and 32 and in prompts, by the C++ kernels.

The layers run on a pool of their own, without engine and sampler. Of several steps the fastest is told, and the mean of
each phase.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sessile.device.config import DeviceOptions
from sessile.device.factory import choose_format, choose_kv_dtype, choose_native
from sessile.device.kv_pool import KvPool
from sessile.device.memory import available_cores
from sessile.kernels.attention import StepRows
from sessile.kernels.native import PHASES
from sessile.model.config import resolve_model_path
from sessile.model.native_cpu import NativeCpuDecoder, native_decoder
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model, read_config
from sessile.options import option
from sessile.units import ceil_div

PAGE_SIZE = 16
DECODING = (1, 8, 32)
CHUNK_TOKENS, CHUNKS = 512, 4
SETTLE_STEPS = 2
"""Run before anything is timed."""


@dataclass(frozen=True)
class ProfileBenchOptions:
    """What to measure."""

    model: str = option("default", "The model: a folder, a .gguf file, or `default`.")
    dtype: str = option("auto", "As of `sessile serve`.", choices=("auto", "float32", "bfloat16"))
    quantize: str = option("auto", "As of `sessile serve`.", choices=("auto", "none", "int8", "int4"))
    quantize_activations: str = option("none", "As of `sessile serve`.", choices=("none", "int8"))
    kv_dtype: str = option("auto", "As of `sessile serve`.", choices=("auto", "model", "int8"))
    history: int = option(200, "Tokens before the one that is decoded.", unit="tokens", low=0, high=8000)
    steps: int = option(10, "Steps of each kind.", unit="steps", low=1)


class Steps:
    """A model and a pool in which every row has pages of its own."""

    def __init__(self, options: ProfileBenchOptions) -> None:
        torch.set_num_threads(available_cores())
        config = read_config(resolve_model_path(options.model))
        model = ModelOptions(
            options.model, dtype=options.dtype, quantize=options.quantize,
            quantize_activations=options.quantize_activations,
        )  # fmt: skip
        self.form = choose_format(model, choose_native("native", config))
        self.decoder = load_model(model, self.form, lambda stage, share: None).decoder
        self.kv_dtype = choose_kv_dtype(DeviceOptions(kv_dtype=options.kv_dtype), self.form)
        row_pages = ceil_div(max(CHUNK_TOKENS * CHUNKS, options.history + 1), PAGE_SIZE)
        rows = DECODING[-1]
        pool = KvPool(config, row_pages * rows + 1, PAGE_SIZE, self.kv_dtype, self.form.device)
        pool.keys.fill_(0)
        pool.values.fill_(0)
        self._table = torch.arange(1, row_pages * rows + 1, dtype=torch.int32).reshape(rows, row_pages)
        native = native_decoder(self.decoder, pool.cache(self._table))
        assert native is not None, "the kernels were demanded"
        self.native: NativeCpuDecoder = native

    def run(self, start: int, counts: Sequence[int]) -> tuple[float, float]:
        """Milliseconds of the layers and of the head, for rows of so many tokens each that begin at `start`."""
        batch = np.arange(len(counts), dtype=np.int32)
        rows = StepRows(batch, np.full(len(counts), start, np.int32), np.array(counts, np.int32))
        positions = torch.cat([torch.arange(start, start + count) for count in counts])
        places = torch.from_numpy(np.repeat(batch, counts).astype(np.int64))
        slots = self._table[places, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        begun_s = time.perf_counter()
        hidden = self.native.forward(torch.zeros_like(positions), positions, slots, rows)
        layers_s = time.perf_counter() - begun_s
        self.decoder.logits(hidden[torch.from_numpy(np.cumsum(counts) - 1)])
        return layers_s * 1e3, (time.perf_counter() - begun_s - layers_s) * 1e3


def measure_profile(options: ProfileBenchOptions) -> int:
    """Run steps of each kind, print a table; the exit status. Raises StartupError."""
    steps = Steps(options)
    inputs = ", inputs in int8" if steps.form.int8_inputs else ""
    title = f"{steps.form.dtype}, {steps.form.quantize}, KV in {steps.kv_dtype}{inputs}"
    table = Table("ms", "layers", "head", *PHASES, box=None, title=title)
    kinds = [(f"batch {batch}", options.history, [1] * batch) for batch in DECODING]
    kinds += [(f"{CHUNK_TOKENS} after {start}", start, [CHUNK_TOKENS])
              for start in range(0, CHUNK_TOKENS * CHUNKS, CHUNK_TOKENS)]  # fmt: skip
    steps.native.is_timed = True
    with torch.inference_mode():
        for name, start, counts in kinds:
            for _ in range(SETTLE_STEPS):
                steps.run(start, counts)
            steps.native.nanoseconds[:] = 0
            times = [steps.run(start, counts) for _ in range(options.steps)]
            layers_ms, head_ms = min(times, key=sum)
            phases_ms = steps.native.nanoseconds / options.steps / 1e6
            table.add_row(name, f"{layers_ms:.2f}", f"{head_ms:.2f}", *(f"{phase:.2f}" for phase in phases_ms))
    Console().print(table)
    return 0
