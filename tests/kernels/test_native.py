"""The C++ kernels compute what their twins in torch do, in every build that this processor runs."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import compile_native
from sessile import LLM
from sessile.completion import Completion
from sessile.gguf import GgufTensor
from sessile.kernels import native, packing, reference
from sessile.kernels.attention import CpuAttentionStep, PagedCache, StepRows
from sessile.kernels.linear import PackedWeight, pack_linear
from sessile.kernels.native import (
    BFLOAT16_INPUTS,
    INT8_INPUTS,
    LEVELS,
    NativeKernels,
    native_kernels,
    runnable_levels,
)
from sessile.model.dequantize import dequantize, stored_groups
from sessile.model.layers import Decoder, StepInputs, WeightFormat
from sessile.model.native_cpu import native_decoder, suits_native, work_tables
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from tests.parity.tiny_models import COMMON, MODELS, VOCAB, Tiny, make_tiny, save_tiny

pytestmark = pytest.mark.long

KINDS = ("none", "int8", "int4")
ENDS = (runnable_levels()[0], LEVELS[-1])
PAGE_SIZE = 4
# Decode rows of several lengths, one that spans several work items, rows with drafts, chunks without and with history.
ROWS, STARTS, COUNTS = [2, 0, 3, 1, 5, 4], [0, 5, 700, 63, 0, 130], [1, 3, 2, 5, 40, 97]


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory, whole_grid: bool) -> Iterator[None]:
    """Built for these tests alone: the others run as on a machine where nobody has compiled anything."""
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compile_native, "LEVELS", LEVELS if whole_grid else ENDS)
        assert compile_native.main(folder) == 0
        monkeypatch.setattr(native, "FOLDER", folder)
        native_kernels.cache_clear()
        yield
    native_kernels.cache_clear()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The fastest build and the plainest; with --whole-grid all that run here, which take half a minute to compile."""
    if "kernels" in metafunc.fixturenames:
        levels = runnable_levels()
        some = levels if metafunc.config.getoption("whole_grid") else [level for level in levels if level in ENDS]
        metafunc.parametrize("kernels", [level.name for level in some], indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    kernels = native_kernels(request.param)
    assert kernels is not None
    return kernels


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin_of(weight: torch.Tensor, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """float32 weights that a product is to be taken with."""
    if kind == "none":
        return weight.to(dtype).float()
    return packing.widen(packing.quantise(weight, packing.BYTES if kind == "int8" else packing.NIBBLES))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 4, 6, 7, 12, 13, 40])
def test_products_equal_torchs(kernels: NativeKernels, tokens: int, dtype: torch.dtype, kind: str) -> None:
    for rows, columns in ((1, 32), (33, 64), (211, 160)):
        weight, x = random(rows, columns, seed=rows) / columns**0.5, random(tokens, columns, seed=tokens)
        packed = pack_linear(weight, dtype, kind, kernels)
        assert isinstance(packed, PackedWeight)
        twin = twin_of(weight, dtype, kind)
        if packed.inputs == BFLOAT16_INPUTS:
            # Sums stay float32; what many tokens round to bfloat16 is weights of about the size of 1 / √columns.
            torch.testing.assert_close(packed(x, None), x.bfloat16().float() @ twin.T, atol=2e-2, rtol=0)
            assert (packed(x, None) - x @ twin.T).square().mean().sqrt() < 4e-3
        else:
            torch.testing.assert_close(packed(x, None), x @ twin.T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_a_product_is_the_same_bit_by_bit_whoever_is_beside_it(kernels: NativeKernels, kind: str) -> None:
    packed = pack_linear(random(96, 160), torch.float32, kind, kernels)
    x = random(50, 160, seed=1)
    whole = packed(x, None)
    for tokens in (1, 2, 3, 5, 8, 12, 13, 29):
        assert torch.equal(packed(x[:tokens], None), whole[:tokens])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 7, 12, 13, 40])
