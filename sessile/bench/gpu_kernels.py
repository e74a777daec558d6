"""Speed of the GPU's kernels alone: attention at its bandwidth and its arithmetic, next to what the chip can do."""

from dataclasses import dataclass

import numpy as np
import torch
import triton

from sessile.kernels.flash_attention3 import FlashAttention3, ListedRows, available_flash_attention3, unsuited
from sessile.kernels.triton_attention import narrow_row_tokens, narrow_tile, paged_attention, wide_tile
from sessile.kernels.triton_plan import StepLayout, fill_work
from sessile.kernels.triton_work import AttentionWork, HeadShape, Tile

SHAPE_8B = HeadShape(32, 8, 128)
SHAPE_1_5B = HeadShape(12, 2, 128)
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """Rows of equal length: so many query tokens each, after so many tokens of history; and decoding rows beside."""

    name: str
    shape: HeadShape
    rows: int
    history: int
    queries: int
    decoding: int = 0

    @property
    def counts(self) -> list[int]:
        """Query tokens of each row."""
        return [1] * self.decoding + [self.queries] * self.rows

    @property
    def has_prompts(self) -> bool:
        """Whether some rows have so many query tokens that FlashAttention-3 may attend with them."""
        return self.queries > narrow_row_tokens(self.shape)

    def splits(self, flash: FlashAttention3) -> int | None:
        """ListedRows.splits of a step of this size; None: our own kernels attend."""
        return flash.splits(sum(self.counts), len(self.counts), self.shape.heads, self.shape.kv_heads)


CASES = (
    Case("8B decode 1 × 1090", SHAPE_8B, 1, 1089, 1),
    Case("8B decode 64 × 1090", SHAPE_8B, 64, 1089, 1),
    Case("8B decode 256 × 1090", SHAPE_8B, 256, 1089, 1),
    Case("8B decode 64 × 4096", SHAPE_8B, 64, 4095, 1),
    Case("1.5B decode 1 × 1090", SHAPE_1_5B, 1, 1089, 1),
    Case("1.5B decode 1 × 100000", SHAPE_1_5B, 1, 99999, 1),
    Case("1.5B decode 8 × 1090", SHAPE_1_5B, 8, 1089, 1),
    Case("1.5B decode 64 × 1090", SHAPE_1_5B, 64, 1089, 1),
    Case("1.5B decode 64 × 2700", SHAPE_1_5B, 64, 2699, 1),
    Case("1.5B decode 256 × 1090", SHAPE_1_5B, 256, 1089, 1),
    Case("8B prompt 1 × 8192", SHAPE_8B, 1, 0, 8192),
    Case("8B chunk 64 × 128 after 2048", SHAPE_8B, 64, 2048, 128),
    Case("8B turns 4 × 128 after 2700 beside 53", SHAPE_8B, 4, 2700, 128, 53),
    Case("1.5B prompts 8 × 1024", SHAPE_1_5B, 8, 0, 1024),
    Case("1.5B turn 1 × 16 after 100000", SHAPE_1_5B, 1, 100000, 16),
    Case("1.5B turn 1 × 128 after 100000", SHAPE_1_5B, 1, 100000, 128),
    Case("1.5B turn 1 × 128 after 2700 beside 63", SHAPE_1_5B, 1, 2700, 128, 63),
    Case("1.5B turns 4 × 128 after 2700 beside 53", SHAPE_1_5B, 4, 2700, 128, 53),
)


def measure_backends(case: Case) -> list[str]:
    """Time the case by our own attention and, if it has prompts, by FlashAttention-3 where that is there.

    What a step of this size runs is marked as chosen.
    """
    flash = None
    if case.has_prompts and not unsuited(case.shape.head_dim, torch.bfloat16, torch.cuda.get_device_capability()):
        flash = available_flash_attention3().kernels
    ours = f"{measure_attention(case)} ours"
    if flash is None:
        return [ours]
    theirs = f"{measure_attention(case, flash=flash)} FlashAttention-3"
    return [ours, f"{theirs}, chosen"] if case.splits(flash) is not None else [f"{ours}, chosen", theirs]


def measure_attention(
    case: Case,
    narrow: Tile | None = None,
    wide: Tile | None = None,
    page_size: int = 16,
    flash: FlashAttention3 | None = None,
) -> str:
    """Time one layer's attention in a graph; K and V are laid out in shuffled pages.

    flash: attends with the prompts; None: our own kernels do.
    """
    dtype, shape = torch.bfloat16, case.shape
    tiles = narrow or narrow_tile(shape, dtype), wide or wide_tile(shape, dtype)
    layout = laid_out(case, *tiles, flash)
    counts = np.array(case.counts)
    length = case.history + case.queries
    width = triton.cdiv(length, page_size)
    pages = counts.size * width + 1
    pool = torch.randn(2, pages * page_size, shape.kv_heads, shape.head_dim, dtype=dtype, device=_GPU)
    table = (torch.randperm(pages - 1, device=_GPU) + 1).to(torch.int32).view(counts.size, width)
    query = torch.randn(int(counts.sum()), shape.heads, shape.head_dim, dtype=dtype, device=_GPU)
    out = torch.empty_like(query)

    def run() -> None:
        for work in (layout.narrow, layout.wide):
            if isinstance(work, ListedRows):
                assert flash is not None, "rows are listed for FlashAttention-3 alone"
                flash.attend(query, pool[0], pool[1], table, work, page_size, out)
            elif work.pieces:
                paged_attention(query, pool[0], pool[1], table, layout, work, page_size, out)

    torch.cuda.synchronize()  # do_bench runs on a stream of its own
    ms = triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median")
    kv_bytes = int((case.history + counts).sum()) * shape.kv_heads * shape.head_dim * 4
    visible = (counts * case.history + counts * (counts + 1) / 2).sum()
    flops = visible * shape.heads * shape.head_dim * 4
    rates = f"{ms * 1e3:8.1f} µs, {kv_bytes / ms / 1e6:6.0f} GB/s, {flops / ms / 1e9:6.1f} TFLOP/s"
    return f"{case.name:40s} {rates}"


def laid_out(case: Case, narrow: Tile, wide: Tile, flash: FlashAttention3 | None = None) -> StepLayout:
    """The layout of a case's step."""
    counts = torch.tensor(case.counts, dtype=torch.int32, device=_GPU)
    few = narrow_row_tokens(case.shape)
    blocks = [0, 0]
    for count in case.counts:
        tile = narrow if count <= few else wide
        blocks[count > few] += triton.cdiv(count, case.shape.block_tokens(tile.queries))
    tokens = int(counts.sum())
    prompts: AttentionWork | ListedRows
    if flash:
        prompts = ListedRows.empty(case.rows, tokens, _GPU, case.splits(flash) or 0)
    else:
        prompts = AttentionWork.empty(blocks[1], case.shape, wide, _GPU)
    layout = StepLayout.empty(
        tokens, counts.numel(), counts.numel(), AttentionWork.empty(blocks[0], case.shape, narrow, _GPU), prompts, few
    )  # fmt: skip
    layout.rows.copy_(torch.arange(counts.numel(), dtype=torch.int32, device=_GPU))
    layout.starts.fill_(case.history)
    layout.counts.copy_(counts)
    layout.offsets.copy_(counts.cumsum(0) - counts)
    fill_work(layout, layout.narrow, (1, few), case.shape.kv_heads)
    fill_work(layout, layout.wide, (few + 1, int(counts.max())), case.shape.kv_heads)
    return layout
