"""Open a GPU: choose formats, load the model, size the pool by what the weights leave, compile the kernels."""

from collections.abc import Callable

import torch

from sessile.device.buckets import common_buckets, verifying_buckets
from sessile.device.config import DeviceOptions
from sessile.device.gpu_device import GpuDevice
from sessile.device.gpu_runner import GpuRunner
from sessile.device.gpu_timing import GpuStepTimes, blank_plan, time_gpu_steps, verifying_plans
from sessile.device.kv_pool import KvPool, kv_token_bytes, pool_pages
from sessile.device.memory import available_bytes, available_cores, parse_bytes, readable
from sessile.device.worker import DeviceFacts
from sessile.errors import MachineLacks, OutOfMemory, StartupError
from sessile.kernels.flash_attention3 import FlashAttention3, available_flash_attention3, unsuited
from sessile.kernels.triton_launch import compiled_together
from sessile.kernels.triton_weight import GROUP
from sessile.model.config import ModelConfig, resolve_model_path
from sessile.model.gpu_linear import scratch_bytes
from sessile.model.layers import WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model, read_config, weight_bytes_estimate
from sessile.units import ceil_div

_AUTO_SHARE = 0.9
_COMPUTE_BYTES = 2 << 30
"""Left free for what steps compute in."""
_HEAD_DIM_MAX = 256
_QUANTISED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.625}
"""Of a weight; int4 has a scale and a minimum for each 32."""
_FP8_CAPABILITY = (8, 9)
WARM_PROMPT_TOKENS = (64, 8192)
WARM_ROWS = (8, 32, 64)
"""Decoding steps of up to so many rows have kernels of their own."""


def open_gpu(
    model_options: ModelOptions,
    device_options: DeviceOptions,
    *,
    page_size: int,
    context_tokens: int | None,
    rows_max: int,
    drafts_max: int,
    progress: Callable[[str, float], None],
    device: torch.device,
) -> GpuDevice:
    """Load the model to the device and return it ready to run steps. Raises StartupError with a remedy.

    Arguments as those of `open_device`. device: a CUDA GPU; tests give the CPU and Triton's interpreter.
    """
    config = read_config(resolve_model_path(model_options.model))
    _check_model(config, model_options, device)
    if device_options.kv_dtype == "int8":
        raise StartupError("--kv-dtype int8 works on the CPU only; leave it out.")
    context = config.serving_context_tokens(context_tokens)
    quantize = "none" if model_options.quantize == "auto" else model_options.quantize
    form = WeightFormat(choose_gpu_dtype(model_options.dtype, device), device, quantize)
    flash = choose_flash_attention3(device_options.attention, config.head_dim, form.dtype, device)
    _check_memory(config, form)
    try:
        loaded = load_model(model_options, form, progress)
        token_bytes = kv_token_bytes(config, form.dtype)
        available = max(_free_bytes(device) - scratch_bytes(loaded.decoder), 0)
        kv_bytes = _kv_bytes(device_options, available, token_bytes, page_size, context, rows_max)
        pages = pool_pages(kv_bytes, available, token_bytes, page_size, context)
        pool = KvPool(config, pages, page_size, form.dtype, device)
        # A step in flight may write one token beyond the sequence's end, and its drafts.
        row_pages = ceil_div(context + drafts_max + 1, page_size)
        runner = GpuRunner(loaded.decoder, pool, rows_max, row_pages, flash=flash)
        progress("compiling kernels", 0.0)
        warm_up(runner, rows_max, context, drafts_max)
        progress("compiling kernels", 1.0)
        times = time_gpu_steps(runner, rows_max, drafts_max, context) if drafts_max else GpuStepTimes()
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        raise MachineLacks(
            "too little memory on the GPU: it ran out while starting. Free some, or lower --kv-memory or "
            "--context-tokens, or use a smaller model."
        ) from error
    facts = DeviceFacts(
        model_path=str(loaded.path),
        architecture=config.architecture,
        dtype=str(form.dtype).removeprefix("torch."),
        quantize=form.quantize,
        device=device.type,
        attention=f"triton, prompts by FlashAttention-3 of {flash.name}" if flash else "triton",
        threads=1,
        vocab_size=config.vocab_size,
        context_tokens=context,
        page_size=page_size,
        pages_total=pool.pages,
        rows_max=rows_max,
        kv_bytes=pool.bytes,
        weight_bytes=loaded.weight_bytes,
        step_ms=times.step_ms,
        decode_ms=times.decode_ms,
        late_ms=times.late_ms,
    )
    return GpuDevice(runner, facts)