def test_products_with_int8_inputs_equal_those_with_rounded_ones(
    kernels: NativeKernels, tokens: int, kind: str
) -> None:
    for rows, columns in ((1, 32), (33, 64), (211, 160)):
        weight, x = random(rows, columns, seed=rows) / columns**0.5, random(tokens, columns, seed=tokens)
        x[0] *= 1e-3
        x[-1, :32] = 0
        packed = pack_linear(weight, torch.bfloat16, kind, kernels, int8_inputs=True)
        assert isinstance(packed, PackedWeight)
        assert (packed.inputs == INT8_INPUTS) == kernels.multiplies_int8
        if packed.inputs == INT8_INPUTS:
            twin = packing.round_inputs(x) @ twin_of(weight, torch.bfloat16, kind).T
            torch.testing.assert_close(packed(x, None), twin, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_with_int8_inputs_a_product_is_the_same_bit_by_bit_whoever_is_beside_it(
    kernels: NativeKernels, kind: str
) -> None:
    packed = pack_linear(random(96, 160), torch.bfloat16, kind, kernels, int8_inputs=kernels.multiplies_int8)
    x = random(50, 160, seed=1)
    whole = packed(x, None)
    for tokens in (1, 2, 3, 5, 6, 7, 8, 12, 13, 29) if kernels.multiplies_int8 else (13, 29):
        assert torch.equal(packed(x[:tokens], None), whole[:tokens])


def test_plain_weights_and_float32_are_never_multiplied_with_int8(kernels: NativeKernels) -> None:
    for dtype, kind in ((torch.bfloat16, "none"), (torch.float32, "int8")):
        packed = pack_linear(random(32, 64), dtype, kind, kernels, int8_inputs=True)
        assert isinstance(packed, PackedWeight) and packed.inputs != INT8_INPUTS


def test_a_bias_is_added_and_the_dtype_of_the_input_kept(kernels: NativeKernels) -> None:
    packed, bias = pack_linear(random(40, 64), torch.bfloat16, "none", kernels), torch.linspace(-1, 1, 40)
    x = random(3, 64, seed=2).bfloat16()
    product = packed(x, bias.bfloat16())
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), packed(x.float(), None) + bias, atol=2e-2, rtol=1e-2)


def test_weights_of_zeros_and_no_tokens_are_nothing_special(kernels: NativeKernels) -> None:
    for kind in KINDS:
        packed = pack_linear(torch.zeros(32, 64), torch.float32, kind, kernels)
        assert packed(torch.ones(2, 64), None).abs().max() < 1e-4
        assert packed(torch.ones(0, 64), None).shape == (0, 32)


def load(
    folder: Path, dtype: torch.dtype, quantize: str, kernels: NativeKernels, int8_inputs: bool = False
) -> Decoder:
    form = WeightFormat(dtype, torch.device("cpu"), quantize, kernels, int8_inputs)
    return load_model(ModelOptions(str(folder)), form, lambda stage, done: None).decoder


def filled_cache(decoder: Decoder, dtype: torch.dtype) -> PagedCache:
    config = decoder.config
    row_pages = 712 // PAGE_SIZE
    pages = len(ROWS) * row_pages + 1
    pool = random(2, config.layers, pages * PAGE_SIZE, config.kv_heads, config.head_dim, seed=3).to(dtype)
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(3)) + 1
    return PagedCache(pool[0], pool[1], order.reshape(len(ROWS), row_pages).to(torch.int32), PAGE_SIZE)


def both(decoder: Decoder, dtype: torch.dtype) -> tuple[Any, Any]:
    """Logits and the keys left in the pool: of the one call, and of the layers one by one."""
    rows = StepRows(*(np.array(column, np.int32) for column in (ROWS, STARTS, COUNTS)))
    tokens = torch.randint(0, VOCAB, (sum(COUNTS),), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(STARTS, COUNTS, strict=True)])
    results = []
    for is_native in (True, False):
        cache = filled_cache(decoder, dtype)
        slots = torch.cat([
            reference.row_slots(cache.table, row, start + count, PAGE_SIZE)[start:]
            for row, start, count in zip(ROWS, STARTS, COUNTS, strict=True)
        ])  # fmt: skip
        with torch.inference_mode():
            if is_native:
                whole = native_decoder(decoder, cache)
                assert whole is not None
                hidden = whole.forward(tokens, positions, slots, rows)
            else:
                hidden = decoder(StepInputs(tokens, positions, CpuAttentionStep(cache, rows, slots)))
            results.append((decoder.logits(hidden), cache.keys.float()))
    return results[0], results[1]


