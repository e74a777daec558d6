"""Steps laid out by hand for kernel tests: what the device's kernels would write, by plain loops."""

from dataclasses import dataclass

import torch

from sessile.kernels.triton_attention import HeadShape, Tile
from sessile.kernels.triton_plan import QueryBlocks, StepLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Query tokens that follow so many tokens of history."""

    start: int
    count: int


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def listed(rows: list[Row], tokens: int) -> QueryBlocks:
    """All blocks of all rows, and one that is padding."""
    blocks = [(index, first) for index, row in enumerate(rows) for first in range(0, row.count, tokens)]
    return QueryBlocks(ints([row for row, _ in blocks] + [-1]), ints([first for _, first in blocks] + [0]), tokens)


def layout_of(rows: list[Row], shape: HeadShape, tile: Tile) -> StepLayout:
    """A layout whose every row is cut into blocks of this tile; batch rows are the plan's rows in reverse."""
    blocks = listed(rows, shape.block_tokens(tile.queries))
    tokens = sum(row.count for row in rows)
    layout = StepLayout.empty(tokens, len(rows), len(rows), blocks, blocks, 0)
    offset = 0
    for index, row in enumerate(rows):
        layout.rows[index] = len(rows) - 1 - index
        layout.starts[index], layout.counts[index], layout.offsets[index] = row.start, row.count, offset
        offset += row.count
    return layout