def choose_gpu_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that "auto", "float32", "bfloat16" or "float16" means on this GPU."""
    if dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def choose_flash_attention3(
    asked: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> FlashAttention3 | None:
    """What `--attention` means for this model on this GPU; None: our kernels alone.

    Raises StartupError if FlashAttention-3 is demanded in vain.
    """
    if asked == "triton":
        return None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    fault = unsuited(head_dim, dtype, capability)
    if not fault:
        available = available_flash_attention3()
        if available.kernels:
            return available.kernels
        fault = f"{available.found}. {available.remedy}"
    if asked == "fa3":
        raise StartupError(f"--attention fa3: {fault}")
    return None


def warm_up(runner: GpuRunner, rows_max: int, context_tokens: int, drafts_max: int) -> None:
    """Compile all kernels (or read them from Triton's cache), run a step of each kind, then capture sizes that decode.

    Other common sizes are captured while the engine is idle, or when they are first needed. No row is bound: all read
    and write the scratch page.
    """
    decoding = sorted({min(rows, rows_max) for rows in (1, *WARM_ROWS, rows_max)})
    plans = [blank_plan(rows, 1) for rows in decoding]
    plans += [blank_plan(1, min(tokens, context_tokens)) for tokens in WARM_PROMPT_TOKENS]
    if drafts_max:
        plans += verifying_plans(rows_max, drafts_max).values()
    kinds = dict.fromkeys(map(runner.bucket_of, plans))
    common = [*common_buckets(rows_max), *verifying_buckets(rows_max, drafts_max)] if runner.captures else []
    with compiled_together(available_cores()) as calls:
        for bucket in reversed(kinds):  # Kernels that attend with prompts take longest to compile.
            runner.ask_for(bucket)
        calls.begin()  # Most there is to compile: the others ask for few kernels that are not among them.
        for bucket in common:
            if bucket not in kinds:
                runner.ask_for(bucket)
    for plan in plans:
        runner.start(plan).wait()
    for bucket in common:
        if not bucket.has_wide:
            runner.prepare(bucket)
    runner.prepare_later(bucket for bucket in common if bucket.has_wide)


def _check_model(config: ModelConfig, options: ModelOptions, device: torch.device) -> None:
    if options.quantize_activations == "int8":
        raise StartupError("--quantize-activations int8 works on the CPU only; leave it out.")
    if options.quantize == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            raise StartupError(
                "--quantize fp8 needs a GPU of compute capability 8.9 (Ada, Hopper or later); this one has "
                f"{'.'.join(map(str, capability))}. Use --quantize int8."
            )
    widths = (config.hidden_size, config.heads * config.head_dim, config.intermediate_size)
    if options.quantize == "int4" and any(width % GROUP for width in widths):
        raise StartupError(
            f"--quantize int4 on a GPU needs layers with multiples of {GROUP} inputs; this model's have "
            f"{', '.join(map(str, widths))}. Use --quantize int8."
        )
    if config.head_dim > _HEAD_DIM_MAX:
        raise StartupError(
            f"heads of {config.head_dim} dimensions are not supported on a GPU, only up to {_HEAD_DIM_MAX}. "
            "Use --device cpu."
        )


def _check_memory(config: ModelConfig, form: WeightFormat) -> None:
    """Refuse early what would fail half-way: weights alone must fit."""
    plain_bytes, free = form.dtype.itemsize, _free_bytes(form.device)
    quantised_bytes = _QUANTISED_BYTES.get(form.quantize)
    if quantised_bytes is None:
        needed = weight_bytes_estimate(config, plain_bytes)
    else:
        needed = weight_bytes_estimate(config, quantised_bytes, plain_bytes)
    if needed > free:
        raise MachineLacks(
            f"too little memory on the GPU: the weights need about {readable(needed)} but only {readable(free)} is "
            "free. Use a smaller model, --dtype bfloat16 or --quantize int4, or free memory."
        )


def _free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, in bytes."""
    if device.type == "cpu":
        return available_bytes()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def _kv_bytes(
    options: DeviceOptions, available: int, token_bytes: int, page_size: int, context_tokens: int, rows_max: int
) -> int:
    """Bytes for the pool: what the user says, else most of what is free, at least one context."""
    if options.kv_memory != "auto":
        return parse_bytes(options.kv_memory, "--kv-memory")
    context_bytes = (ceil_div(context_tokens, page_size) + 1) * page_size * token_bytes
    share = max(int(available * _AUTO_SHARE) - _COMPUTE_BYTES, 0)
    return max(min(share, context_bytes * (rows_max + 1)), context_bytes)