@pytest.mark.parametrize("quantize", KINDS)
def test_in_float32_the_one_call_equals_the_layers(tiny: Tiny, kernels: NativeKernels, quantize: str) -> None:
    one, layers = both(load(tiny.folder, torch.float32, quantize, kernels), torch.float32)
    torch.testing.assert_close(one[0], layers[0], atol=3e-4, rtol=1e-4)
    torch.testing.assert_close(one[1], layers[1], atol=1e-4, rtol=1e-4)


def test_in_bfloat16_the_one_call_stays_as_near_as_rounding_allows(tiny: Tiny, kernels: NativeKernels) -> None:
    one, layers = both(load(tiny.folder, torch.bfloat16, "none", kernels), torch.bfloat16)
    exact, _ = both(load(tiny.folder, torch.float32, "none", kernels), torch.float32)
    error, layers_error = ((logits - exact[0]).square().mean().sqrt() for logits in (one[0], layers[0]))
    assert error < 1.2 * layers_error


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_with_int8_inputs_the_one_call_stays_as_near_as_rounding_allows(
    tiny: Tiny, kernels: NativeKernels, quantize: str
) -> None:
    one, layers = both(load(tiny.folder, torch.bfloat16, quantize, kernels, int8_inputs=True), torch.bfloat16)
    exact, _ = both(load(tiny.folder, torch.float32, quantize, kernels), torch.float32)
    error, layers_error = ((logits - exact[0]).square().mean().sqrt() for logits in (one[0], layers[0]))
    assert error < 1.2 * layers_error


def test_a_step_that_nobody_reads_leaves_the_same_keys_and_values(tiny: Tiny, kernels: NativeKernels) -> None:
    decoder = load(tiny.folder, torch.float32, "int8", kernels)
    rows = StepRows(*(np.array(column, np.int32) for column in (ROWS, STARTS, COUNTS)))
    tokens = torch.randint(0, VOCAB, (sum(COUNTS),), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(STARTS, COUNTS, strict=True)])
    caches = []
    for is_read in (True, False):
        cache = filled_cache(decoder, torch.float32)
        slots = torch.cat([
            reference.row_slots(cache.table, row, start + count, PAGE_SIZE)[start:]
            for row, start, count in zip(ROWS, STARTS, COUNTS, strict=True)
        ])  # fmt: skip
        whole = native_decoder(decoder, cache)
        assert whole is not None
        with torch.inference_mode():
            whole.forward(tokens, positions, slots, rows, is_read=is_read)
        caches.append(cache)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


HEADS = {16: "llama-untied", 24: "mistral", 32: "qwen3", 64: "", 128: ""}
"""Sizes of heads, and a model that has them; wide ones are multiplied in bytes where the processor can."""


