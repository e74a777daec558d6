"""How the attention of a step is shared out over the GPU: lists of pieces of nearly equal size, written by the device.

A piece is a block of queries of one row and a part of the history that they see. The list's length depends on the
bucket alone; how finely histories are cut, on what the rows of the step really hold. So a graph can hold the launch,
and neither a few long rows nor many short ones leave multiprocessors without work.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.flash_attention3 import ListedRows
from sessile.kernels.triton_launch import launch

_CHUNK = tl.constexpr(256)
_PARTIAL_BYTES_MAX = 64 << 20
"""Most memory for what pieces of a split history leave for each other."""


@dataclass(frozen=True)
class HeadShape:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def block_tokens(self, queries: int) -> int:
        """Query tokens of a block whose tile has so many rows, at least one."""
        return max(queries // self.group, 1)


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work and how it is compiled.

    queries: rows of the tile, tokens × query heads of a KV head. keys: history tokens folded in at a time. programs:
    how many should share a step's work. part_tiles: tiles of keys that are worth a part of their own. is_wide: for
    prompts, which begin with their longest pieces and run one KV head after the other.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int
    part_tiles: int = 1
    is_wide: bool = False


@dataclass(frozen=True)
class AttentionWork:
    """Pieces of attention; the device writes the lists.

    total int32[1]: how many pieces there are.
    rows, firsts, lows, sizes int32[pieces]: index into the plan's rows, the first query token of its block within the
    row, the first tile of keys of its part, and how many tiles a part of this row has (the last of a block may have
    fewer). The pieces of one block follow one another.
    merges int32[m]: the first piece of each block of a row that is cut into several parts; then -1. There are fewer of
    them than wanted pieces, as each holds more than a piece's share of the step.
    tokens: query tokens of a block. split_pieces: histories are split only into so many pieces in all.
    """

    total: Tensor
    rows: Tensor
    firsts: Tensor
    lows: Tensor
    sizes: Tensor
    merges: Tensor
    split_pieces: int
    tokens: int
    tile: Tile

    @classmethod
    def empty(cls, blocks: int, shape: HeadShape, tile: Tile, device: torch.device) -> "AttentionWork":
        """Room for a step of at most so many blocks; none if there are no blocks."""
        wanted = wanted_pieces(shape.kv_heads, tile)
        pieces = blocks + wanted if blocks else 0
        total, rows, firsts, lows, sizes, merges = (
            torch.empty(length, dtype=torch.int32, device=device)
            for length in [1, *[pieces] * 4, min(blocks, wanted)]
        )
        partial_bytes = shape.kv_heads * tile.queries * shape.head_dim * 4
        split_pieces = min(pieces, _PARTIAL_BYTES_MAX // partial_bytes)
        return cls(
            total, rows, firsts, lows, sizes, merges, split_pieces, shape.block_tokens(tile.queries), tile
        )  # fmt: skip

    @property
    def pieces(self) -> int:
        """Length of the lists."""
        return self.rows.numel()


def wanted_pieces(kv_heads: int, tile: Tile) -> int:
    """Pieces that a step should be cut into; it has up to one more for each of its blocks."""
    return max(tile.programs // kv_heads, 1)


def share_out(starts: Tensor, counts: Tensor, work: AttentionWork, row_tokens: tuple[int, int], kv_heads: int) -> None:
    """List the pieces of the rows whose query tokens are from row_tokens[0] to row_tokens[1].

    starts, counts int32[r]: KV tokens before the step and query tokens of each plan row; 0 query tokens: padding.
    """
    if not work.pieces:
        return
    rows, tile = counts.numel(), work.tile
    launch(
        _share_out, (max(rows, work.merges.numel()),),
        starts, counts, work.total, work.rows, work.firsts, work.lows, work.sizes, work.merges,
        rows, work.merges.numel(), work.split_pieces, wanted_pieces(kv_heads, tile), *row_tokens,
        TOKENS=work.tokens, KEYS=tile.keys, PART_TILES=tile.part_tiles, num_warps=4,
    )  # fmt: skip


@triton.jit
def _blocks_of(counts, j, rows_total, count_min, count_max, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of plan rows j; none of a row that is not to be listed."""
    count = tl.load(counts + j, mask=j < rows_total, other=0)
    return tl.where((count >= count_min) & (count <= count_max), tl.cdiv(count, TOKENS), 0)


