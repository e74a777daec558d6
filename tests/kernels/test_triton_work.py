"""Attention is shared out whole and evenly, whatever the rows hold."""

from dataclasses import replace

import pytest

from sessile.kernels.triton_work import AttentionWork, HeadShape, Tile, share_out, wanted_pieces
from tests.kernels.layouts import DEVICE, Row, ints

SHAPE = HeadShape(4, 2, 16)
TILE = Tile(16, 32, 4, 2, programs=16)  # blocks of 8 query tokens
STEPS = {
    "decoding": [Row(start, 1) for start in (0, 31, 32, 700, 1090)],
    "one long row among short ones": [Row(5, 1), Row(9000, 1), Row(17, 1), Row(40, 1)],
    "a prompt": [Row(0, 300)],
    "turns and a long chunk": [Row(2000, 20), Row(64, 8), Row(5000, 33)],
    "more rows than programs": [Row(index, 1) for index in range(30)],
}


def shared(rows: list[Row], tile: Tile = TILE, row_tokens: tuple[int, int] = (1, 1 << 20)) -> tuple[
    list[tuple[int, int, int, int]], list[int]
]:  # fmt: skip
    """Pieces (row, first query token, first history token, history tokens of a part), and the list of merges."""
    listed = [row for row in rows if row_tokens[0] <= row.count <= row_tokens[1]]
    blocks = sum(-(-row.count // SHAPE.block_tokens(tile.queries)) for row in listed)
    work = AttentionWork.empty(blocks + 3, SHAPE, tile, DEVICE)
    starts, counts = ints([row.start for row in rows] + [7]), ints([row.count for row in rows] + [0])
    share_out(starts, counts, work, row_tokens, SHAPE.kv_heads)
    total = int(work.total)
    assert total <= work.pieces
    lists = zip(work.rows.tolist(), work.firsts.tolist(), work.lows.tolist(), work.sizes.tolist(), strict=True)
    pieces = [(row, first, low * tile.keys, size * tile.keys) for row, first, low, size in list(lists)[:total]]
    return pieces, work.merges.tolist()


@pytest.mark.parametrize("step", STEPS)
def test_every_block_attends_to_its_whole_history_once(step: str) -> None:
    rows, tokens = STEPS[step], SHAPE.block_tokens(TILE.queries)
    pieces, _ = shared(rows)
    for index, row in enumerate(rows):
        for first in range(0, row.count, tokens):
            visible = row.start + min(first + tokens, row.count)
            parts = [(low, size) for at, begin, low, size in pieces if (at, begin) == (index, first)]
            seen = [position for low, size in parts for position in range(low, min(low + size, visible))]
            assert seen == list(range(visible))


@pytest.mark.parametrize("step", STEPS)
def test_no_piece_is_much_longer_than_the_mean(step: str) -> None:
    rows = STEPS[step]
    pieces, _ = shared(rows)
    tiles = sum(-(-row.count // 8) * -(-(row.start + row.count) // TILE.keys) for row in rows)
    mean = max(-(-tiles // wanted_pieces(SHAPE.kv_heads, TILE)), TILE.part_tiles)
    assert max(size for _, _, _, size in pieces) <= (1.5 * mean + 1) * TILE.keys


def test_short_parts_are_left_whole() -> None:
    pieces, _ = shared([Row(150, 1)], replace(TILE, part_tiles=4))
    assert [(low, size) for _, _, low, size in pieces] == [(0, 160)]


def test_only_rows_of_the_kind_are_listed() -> None:
    rows = [Row(50, 1), Row(50, 9), Row(50, 2)]
    assert {row for row, *_ in shared(rows, row_tokens=(1, 2))[0]} == {0, 2}
    assert {row for row, *_ in shared(rows, row_tokens=(3, 99))[0]} == {1}


def test_blocks_cut_into_parts_are_listed_for_merging_at_their_first_piece() -> None:
    pieces, merges = shared([Row(5, 1), Row(2000, 9)])
    firsts = [merge for merge in merges if merge >= 0]
    assert [pieces[merge][:3] for merge in firsts] == [(1, 0, 0), (1, 8, 0)]
    assert merges[0] == -1 and merges[3:] == [-1, -1, -1]