@pytest.fixture(scope="module", params=HEADS)
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    size, folder = request.param, tmp_path_factory.mktemp("heads")
    if HEADS[size]:
        return make_tiny(HEADS[size], folder)
    torch.manual_seed(size)
    return save_tiny(LlamaForCausalLM(LlamaConfig(**COMMON, head_dim=size, tie_word_embeddings=True)), folder)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads [..., d] as int8, and the scale of each [...]."""
    scale = x.abs().amax(-1) / 127
    return (x / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8), scale


def widened(x: torch.Tensor) -> torch.Tensor:
    """What heads are once they were in a pool of int8."""
    whole, scale = rounded(x)
    return whole.float() * scale[..., None]


def int8_cache(decoder: Decoder) -> PagedCache:
    """`filled_cache`, rounded."""
    cache = filled_cache(decoder, torch.float32)
    (keys, key_scales), (values, value_scales) = rounded(cache.keys), rounded(cache.values)
    return replace(cache, keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)


class RoundedStep(CpuAttentionStep):
    """The twin: attention in float32 over K and V that were rounded on their way to the pool."""

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().run(layer, query, widened(key), widened(value))


class Batch:
    """Tokens of ROWS and where their K and V go."""

    def __init__(self, cache: PagedCache, chosen: Sequence[int] = range(len(ROWS))) -> None:
        tokens = torch.randint(0, VOCAB, (sum(COUNTS),), generator=torch.Generator().manual_seed(4)).split(COUNTS)
        spans = [torch.arange(STARTS[i], STARTS[i] + COUNTS[i]) for i in chosen]
        slots = [
            reference.row_slots(cache.table, ROWS[i], STARTS[i] + COUNTS[i], PAGE_SIZE)[STARTS[i] :] for i in chosen
        ]
        columns = ([column[i] for i in chosen] for column in (ROWS, STARTS, COUNTS))
        self.rows = StepRows(*(np.array(column, np.int32) for column in columns))
        self.inputs = torch.cat([tokens[i] for i in chosen]), torch.cat(spans), torch.cat(slots)

    @torch.inference_mode()
    def run(self, decoder: Decoder, cache: PagedCache) -> torch.Tensor:
        """Logits by the one call."""
        whole = native_decoder(decoder, cache)
        assert whole is not None
        return decoder.logits(whole.forward(*self.inputs, self.rows))


def test_over_int8_it_stays_as_near_to_its_twin_as_bytes_allow(heads: Tiny, kernels: NativeKernels) -> None:
    decoder = load(heads.folder, torch.float32, "none", kernels)
    cache = int8_cache(decoder)
    batch = Batch(cache)
    logits = batch.run(decoder, cache)
    cache = filled_cache(decoder, torch.float32)
    exact = batch.run(decoder, cache)
    cache = filled_cache(decoder, torch.float32)
    cache = replace(cache, keys=widened(cache.keys), values=widened(cache.values))
    tokens, positions, slots = batch.inputs
    with torch.inference_mode():
        hidden = decoder(StepInputs(tokens, positions, RoundedStep(cache, batch.rows, slots)))
    twin = decoder.logits(hidden)
    # What rounding K and V changes at all; queries and weights in bytes change a fraction of it.
    changed = (twin - exact).square().mean().sqrt()
    in_bytes = kernels.multiplies_int8 and decoder.config.head_dim in (64, 128)
    error = (logits - twin).square().mean().sqrt()
    assert 0 < changed and error < (0.5 if in_bytes else 0.1) * changed


def test_over_int8_a_row_is_the_same_bit_by_bit_whoever_is_beside_it(heads: Tiny, kernels: NativeKernels) -> None:
    decoder = load(heads.folder, torch.float32, "none", kernels)
    cache = int8_cache(decoder)
    whole = Batch(cache).run(decoder, cache).split(COUNTS)
    for i in range(len(ROWS)):
        cache = int8_cache(decoder)
        assert torch.equal(Batch(cache, [i]).run(decoder, cache), whole[i])


@pytest.mark.parametrize("is_key", [True, False])
def test_over_int8_what_is_not_finite_is_seen(heads: Tiny, kernels: NativeKernels, is_key: bool) -> None:
    """In the history of one row of few tokens and of one chunk; and stored, where a step's own token is not."""
    decoder = load(heads.folder, torch.float32, "none", kernels)
    cache = int8_cache(decoder)
    for row in (2, 5):
        scales = cache.key_scales if is_key else cache.value_scales
        assert scales is not None
        scales[:, cache.table[ROWS[row], 5 // PAGE_SIZE] * PAGE_SIZE + 5 % PAGE_SIZE] = torch.nan
    logits = Batch(cache).run(decoder, cache).split(COUNTS)
    assert [bool(row.isfinite().all()) for row in logits] == [True, True, False, True, True, False]
    cache = int8_cache(decoder)
    batch = Batch(cache)
    decoder.embedding.data[batch.inputs[0][0]] = torch.inf
    batch.run(decoder, cache)
    scales = cache.key_scales if is_key else cache.value_scales
    assert scales is not None and not scales[0, batch.inputs[2][0]].isfinite().any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_weights_of_a_gguf_file_are_kept_exactly(kind: str) -> None:
    block_bytes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}[kind]
    blocks = np.random.default_rng(5).integers(0, 256, (12, 3, block_bytes), np.uint8)
    blocks[:, :, :2] = np.random.default_rng(6).normal(0, 0.01, (12, 3, 1)).astype(np.float16).view(np.uint8)
    if kind == "Q4_1":
        blocks[:, :, 2:4] = np.random.default_rng(7).normal(0, 0.1, (12, 3, 1)).astype(np.float16).view(np.uint8)
    tensor = GgufTensor("w", (12, 96), kind, blocks.reshape(-1))
    stored = stored_groups(tensor)
    assert stored is not None
    number, *parts = stored
    groups = packing.Groups(number, *(None if part is None else torch.from_numpy(part) for part in parts))
    np.testing.assert_array_equal(packing.widen(groups).numpy(), dequantize(tensor))


def test_weights_of_q4_k_are_kept_but_for_the_rounding_of_their_scales() -> None:
    blocks = np.random.default_rng(5).integers(0, 256, (12, 2, 144), np.uint8)
    blocks[:, :, :4] = np.random.default_rng(6).uniform(1e-4, 1e-3, (12, 2, 2)).astype(np.float16).view(np.uint8)
    tensor = GgufTensor("w", (12, 512), "Q4_K", blocks.reshape(-1))
    stored = stored_groups(tensor)
    assert stored is not None
    number, *parts = stored
    groups = packing.Groups(number, *(None if part is None else torch.from_numpy(part) for part in parts))
    assert groups.minima is not None
    # Half a unit in the last place of a float16, of the largest number times its scale, and of the minimum.
    error = (15 * groups.scales.float() + groups.minima.float().abs()) * 2.0**-11
    difference = np.abs(packing.widen(groups).numpy() - dequantize(tensor)).reshape(12, 16, 32)
    assert (difference <= error[:, :, None].numpy()).all() and difference.max() > 0
    blocks[0, 0, :2] = np.float16(3e4).view(np.uint16).reshape(1).view(np.uint8)
    assert stored_groups(GgufTensor("w", (12, 512), "Q4_K", blocks.reshape(-1))) is None


def test_formats_that_are_no_groups_of_32_are_unpacked() -> None:
    assert stored_groups(GgufTensor("w", (1, 256), "Q6_K", np.zeros(210, np.uint8))) is None


def test_parts_of_different_formats_are_not_stacked() -> None:
    eight, four = (packing.quantise(random(32, 64), kind) for kind in (packing.BYTES, packing.NIBBLES))
    assert packing.stack_groups([eight, four]) is None
    assert packing.stack_groups([four, four]).shape == (64, 64)  # type: ignore[union-attr]


def test_every_query_of_a_short_row_is_cut_into_items_that_cover_its_history() -> None:
    rows = StepRows(*(np.array(column, np.int32) for column in (ROWS, STARTS, COUNTS)))
    queries, items, chunks = work_tables(rows)
    offsets = np.cumsum(COUNTS) - COUNTS
    expected = [(offsets[i] + j, ROWS[i], STARTS[i] + j + 1) for i in range(4) for j in range(COUNTS[i])]
    for index, (token, row, length) in enumerate(expected):
        own = items[queries[index, 2] : queries[index, 2] + queries[index, 3]]
        assert tuple(queries[index, :2]) == (token, row)
        assert (own[:, 0] == index).all()
        assert own[0, 1] == 0 and own[-1, 2] == length and (own[1:, 1] == own[:-1, 2]).all()
    assert chunks.tolist() == [[11, 5, 0, 40, 0], [51, 4, 130, 97, 1]]


def test_a_processor_gets_the_builds_whose_instructions_it_has() -> None:
    assert [level.name for level in runnable_levels(frozenset())] == ["plain"]
    flags = frozenset({"avx2", "fma", "f16c", "bmi2", "movbe"})
    assert [level.name for level in runnable_levels(flags)] == ["avx2", "plain"]


def test_builds_of_other_sources_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert "make compile" in native.available_native().remedy
    (tmp_path / native.STAMP).write_text("0123")
    build = native.available_native()
    assert not build.usable and "other sources" in build.found


def test_the_stamp_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.native_stamp()
    shutil.copytree(native.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpp")
    assert native.native_stamp() == before
    (tmp_path / "cpp" / "linear.h").write_text("// changed")
    assert native.native_stamp() != before


def test_models_whose_widths_are_no_multiples_of_32_do_not_suit(tiny: Tiny) -> None:
    config = load(tiny.folder, torch.float32, "none", native_kernels()).config  # type: ignore[arg-type]
    assert suits_native(config)
    object.__setattr__(config, "intermediate_size", 48)
    assert not suits_native(config)


def test_by_default_they_answer_the_first_question_of_the_readme() -> None:
    llm = LLM(context_tokens=256, kv_memory="32M", threads=1)
    try:
        answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
        assert isinstance(answer, Completion) and "Paris" in answer.text
    finally:
        llm.close()
