"""Open a device: choose formats, load the model, size the pool, compile the kernels."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from sessile.contract.plan import BIND_FLOATS, BIND_INTS, BIND_REPETITION, BIND_TOP_P, SAMPLE, Ints, StepPlan
from sessile.device.config import DeviceOptions
from sessile.device.kv_pool import KvPool, auto_kv_bytes, kv_token_bytes, pool_pages
from sessile.device.memory import available_bytes, available_cores, parse_bytes, readable
from sessile.device.worker import DeviceFacts, StepRunner, Worker
from sessile.errors import MachineLacks, StartupError
from sessile.kernels.attention import SHORT_QUERY_TOKENS, attention_name, prepare_attention
from sessile.kernels.linear import cpu_multiplies_bfloat16
from sessile.kernels.native import NativeKernels, available_native, native_kernels
from sessile.kernels.sampling import prepare_sampling
from sessile.model.config import ModelConfig, resolve_model_path
from sessile.model.layers import WeightFormat
from sessile.model.native_cpu import suits_native
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model, read_config, weight_bytes_estimate
from sessile.units import ceil_div

if TYPE_CHECKING:
    from sessile.device.gpu_device import GpuDevice

Progress = Callable[[str, float], None]
"""Gets a stage ("loading weights") and how far it is, 0 … 1."""

TIMED_TOKENS = (1, 2, 4, 8, 16, 32, 64)
TIMED_ROUNDS = 3
"""Runs of each size, one after the other, of which the fastest counts; fewer if the model is slow."""
TIMED_ROUNDS_MAX = 4
"""Runs of each size while a larger one is the faster: on a busy machine, where the first may have met the others."""
TIMING_S = 0.4
"""When so much time has passed, no sizes beyond those of a single row are begun, and no further round."""
FASTER_SHARE = 0.9
"""A step with more tokens that takes less than this share of the time of one with fewer was not measured well."""
_WEIGHT_BYTES = {"int8": 1.0, "int4": 0.625}


def open_device(
    model_options: ModelOptions,
    device_options: DeviceOptions,
    *,
    page_size: int,
    context_tokens: int | None,
    rows_max: int,
    drafts_max: int = 0,
    progress: Progress,
) -> "Worker | GpuDevice":
    """Load the model and return a device ready to run steps. Raises StartupError with a remedy.

    context_tokens: longest sequence to serve, None for the model's own limit. The caller owns the device and closes it.
    """
    if chosen_kind(device_options) == "cuda":
        return _gpu_opener()(
            model_options, device_options, page_size=page_size, context_tokens=context_tokens, rows_max=rows_max,
            drafts_max=drafts_max, progress=progress, device=torch.device("cuda"),
        )  # fmt: skip
    if device_options.attention != "auto":
        raise StartupError(f"--attention {device_options.attention} is for a GPU; leave it out on a CPU.")
    threads = device_options.threads or available_cores()
    torch.set_num_threads(threads)
    config = read_config(resolve_model_path(model_options.model))
    context = config.serving_context_tokens(context_tokens)
    form = choose_format(model_options, choose_native(device_options.cpu_kernels, config))
    kv_dtype = choose_kv_dtype(device_options, form)
    token_bytes = kv_token_bytes(config, kv_dtype)
    _check_memory(config, form)
    _pool_pages(device_options, token_bytes, page_size, context, rows_max)  # Refused before the weights are read.
    loaded = load_model(model_options, form, progress)
    pages = _pool_pages(device_options, token_bytes, page_size, context, rows_max)
    pool = KvPool(config, pages, page_size, kv_dtype, form.device)
    # A step in flight may write one token beyond the sequence's end, and its drafts.
    row_pages = ceil_div(context + drafts_max + 1, page_size)
    runner = StepRunner(loaded.decoder, pool, rows_max, row_pages)
    progress("compiling kernels", 0.0)
    if form.native is None:
        prepare_attention(form.dtype)
    prepare_sampling()
    warm_up(runner, page_size)
    progress("compiling kernels", 1.0)
    step_ms = time_steps(runner, page_size, rows_max) if drafts_max else ()
    facts = DeviceFacts(
        model_path=str(loaded.path),
        architecture=config.architecture,
        dtype=_name(form.dtype),
        quantize=form.quantize,
        device="cpu",
        attention=attention_name() if form.native is None else f"native ({form.native.level}, KV in {_name(kv_dtype)})",
        threads=threads,
        vocab_size=config.vocab_size,
        context_tokens=context,
        page_size=page_size,
        pages_total=pool.pages,
        rows_max=rows_max,
        kv_bytes=pool.bytes,
        weight_bytes=loaded.weight_bytes,
        step_ms=step_ms,
    )
    return Worker(runner, facts)


def chosen_kind(options: DeviceOptions) -> str:
    """ "cpu" or "cuda": what `--device` means on this machine. Raises StartupError for a GPU that cannot be used."""
    if options.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if options.device == "cuda":
        if torch.version.cuda is None:
            raise StartupError(
                "--device cuda: this torch was built without CUDA. Install a CUDA build of torch, or use --device cpu."
            )
        # As while a machine starts, and its driver is not loaded yet.
        raise MachineLacks("--device cuda: no GPU or no driver was found. Install the driver, or use --device cpu.")
    return "cpu"


def _gpu_opener() -> "Callable[..., GpuDevice]":
    """`open_gpu`, imported late: its kernels need Triton, which CPU-only machines do without."""
    try:
        from sessile.device.gpu_factory import open_gpu
    except ImportError as error:
        raise StartupError(f"a GPU needs Triton ({error}). pip install triton, or use --device cpu.") from error
    return open_gpu


def choose_dtype(dtype: str) -> torch.dtype:
    """The dtype that "auto", "float32" or "bfloat16" means on this machine. Raises StartupError for "float16"."""
    if dtype == "float16":
        raise StartupError("--dtype float16 works on a GPU only; use bfloat16 or float32.")
    if dtype == "auto":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def choose_native(cpu_kernels: str, config: ModelConfig) -> NativeKernels | None:
    """The C++ kernels that `--cpu-kernels` means for this model. Raises StartupError if they are demanded in vain."""
    if cpu_kernels == "numba":
        return None
    build = available_native()
    if cpu_kernels == "native" and not build.usable:
        raise StartupError(f"--cpu-kernels native: {build.found}. {build.remedy}")
    if not suits_native(config):
        if cpu_kernels == "native":
            raise StartupError("--cpu-kernels native: this model's widths are no multiples of 32. Use numba.")
        return None
    return native_kernels() if build.usable else None


def choose_format(options: ModelOptions, native: NativeKernels | None) -> WeightFormat:
    """How weights are kept: for "auto" as the file has them, where the C++ kernels compute with them so.

    Raises StartupError for what only a GPU has, and if inputs in int8 are demanded in vain.
    """
    quantize = options.quantize
    if quantize == "fp8":
        raise StartupError("--quantize fp8 works on a GPU only; use --quantize int8.")
    if quantize == "auto":
        quantize = "none" if native is None else "stored"
    dtype = choose_dtype(options.dtype)
    can_be_int8 = dtype == torch.bfloat16 and native is not None and native.multiplies_int8
    if options.quantize_activations == "int8" and not can_be_int8:
        raise StartupError(
            "--quantize-activations int8: only with --dtype bfloat16, on a processor with AVX-512 VNNI, by the C++ "
            "kernels of `make compile`. Leave it out."
        )
    return WeightFormat(dtype, torch.device("cpu"), quantize, native, options.quantize_activations == "int8")


def choose_kv_dtype(options: DeviceOptions, form: WeightFormat) -> torch.dtype:
    """What K and V are kept in on a CPU. Raises StartupError for int8 without kernels that read it."""
    if options.kv_dtype == "int8" and form.native is None:
        raise StartupError(
            "--kv-dtype int8: only the C++ kernels read it, which do not serve here. Build them by `make compile` and "
            "leave --cpu-kernels at auto, or leave it out."
        )
    is_int8 = form.native is not None and form.dtype == torch.bfloat16 and not form.int8_inputs
    return torch.int8 if options.kv_dtype == "int8" or (options.kv_dtype == "auto" and is_int8) else form.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def warm_up(runner: StepRunner, page_size: int) -> None:
    """Run a prompt and a decode step on row 0, so that kernels are compiled (or read from their cache) before use."""
    tokens = SHORT_QUERY_TOKENS + 1
    ints, floats = np.zeros((1, BIND_INTS), np.int32), np.zeros((1, BIND_FLOATS), np.float32)
    floats[:, (BIND_TOP_P, BIND_REPETITION)] = 1.0
    pages = min(ceil_div(tokens + 1, page_size), runner.pages_total - 1)
    tokens = min(tokens, pages * page_size - 1)
    one, none = np.ones(1, np.int32), np.zeros(1, np.int32)
    common = {"rows": none, "draft_counts": none, "flags": one * SAMPLE, "output_indices": none, "logprob_tops": -one}
    prompt = StepPlan.empty(
        0, bind_rows=none, bind_ints=ints, bind_floats=floats, bias_counts=none, ban_counts=none, prompt_counts=none,
        output_counts=none, table_rows=none, table_starts=none, table_counts=one * pages,
        table_pages=np.arange(1, pages + 1, dtype=np.int32), starts=none, query_counts=one * tokens,
        tokens=np.zeros(tokens, np.int32), **common,
    )  # fmt: skip
    runner.run(prompt)
    runner.run(StepPlan.empty(0, starts=one * tokens, query_counts=one, tokens=none, **common))


def time_steps(runner: StepRunner, page_size: int, rows_max: int) -> tuple[tuple[int, float], ...]:
    """(tokens, milliseconds) of steps of 1, 2, 4 … tokens, all but one a row being drafts: what verifying costs.

    All rows share the same pages, which is nobody's KV yet.
    """
    pages = min(ceil_div(2 * SHORT_QUERY_TOKENS, page_size), runner.pages_total - 1)
    rows = np.arange(min(rows_max, TIMED_TOKENS[-1] // SHORT_QUERY_TOKENS), dtype=np.int32)
    start = min(SHORT_QUERY_TOKENS, pages * page_size - SHORT_QUERY_TOKENS)
    if start < 0:
        return ()
    runner.run(_bound_plan(rows, pages))
    fastest_ms: dict[int, float] = {}
    begun_s = time.perf_counter()
    for number in range(TIMED_ROUNDS_MAX):
        is_late = time.perf_counter() - begun_s > TIMING_S
        if number and _is_plausible(list(fastest_ms.values())) and (is_late or number >= TIMED_ROUNDS):
            break
        for tokens in TIMED_TOKENS:
            width = min(tokens, SHORT_QUERY_TOKENS)
            is_late = time.perf_counter() - begun_s > TIMING_S
            if tokens > width * rows.size or (is_late and tokens not in fastest_ms and tokens > SHORT_QUERY_TOKENS):
                break
            plan = _verifying_plan(rows[: tokens // width], width, start)
            started_s = time.perf_counter()
            runner.run(plan)
            taken_ms = (time.perf_counter() - started_s) * 1e3
            fastest_ms[tokens] = min(taken_ms, fastest_ms.get(tokens, taken_ms))
    return tuple(fastest_ms.items())


def _is_plausible(times_ms: Sequence[float]) -> bool:
    """Whether no time of a step is much below that of a smaller one before it."""
    return all(later >= FASTER_SHARE * earlier for earlier, later in pairwise(times_ms))


def _bound_plan(rows: Ints, pages: int) -> StepPlan:
    """Bind rows, greedy, all of them to the first pages of the pool."""
    count = rows.size
    ints, floats = np.zeros((count, BIND_INTS), np.int32), np.zeros((count, BIND_FLOATS), np.float32)
    floats[:, (BIND_TOP_P, BIND_REPETITION)] = 1.0
    none = np.zeros(count, np.int32)
    return StepPlan.empty(
        0, bind_rows=rows, bind_ints=ints, bind_floats=floats, bias_counts=none, ban_counts=none, prompt_counts=none,
        output_counts=none, table_rows=rows, table_starts=none, table_counts=none + pages,
        table_pages=np.tile(np.arange(1, pages + 1, dtype=np.int32), count),
    )  # fmt: skip


def _verifying_plan(rows: Ints, width: int, start: int) -> StepPlan:
    """Run `width` tokens of each row, all but the first as drafts."""
    one = np.ones(rows.size, np.int32)
    return StepPlan.empty(
        0, rows=rows, starts=one * start, query_counts=one * width, draft_counts=one * (width - 1),
        flags=one * SAMPLE, output_indices=one, logprob_tops=-one, tokens=np.zeros(rows.size * width, np.int32),
    )  # fmt: skip


def _check_memory(config: ModelConfig, form: WeightFormat) -> None:
    """Refuse early what would be killed half-way: weights alone must fit."""
    element_bytes = _WEIGHT_BYTES.get(form.quantize, float(form.dtype.itemsize))
    needed, available = weight_bytes_estimate(config, element_bytes), available_bytes()
    if needed > available:
        raise MachineLacks(
            f"too little memory: the weights need about {readable(needed)} but only {readable(available)} is free. "
            "Use a smaller model, --dtype bfloat16 or --quantize int8, or free memory."
        )


def _pool_pages(options: DeviceOptions, token_bytes: int, page_size: int, context: int, rows_max: int) -> int:
    """Pages for the pool from the memory that is free now. Raises StartupError if that cannot be."""
    available = available_bytes()
    if options.kv_memory == "auto":
        # One page beside the context is the scratch page.
        context_bytes = (ceil_div(context, page_size) + 1) * page_size * token_bytes
        kv_bytes = auto_kv_bytes(available, context_bytes, rows_max)
    else:
        kv_bytes = parse_bytes(options.kv_memory, "--kv-memory")
    return pool_pages(kv_bytes, available, token_bytes, page_size, context)
