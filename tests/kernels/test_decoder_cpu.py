"""The compiled call for all layers equals the layers one by one, which are its twin, in every family and format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sessile.kernels import reference
from sessile.kernels.attention import SHORT_QUERY_TOKENS, CpuAttentionStep, PagedCache, StepRows
from sessile.model import fused_cpu
from sessile.model.fused_cpu import fuse_for_cpu, is_few_tokens, query_items
from sessile.model.layers import Decoder, StepInputs, WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from tests.parity.tiny_models import MODELS, VOCAB, Tiny, make_tiny

PAGE_SIZE = 4
# Decode rows of several lengths, one that spans several work items, and rows with drafts.
STARTS, COUNTS = [0, 5, 700, 63], [1, 3, 2, 5]


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path, dtype: torch.dtype, quantize: str) -> Decoder:
    form = WeightFormat(dtype, torch.device("cpu"), quantize)
    return load_model(ModelOptions(str(folder)), form, lambda stage, done: None).decoder


def filled_cache(decoder: Decoder, dtype: torch.dtype) -> PagedCache:
    config, generator = decoder.config, torch.Generator().manual_seed(3)
    row_pages = 712 // PAGE_SIZE
    pages = len(STARTS) * row_pages + 1
    pool = torch.randn(2, config.layers, pages * PAGE_SIZE, config.kv_heads, config.head_dim, generator=generator)
    table = (torch.randperm(pages - 1, generator=generator) + 1).reshape(len(STARTS), row_pages).to(torch.int32)
    return PagedCache(pool[0].to(dtype), pool[1].to(dtype), table, PAGE_SIZE)


def both(tiny: Tiny, dtype: torch.dtype, quantize: str) -> tuple[Any, Any]:
    """Logits and the keys left in the pool: of the compiled call, and of the layers one by one."""
    decoder = load(tiny.folder, dtype, quantize)
    rows = StepRows(*(np.array(column, np.int32) for column in ([2, 0, 3, 1], STARTS, COUNTS)))
    assert max(COUNTS) <= SHORT_QUERY_TOKENS
    tokens = torch.randint(0, VOCAB, (sum(COUNTS),), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(STARTS, COUNTS, strict=True)])
    results = []
    for is_fused in (True, False):
        cache = filled_cache(decoder, dtype)
        slots = torch.cat([
            reference.row_slots(cache.table, int(row), start + count, PAGE_SIZE)[start:]
            for row, start, count in zip(rows.rows, STARTS, COUNTS, strict=True)
        ])  # fmt: skip
        with torch.inference_mode():
            if is_fused:
                fused = fuse_for_cpu(decoder, cache)
                assert fused is not None
                hidden = fused.forward(tokens, positions, slots, query_items(rows))
            else:
                hidden = decoder(StepInputs(tokens, positions, CpuAttentionStep(cache, rows, slots)))
            results.append((decoder.logits(hidden), cache.keys.float()))
    return results[0], results[1]


def test_in_float32_it_equals_the_layers(tiny: Tiny) -> None:
    fused, plain = both(tiny, torch.float32, "none")
    torch.testing.assert_close(fused[0], plain[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fused[1], plain[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_with_quantised_weights_it_equals_the_layers(tiny: Tiny, quantize: str) -> None:
    fused, plain = both(tiny, torch.float32, quantize)
    torch.testing.assert_close(fused[0], plain[0], atol=2e-4, rtol=1e-4)


def test_in_bfloat16_it_stays_as_near_as_rounding_allows(tiny: Tiny) -> None:
    fused, plain = both(tiny, torch.bfloat16, "none")
    exact, _ = both(tiny, torch.float32, "none")
    error, plain_error = ((logits - exact[0]).square().mean().sqrt() for logits in (fused[0], plain[0]))
    assert error < 1.2 * plain_error


def test_a_step_of_few_tokens_and_short_rows_is_for_the_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cpu, "few_tokens", lambda: 16)

    def is_few(*counts: int) -> bool:
        rows = np.arange(len(counts), dtype=np.int32)
        return is_few_tokens(StepRows(rows, np.zeros_like(rows), np.array(counts, np.int32)))

    assert is_few(8, 1, 7) and not is_few(8, 1, 8)
    assert not is_few(SHORT_QUERY_TOKENS + 1)
