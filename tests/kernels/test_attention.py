"""Each attention kernel equals its plain-torch twin over shapes, dtypes and page sizes."""

import numpy as np
import pytest
import torch

from sessile.kernels import attention, reference
from sessile.kernels.attention import CpuAttentionStep, PagedCache, StepRows, prompt_attention


def make_cache(page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, row_tokens: int) -> PagedCache:
    generator = torch.Generator().manual_seed(page_size)
    row_pages = -(-row_tokens // page_size)
    pages = 4 * row_pages + 1
    pool = torch.randn(2, 2, pages * page_size, kv_heads, head_dim, generator=generator).to(dtype)
    table = (torch.randperm(pages - 1, generator=generator) + 1).reshape(4, row_pages).to(torch.int32)
    return PagedCache(pool[0], pool[1], table, page_size)


def run_step(cache: PagedCache, heads: int, starts: list[int], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of layer 1 for rows 3, 2, 1 …, and the twin's."""
    rows = np.arange(3, 3 - len(starts), -1).astype(np.int32)
    generator = torch.Generator().manual_seed(1)
    tokens, kv_heads, head_dim = sum(counts), cache.keys.shape[2], cache.keys.shape[3]
    query = torch.randn(tokens, heads, head_dim, generator=generator).to(cache.keys.dtype)
    key, value = torch.randn(2, tokens, kv_heads, head_dim, generator=generator).to(cache.keys.dtype)
    slots = torch.cat([
        reference.row_slots(cache.table, int(row), start + count, cache.page_size)[start:]
        for row, start, count in zip(rows, starts, counts, strict=True)
    ])  # fmt: skip
    step = CpuAttentionStep(cache, StepRows(rows, np.array(starts, np.int32), np.array(counts, np.int32)), slots)
    out = step.run(1, query, key, value)
    lengths = torch.cat([torch.arange(s + 1, s + c + 1) for s, c in zip(starts, counts, strict=True)])
    query_rows = torch.from_numpy(np.repeat(rows, counts))
    twin = reference.paged_attention(
        query, cache.keys[1], cache.values[1], cache.table, query_rows, lengths, cache.page_size
    )
    return out.float(), twin


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 24), (8, 1, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0, 40, 1299], [1, 1, 1]), ([511, 512, 30], [1, 8, 3]), ([0, 600, 33], [40, 100, 1]), ([17], [9])],
    ids=["decode", "short-queries", "mixed", "one-chunk"],
)
def test_a_step_of_paged_attention_equals_the_twin(
    page_size: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tolerance: float,
    starts: list[int], counts: list[int],
) -> None:  # fmt: skip
    cache = make_cache(page_size, kv_heads, head_dim, dtype, row_tokens=1300)
    out, twin = run_step(cache, heads, starts, counts)
    torch.testing.assert_close(out, twin, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("tokens", "past"), [(9, 0), (9, 1), (130, 70), (1, 500)])
def test_prompt_attention_equals_its_twin(tokens: int, past: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(tokens, 6, 32, generator=generator)
    key, value = torch.randn(2, tokens, 2, 32, generator=generator)
    history = torch.randn(2, past, 2, 32, generator=generator)
    out = prompt_attention(query, key, value, *history)
    twin = reference.prompt_attention(query, key, value, *history)
    torch.testing.assert_close(out, twin, atol=1e-5, rtol=1e-5)


def test_a_step_writes_only_its_own_slots() -> None:
    cache = make_cache(16, 2, 8, torch.float32, row_tokens=64)
    before = cache.keys.clone()
    run_step(cache, 4, [20, 3], [2, 12])
    slots = [reference.row_slots(cache.table, row, end, 16)[start:] for row, start, end in ((3, 20, 22), (2, 3, 15))]
    changed = (cache.keys != before).any(dim=-1).any(dim=-1)
    assert changed[0].sum() == 0
    assert changed[1].nonzero().flatten().tolist() == torch.cat(slots).sort().values.tolist()


def test_without_numba_the_torch_twin_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(16, 2, 8, torch.float32, row_tokens=64)
    compiled, _ = run_step(cache, 4, [20, 3], [1, 5])
    monkeypatch.setattr(attention, "compiled_attention", lambda: None)
    plain, _ = run_step(cache, 4, [20, 3], [1, 5])
    assert attention.attention_name().startswith("torch")
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