@triton.jit
def _tiles_of(starts, counts, j, rows_total, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of keys that the last query token of plan rows j sees; of padding rows anything."""
    inside = j < rows_total
    return tl.cdiv(tl.load(starts + j, mask=inside, other=0) + tl.load(counts + j, mask=inside, other=0), KEYS)


@triton.jit
def _parts_of(tiles, part_tiles):  # type: ignore[no-untyped-def]
    """(parts of a row, tiles of each): as near to part_tiles as equal parts of whole tiles come."""
    own_tiles = tl.cdiv(tiles, tl.maximum((tiles + part_tiles // 2) // part_tiles, 1))
    return tl.cdiv(tiles, tl.maximum(own_tiles, 1)), own_tiles


@triton.jit(
    do_not_specialize=["rows_total", "merges_max", "split_pieces", "wanted", "count_min", "count_max"]
)
def _share_out(  # type: ignore[no-untyped-def]
    starts, counts, total, piece_rows, piece_firsts, piece_lows, piece_sizes, merges,
    rows_total, merges_max, split_pieces, wanted, count_min, count_max,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, PART_TILES: tl.constexpr,
):  # fmt: skip
    """Program i lists the pieces of plan row i, and clears merge i if there are fewer."""
    i = tl.program_id(0)
    tiles_total, blocks_total = 0, 0
    for first in range(0, rows_total, _CHUNK):
        j = first + tl.arange(0, _CHUNK)
        blocks = _blocks_of(counts, j, rows_total, count_min, count_max, TOKENS)
        tiles = _tiles_of(starts, counts, j, rows_total, KEYS)
        blocks_total += tl.sum(blocks)
        tiles_total += tl.sum(tl.where(blocks > 0, blocks * tiles, 0))
    # Parts of about the mean size: then there are no more pieces than wanted and one for each block.
    spare = tl.minimum(wanted, split_pieces - blocks_total)
    part_tiles = tl.where(spare > 0, tl.maximum(tl.cdiv(tiles_total, tl.maximum(spare, 1)), PART_TILES), 1 << 30)
    pieces_total, pieces_before, merges_total, merges_before = 0, 0, 0, 0
    for first in range(0, rows_total, _CHUNK):
        j = first + tl.arange(0, _CHUNK)
        blocks = _blocks_of(counts, j, rows_total, count_min, count_max, TOKENS)
        parts, own_tiles = _parts_of(_tiles_of(starts, counts, j, rows_total, KEYS), part_tiles)
        pieces = tl.where(blocks > 0, blocks * parts, 0)
        pieces_total += tl.sum(pieces)
        pieces_before += tl.sum(tl.where(j < i, pieces, 0))
        split = tl.where(parts > 1, blocks, 0)
        merges_total += tl.sum(split)
        merges_before += tl.sum(tl.where(j < i, split, 0))
    if i < rows_total:
        count = tl.load(counts + i)
        if (count >= count_min) & (count <= count_max):
            parts, own_tiles = _parts_of(tl.cdiv(tl.load(starts + i) + count, KEYS), part_tiles)
            blocks = tl.cdiv(count, TOKENS)
            for first in range(0, blocks * parts, _CHUNK):
                j = first + tl.arange(0, _CHUNK)
                inside = j < blocks * parts
                tl.store(piece_rows + pieces_before + j, tl.zeros_like(j) + i, mask=inside)
                tl.store(piece_firsts + pieces_before + j, j // parts * TOKENS, mask=inside)
                tl.store(piece_lows + pieces_before + j, j % parts * own_tiles, mask=inside)
                tl.store(piece_sizes + pieces_before + j, tl.zeros_like(j) + own_tiles, mask=inside)
            if parts > 1:
                for first in range(0, blocks, _CHUNK):
                    j = first + tl.arange(0, _CHUNK)
                    tl.store(merges + merges_before + j, pieces_before + j * parts, mask=j < blocks)
    if i == 0:
        tl.store(total, pieces_total)
    if (i >= merges_total) & (i < merges_max):
        tl.store(merges + i, -1)


def list_rows(
    rows: Tensor, starts: Tensor, counts: Tensor, offsets: Tensor, listed: ListedRows, row_tokens: tuple[int, int]
) -> None:
    """List the rows whose query tokens are from row_tokens[0] to row_tokens[1], in the plan's order.

    rows, starts, counts, offsets int32[r]: of each plan row, as in StepLayout.
    """
    if not listed.pieces:
        return
    launch(
        _list_rows, (max(rows.numel(), listed.pieces),),
        rows, starts, counts, offsets, listed.rows, listed.counts, listed.lengths, listed.firsts,
        rows.numel(), listed.pieces, *row_tokens, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_total", "listed_max", "count_min", "count_max"])
def _list_rows(  # type: ignore[no-untyped-def]
    rows, starts, counts, offsets, listed_rows, listed_counts, lengths, firsts,
    rows_total, listed_max, count_min, count_max,
):  # fmt: skip
    """Program i lists plan row i, and clears place i if there are fewer."""
    i = tl.program_id(0)
    total, place = 0, 0
    for first in range(0, rows_total, _CHUNK):
        j = first + tl.arange(0, _CHUNK)
        count = tl.load(counts + j, mask=j < rows_total, other=0)
        is_listed = ((count >= count_min) & (count <= count_max)).to(tl.int32)
        total += tl.sum(is_listed)
        place += tl.sum(tl.where(j < i, is_listed, 0))
    if i < rows_total:
        count = tl.load(counts + i)
        if (count >= count_min) & (count <= count_max):
            tl.store(listed_rows + place, tl.load(rows + i))
            tl.store(listed_counts + place, count)
            tl.store(lengths + place, tl.load(starts + i) + count)
            tl.store(firsts + place, tl.load(offsets + i))
    if (i >= total) & (i < listed_max):
        tl.store(listed_rows + i, 0)
        tl.store(listed_counts + i, 0)
        tl.store(lengths + i, 0)
        tl.store(firsts + i, 0)
