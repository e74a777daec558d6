"""Speed of the GPU's kernels alone: attention at its bandwidth and its arithmetic, next to what the chip can do."""

from dataclasses import dataclass

import torch
import triton

from sessile.kernels.triton_attention import HeadShape, Tile, narrow_tile, paged_attention, wide_tile
from sessile.kernels.triton_plan import StepLayout, query_blocks

SHAPE_8B = HeadShape(32, 8, 128)
SHAPE_1_5B = HeadShape(12, 2, 128)
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """Rows of equal length: so many query tokens each, after so many tokens of history."""

    name: str
    shape: HeadShape
    rows: int
    history: int
    queries: int

    @property
    def is_wide(self) -> bool:
        return self.queries > self.shape.narrow_row_tokens


CASES = (
    Case("8B decode 1 × 1090", SHAPE_8B, 1, 1089, 1),
    Case("8B decode 64 × 1090", SHAPE_8B, 64, 1089, 1),
    Case("8B decode 256 × 1090", SHAPE_8B, 256, 1089, 1),
    Case("8B decode 64 × 4096", SHAPE_8B, 64, 4095, 1),
    Case("1.5B decode 1 × 1090", SHAPE_1_5B, 1, 1089, 1),
    Case("1.5B decode 1 × 100000", SHAPE_1_5B, 1, 99999, 1),
    Case("1.5B decode 8 × 1090", SHAPE_1_5B, 8, 1089, 1),
    Case("1.5B decode 64 × 1090", SHAPE_1_5B, 64, 1089, 1),
    Case("1.5B decode 256 × 1090", SHAPE_1_5B, 256, 1089, 1),
    Case("8B prompt 1 × 8192", SHAPE_8B, 1, 0, 8192),
    Case("8B chunk 64 × 128 after 2048", SHAPE_8B, 64, 2048, 128),
    Case("1.5B prompts 8 × 1024", SHAPE_1_5B, 8, 0, 1024),
    Case("1.5B turn 1 × 16 after 100000", SHAPE_1_5B, 1, 100000, 16),
    Case("1.5B turn 1 × 128 after 100000", SHAPE_1_5B, 1, 100000, 128),
)


def measure_attention(case: Case, tile: Tile | None = None, page_size: int = 16) -> str:
    """Time one layer's attention in a graph; K and V are laid out in shuffled pages."""
    dtype, shape = torch.bfloat16, case.shape
    tile = tile or (wide_tile(shape, dtype) if case.is_wide else narrow_tile(shape, dtype))
    tokens, length = case.rows * case.queries, case.history + case.queries
    width = triton.cdiv(length, page_size)
    pages = case.rows * width + 1
    pool = torch.randn(2, pages * page_size, shape.kv_heads, shape.head_dim, dtype=dtype, device=_GPU)
    table = (torch.randperm(pages - 1, device=_GPU) + 1).to(torch.int32).view(case.rows, width)
    query = torch.randn(tokens, shape.heads, shape.head_dim, dtype=dtype, device=_GPU)
    layout = laid_out(case, shape.block_tokens(tile.queries))
    out = torch.empty_like(query)

    def run() -> None:
        paged_attention(query, pool[0], pool[1], table, layout, layout.narrow, tile, page_size, out)

    torch.cuda.synchronize()  # do_bench runs on a stream of its own
    ms = triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median")
    kv_bytes = case.rows * length * shape.kv_heads * shape.head_dim * 4
    visible = case.queries * case.history + case.queries * (case.queries + 1) / 2
    flops = case.rows * visible * shape.heads * shape.head_dim * 4
    return (
        f"{case.name:32s} tile {tile.queries:3d} × {tile.keys:3d}, {tile.warps} warps, {tile.stages} stages: "
        f"{ms * 1e3:8.1f} µs, {kv_bytes / ms / 1e6:6.0f} GB/s, {flops / ms / 1e9:6.1f} TFLOP/s"
    )


def laid_out(case: Case, block_tokens: int) -> StepLayout:
    """The layout of a case, every row cut into blocks of so many tokens."""
    per_row = triton.cdiv(case.queries, block_tokens)
    blocks = query_blocks(case.rows * per_row, block_tokens, _GPU)
    layout = StepLayout.empty(case.rows * case.queries, case.rows, case.rows, blocks, blocks, 0)
    rows = torch.arange(case.rows, dtype=torch.int32, device=_GPU)
    blocks.rows.copy_(rows.repeat_interleave(per_row))
    blocks.firsts.copy_(torch.arange(per_row, dtype=torch.int32, device=_GPU).repeat(case.rows) * block_tokens)
    layout.rows.copy_(rows)
    layout.starts.fill_(case.history)
    layout.counts.fill_(case.queries)
    layout.offsets.copy_(rows * case.queries)
    return layout
