"""Steps laid out by hand for kernel tests: what the device's kernels would write, by plain loops."""

from dataclasses import dataclass

import torch

from sessile.kernels.triton_plan import StepLayout
from sessile.kernels.triton_work import AttentionWork, HeadShape, Tile, share_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Query tokens that follow so many tokens of history."""

    start: int
    count: int


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def layout_of(rows: list[Row], shape: HeadShape, tile: Tile, spare_blocks: int = 0) -> StepLayout:
    """A layout whose every row is cut into pieces of this tile; batch rows are the plan's rows in reverse."""
    tokens = sum(row.count for row in rows)
    blocks = sum(-(-row.count // shape.block_tokens(tile.queries)) for row in rows)
    work = AttentionWork.empty(blocks + spare_blocks, shape, tile, DEVICE)
    layout = StepLayout.empty(tokens, len(rows), len(rows), work, work, 0)
    offset = 0
    for index, row in enumerate(rows):
        layout.rows[index] = len(rows) - 1 - index
        layout.starts[index], layout.counts[index], layout.offsets[index] = row.start, row.count, offset
        offset += row.count
    share_out(layout.starts, layout.counts, work, (1, tokens), shape.kv_heads)
    return layout
