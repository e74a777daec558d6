"""Prompts by FlashAttention-3: where it is installed its kernels, everywhere what we hand to an operator like its own.

Whichever there is, it equals the plain twin, beside our own kernels for the rows of few queries.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sessile.device import gpu_factory
from sessile.device.config import DeviceOptions
from sessile.device.gpu_factory import open_gpu
from sessile.kernels import reference, triton_plan, triton_sampling
from sessile.kernels.flash_attention3 import FlashAttention3, ListedRows, available_flash_attention3, unsuited
from sessile.kernels.triton_attention import paged_attention
from sessile.kernels.triton_plan import StepLayout, fill_work
from sessile.kernels.triton_work import AttentionWork, HeadShape, Tile
from sessile.model.options import ModelOptions
from tests.kernels.fake_flash import PACKAGES, fake_flash_attention3
from tests.kernels.layouts import DEVICE, Row, ints
from tests.parity.driver import Driver, Run
from tests.parity.tiny_models import MODELS, Tiny, make_tiny

FEW = 8
"""Rows with at most so many query tokens are our own kernels'."""
NARROW = Tile(16, 32, 4, 2, programs=8)
SHAPE = HeadShape(4, 2, 128)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""Triton's interpreter multiplies bfloat16 wrongly."""
STEPS = {
    "a prompt": [Row(0, 70)],
    "chunks after histories": [Row(200, 33), Row(5, 9), Row(128, 64)],
    "between decoding rows": [Row(40, 1), Row(0, 20), Row(100, 2), Row(17, 40), Row(9, 8), Row(65, 1)],
    "no prompt at all": [Row(40, 1), Row(3, 8)],
}


def installed() -> list[FlashAttention3]:
    """The kernels of this machine's package, if it has one and a GPU for it."""
    capability = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
    if unsuited(SHAPE.head_dim, DTYPE, capability):
        return []
    return [kernels] if (kernels := available_flash_attention3().kernels) else []


BACKENDS = {f"declared as {package}": fake_flash_attention3(package) for package in PACKAGES} | {
    f"installed {kernels.name}": kernels for kernels in installed()
}
BEST = list(BACKENDS)[-1]
"""The installed kernels where there are some."""


