"""Opening a device: facts are true, formats work, memory is counted, and what cannot be is refused with a remedy."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from sessile.device import factory
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.device.kv_pool import KvPool, auto_kv_bytes, kv_token_bytes, pool_pages
from sessile.device.memory import available_bytes, available_cores, parse_bytes, readable
from sessile.errors import MachineLacks, StartupError
from sessile.kernels.native import NativeKernels
from sessile.model.config import resolve_model_path
from sessile.model.options import ModelOptions
from sessile.model.weights import read_config
from tests.parity.driver import Driver, Run
from tests.unit.stage_device import CONFIG, VOCAB, small_device

PROMPT = list(range(3, 40))


def test_facts_say_what_was_opened(tmp_path: Path) -> None:
    with small_device(tmp_path) as device:
        facts = device.facts
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert (facts.vocab_size, facts.context_tokens, facts.page_size, facts.rows_max) == (VOCAB, 256, 4, 8)
    assert facts.pages_total == (2 << 20) // (4 * token_bytes)
    assert facts.kv_bytes == facts.pages_total * 4 * token_bytes
    assert (facts.architecture, facts.dtype, facts.device) == ("qwen3", "float32", "cpu")
    assert facts.model_path == str(tmp_path)
    weights = 2 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 2 * 32 + 2 * 16) + 32 + 2 * VOCAB * 32
    assert facts.weight_bytes == 4 * weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_every_format_stays_near_the_full_one(tmp_path: Path, dtype: str, quantize: str) -> None:
    runs = {}
    for name, options in {"full": {}, "other": {"dtype": dtype, "quantize": quantize}}.items():
        with small_device(tmp_path, **options) as device:
            runs[name] = Run(PROMPT, 3, score_top=0)
            Driver(device, chunk_tokens=16).run_all([runs[name]])
    error = np.abs(np.array(runs["full"].scores) - np.array(runs["other"].scores))
    assert error.max() < (0.05 if quantize == "none" else 0.3)


def test_kernels_that_are_demanded_but_do_not_suit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--cpu-kernels native: .*"), small_device(tmp_path, kernels="native"):
        pass  # widths of 48 are no multiples of 32


@pytest.mark.parametrize("attention", ["triton", "fa3"])
def test_attention_of_a_gpu_is_refused_on_a_cpu(attention: str) -> None:
    options = DeviceOptions(device="cpu", attention=attention)
    with pytest.raises(StartupError, match=f"--attention {attention} is for a GPU; leave it out"):
        open_device(
            ModelOptions("default"), options, page_size=16, context_tokens=None, rows_max=1,
            progress=lambda stage, done: None,
        )  # fmt: skip


def test_by_default_what_does_not_suit_runs_on_numbas_kernels(tmp_path: Path) -> None:
    with small_device(tmp_path) as device:
        assert device.facts.attention == "numba"


def test_logits_that_are_not_finite_mark_only_their_row(tmp_path: Path) -> None:
    with small_device(tmp_path) as device:
        sound = Run(PROMPT, 4)
        Driver(device, chunk_tokens=64).run_all([sound])
        poisoned, beside = Run([7, *PROMPT], 4), Run(PROMPT, 4)
        decoder = device._runner._decoder
        decoder.embedding = decoder.embedding.clone()
        decoder.embedding[1] = float("nan")
        poisoned.prompt[5] = 1
        Driver(device, chunk_tokens=64).run_all([poisoned, beside])
    assert poisoned.is_faulty
    assert not beside.is_faulty
    assert beside.output == sound.output


def test_a_context_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(StartupError, match="--context-tokens 513"):
        open_device(
            ModelOptions(str(tmp_path), "dummy"), DeviceOptions(), page_size=16, context_tokens=513, rows_max=2,
            progress=lambda stage, done: None,
        )  # fmt: skip


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "available_bytes", lambda: 10_000)
    with pytest.raises(MachineLacks, match="too little memory: the weights need about"), small_device(tmp_path):
        raise AssertionError("the device opened")


def test_a_pool_takes_at_least_one_context_and_at_most_one_for_each_row() -> None:
    assert auto_kv_bytes(available=1000, context_bytes=600, rows_max=4) == 600
    assert auto_kv_bytes(available=4000, context_bytes=600, rows_max=4) == 1000
    assert auto_kv_bytes(available=10**6, context_bytes=600, rows_max=4) == 3000


def test_a_pool_that_does_not_fit_is_refused() -> None:
    assert pool_pages(1000, 2000, token_bytes=10, page_size=4, context_tokens=50) == 25
    with pytest.raises(MachineLacks, match="too little memory"):
        pool_pages(3000, 2000, token_bytes=10, page_size=4, context_tokens=50)
    with pytest.raises(StartupError, match="--kv-memory"):
        pool_pages(100, 2000, token_bytes=10, page_size=4, context_tokens=50)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("2k", 2048), ("512M", 512 << 20), ("1.5G", 3 << 29), ("4GiB", 4 << 30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "nan", "1e30"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--kv-memory"):
        parse_bytes(text, "--kv-memory")


def test_the_machine_has_memory_and_cores() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50
    assert 1 <= available_cores() <= 4096
    assert readable(3 << 29) == "1.5 GiB"


def test_auto_dtype_is_one_that_the_processor_multiplies() -> None:
    expected = torch.bfloat16 if factory.cpu_multiplies_bfloat16() else torch.float32
    assert factory.choose_dtype("auto") == expected
    assert factory.choose_dtype("bfloat16") == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_inputs_are_refused_where_nothing_multiplies_them(dtype: str) -> None:
    options = ModelOptions("default", dtype=dtype, quantize_activations="int8")
    with pytest.raises(StartupError, match="--quantize-activations int8: only with --dtype bfloat16"):
        factory.choose_format(options, None)


@pytest.mark.parametrize(("options", "message"), [
    ({"quantize": "fp8"}, "--quantize fp8 works on a GPU only; use --quantize int8"),
    ({"dtype": "float16"}, "--dtype float16 works on a GPU only; use bfloat16"),
])  # fmt: skip
def test_what_only_a_gpu_has_is_refused_in_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        factory.choose_format(ModelOptions("default", **options), None)


def test_inputs_are_in_int8_only_if_that_was_asked_for() -> None:
    native = cast(NativeKernels, SimpleNamespace(multiplies_int8=True))
    for quantize in ("auto", "int8"):
        options = ModelOptions("default", dtype="bfloat16", quantize=quantize)
        assert not factory.choose_format(options, native).int8_inputs
        assert factory.choose_format(replace(options, quantize_activations="int8"), native).int8_inputs


def test_kv_is_int8_where_the_kernels_compute_in_bfloat16_and_nothing_else_is_rounded() -> None:
    native = cast(NativeKernels, SimpleNamespace(multiplies_int8=True))
    for kernels, dtype, activations, expected in (
        (native, "bfloat16", "none", torch.int8),
        (native, "bfloat16", "int8", torch.bfloat16),
        (native, "float32", "none", torch.float32),
        (None, "bfloat16", "none", torch.bfloat16),
    ):
        form = factory.choose_format(ModelOptions("default", dtype=dtype, quantize_activations=activations), kernels)
        assert factory.choose_kv_dtype(DeviceOptions(), form) == expected
        assert factory.choose_kv_dtype(DeviceOptions(kv_dtype="model"), form) == form.dtype
        if kernels is not None:
            assert factory.choose_kv_dtype(DeviceOptions(kv_dtype="int8"), form) == torch.int8


def test_int8_kv_is_refused_without_kernels_that_read_it() -> None:
    form = factory.choose_format(ModelOptions("default", dtype="float32"), None)
    with pytest.raises(StartupError, match="--kv-dtype int8: only the C\\+\\+ kernels read it, .* by `make compile`"):
        factory.choose_kv_dtype(DeviceOptions(kv_dtype="int8"), form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_pool_copies_all_that_makes_up_a_token(dtype: torch.dtype) -> None:
    config = read_config(resolve_model_path("default"))
    pool = KvPool(config, 4, 8, dtype, torch.device("cpu"))
    assert pool.bytes == 4 * 8 * kv_token_bytes(config, dtype)
    cache = pool.cache(torch.zeros(1, 1, dtype=torch.int32))
    parts = [part for part in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if part is not None]
    assert len(parts) == (4 if dtype == torch.int8 else 2)
    for part in parts:
        part.copy_(torch.randint(-100, 100, part.shape))
    before = [part.clone() for part in parts]
    pool.copy(np.array([[1, 3, 5]], np.int32))
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[:, 24:29], old[:, 8:13])
        assert torch.equal(part[:, :24], old[:, :24]) and torch.equal(part[:, 29:], old[:, 29:])


@pytest.mark.parametrize(("kv_memory", "message"), [("1K", "--kv-memory of 1.0 KiB holds"), ("900T", "too little")])
def test_a_pool_that_cannot_be_is_refused_before_the_weights_are_read(
    tmp_path: Path, kv_memory: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # There are no weights: reading them would be an error.
    with pytest.raises(StartupError, match=message):
        open_device(
            ModelOptions(str(tmp_path)), DeviceOptions(kv_memory=kv_memory), page_size=16, context_tokens=256,
            rows_max=2, progress=lambda stage, done: None,
        )  # fmt: skip