class HandStep:
    """A step laid out by hand whose batch rows are the plan's in reverse; pages of nobody hold no numbers."""

    def __init__(self, rows: list[Row], page_size: int, spare_tokens: int = 0, spare_rows: int = 0) -> None:
        torch.manual_seed(0)
        self.rows, self.page_size = rows, page_size
        width = max(row.start + row.count for row in rows) // page_size + 1
        order = torch.randperm(len(rows) * width, device=DEVICE) + 1
        self.table = order.to(torch.int32).view(len(rows), width)
        slots = (len(order) + 1) * page_size
        self.pool = torch.randn(2, slots, SHAPE.kv_heads, SHAPE.head_dim, device=DEVICE).to(DTYPE)
        held = torch.zeros(slots, dtype=torch.bool, device=DEVICE)
        for index in range(len(rows)):
            held[self.slots(index)] = True
        self.pool[:, ~held] = float("nan")
        tokens = sum(row.count for row in rows) + spare_tokens
        self.query = torch.randn(tokens, SHAPE.heads, SHAPE.head_dim, device=DEVICE).to(DTYPE)
        self.out = torch.full_like(self.query, 7.0)
        places = len(rows) + spare_rows
        self.layout = StepLayout.empty(
            tokens, places, places, AttentionWork.empty(2 * places, SHAPE, NARROW, DEVICE),
            ListedRows.empty(max(min(places, tokens // (FEW + 1)), 1), tokens, DEVICE), FEW,
        )  # fmt: skip
        self.lay_out(rows)

    def slots(self, index: int) -> torch.Tensor:
        row = self.rows[index]
        return reference.row_slots(self.table, len(self.rows) - 1 - index, row.start + row.count, self.page_size)

    def lay_out(self, rows: list[Row]) -> None:
        """Write what the plan's kernel writes of these rows, garbage where it writes nothing."""
        self.rows, spare = rows, self.layout.rows.numel() - len(rows)
        counts = [row.count for row in rows]
        self.layout.rows.copy_(ints([*reversed(range(len(rows))), *[-1] * spare]))
        self.layout.starts.copy_(ints([*(row.start for row in rows), *[99] * spare]))
        self.layout.counts.copy_(ints([*counts, *[0] * spare]))
        self.layout.offsets.copy_(ints([*(sum(counts[:index]) for index in range(len(rows))), *[99] * spare]))

    def attend(self, kernels: FlashAttention3) -> None:
        """List the work on the device, then attend with all rows."""
        fill_work(self.layout, self.layout.narrow, (1, FEW), SHAPE.kv_heads)
        fill_work(self.layout, self.layout.wide, (FEW + 1, 1 << 20), SHAPE.kv_heads)
        keys, values, wide = self.pool[0], self.pool[1], self.layout.wide
        assert isinstance(wide, ListedRows)
        kernels.attend(self.query, keys, values, self.table, wide, self.page_size, self.out)
        paged_attention(
            self.query, keys, values, self.table, self.layout, self.layout.narrow, self.page_size, self.out
        )  # fmt: skip

    def assert_equal_to_twin(self) -> None:
        offset = 0
        for index, row in enumerate(self.rows):
            keys, values = (pool[self.slots(index)] for pool in self.pool)
            queries = self.query[offset : offset + row.count]
            expected = reference.prompt_attention(
                queries, keys[row.start :], values[row.start :], keys[: row.start], values[: row.start]
            )
            torch.testing.assert_close(self.out[offset : offset + row.count].float(), expected, atol=1e-2, rtol=1e-2)
            offset += row.count
        assert (self.out[offset:] == 7.0).all(), "padding tokens are nobody's to write"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_any_mixture_of_rows(step: str, backend: str) -> None:
    laid_out = HandStep(STEPS[step], 16)
    laid_out.attend(BACKENDS[backend])
    laid_out.assert_equal_to_twin()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 128, 256])
def test_any_page_size_and_nothing_behind_a_rows_end_is_read(page_size: int) -> None:
    laid_out = HandStep([Row(70, 33), Row(2, 3), Row(0, 150)], page_size)
    laid_out.attend(BACKENDS[BEST])
    laid_out.assert_equal_to_twin()


def test_the_same_memory_serves_steps_of_other_rows_within_the_bucket() -> None:
    laid_out = HandStep([Row(60, 60), Row(60, 60), Row(60, 60)], 16, spare_tokens=12, spare_rows=5)
    for rows in ([Row(50, 60), Row(17, 1), Row(0, 40)], [Row(99, 1), Row(40, 3), Row(5, 1)], [Row(9, 100)]):
        laid_out.pool.nan_to_num_(0.5)
        laid_out.table = laid_out.table[: len(rows)].contiguous()
        laid_out.out.fill_(7.0)
        laid_out.lay_out(rows)
        laid_out.attend(BACKENDS[BEST])
        laid_out.assert_equal_to_twin()


def test_rows_of_few_queries_are_not_listed() -> None:
    laid_out = HandStep(STEPS["between decoding rows"], 16, spare_rows=3)
    wide = laid_out.layout.wide
    assert isinstance(wide, ListedRows)
    fill_work(laid_out.layout, wide, (FEW + 1, 1 << 20), SHAPE.kv_heads)
    lists = zip(wide.rows.tolist(), wide.counts.tolist(), wide.lengths.tolist(), wide.firsts.tolist(), strict=False)
    nobody = (0, 0, 0, 0)
    assert list(lists) == [(4, 20, 20, 1), (2, 40, 57, 23)] + [nobody] * (wide.pieces - 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    small = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", lambda: LlamaForCausalLM(small))
        patch.setattr(triton_sampling, "PROGRAMS_WANTED", 4)
        patch.setattr(triton_plan, "STATE_PROGRAMS", 2)
        patch.setattr(gpu_factory, "WARM_PROMPT_TOKENS", ())
        # Its lengths are read on the host, so a graph cannot hold what stands in for the operator.
        patch.setattr("sessile.device.buckets.CAPTURED_TOKENS_MAX", 0)
        patch.setattr(gpu_factory, "warm_up", lambda *_: None)
        yield make_tiny("small", tmp_path_factory.mktemp("small"))


def test_a_device_gives_the_tokens_of_transformers_with_the_operator_in_its_larger_steps(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = fake_flash_attention3("sglang-kernel")
    monkeypatch.setattr(flash, "splits", lambda tokens, *_: 1 if tokens >= 12 else None)
    monkeypatch.setattr(gpu_factory, "choose_flash_attention3", lambda *_: flash)
    sizes: list[int] = []
    attend = flash.attend
    monkeypatch.setattr(flash, "attend", lambda query, *given: (sizes.append(query.shape[0]), attend(query, *given)))
    device: Any = open_gpu(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="2M"), page_size=16,
        context_tokens=128, rows_max=4, drafts_max=0, progress=lambda stage, done: None, device=DEVICE,
    )  # fmt: skip
    prompts = [[5], [17, 9, 33, 8, 50], [*range(30, 54)]]
    runs = [Run(prompt, 2) for prompt in prompts]
    Driver(device, chunk_tokens=16).run_all(runs)
    device.close()
    assert device.facts.attention == "triton, prompts by FlashAttention-3 of sglang-kernel"
    assert [run.output for run in runs] == [tiny.greedy(prompt, 2) for prompt in prompts]
    assert sizes and min(sizes) >= 12
