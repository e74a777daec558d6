"""Paged attention on the GPU equals its plain twin, for any heads, page size, raggedness and split."""

from dataclasses import replace

import pytest
import torch

from sessile.kernels import reference, triton_work
from sessile.kernels.triton_attention import paged_attention
from sessile.kernels.triton_work import HeadShape, Tile
from tests.kernels.layouts import DEVICE, Row, layout_of

TILES = {"narrow": Tile(16, 16, 4, 2, programs=16), "wide": Tile(32, 32, 4, 2, programs=16)}
STEPS = {
    "decode": [Row(0, 1), Row(31, 1), Row(32, 1), Row(100, 1)],
    "appended": [Row(40, 5), Row(0, 7), Row(63, 2)],
    "prompt": [Row(0, 40)],
    "chunk of a prompt beside decoding": [Row(33, 20), Row(12, 1)],
}


def attend_by_twin(
    query: torch.Tensor, pool: torch.Tensor, table: torch.Tensor, rows: list[Row], page_size: int
) -> torch.Tensor:
    batch_rows = [len(rows) - 1 - index for index, row in enumerate(rows) for _ in range(row.count)]
    lengths = [row.start + j + 1 for row in rows for j in range(row.count)]
    return reference.paged_attention(
        query, pool[0], pool[1], table, torch.tensor(batch_rows), torch.tensor(lengths), page_size
    )


def assert_equal_to_twin(
    shape: HeadShape, rows: list[Row], page_size: int, tile: Tile, dtype: torch.dtype, atol: float,
    spare_blocks: int = 0,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    width = max(row.start + row.count for row in rows) // page_size + 1
    order = torch.randperm(len(rows) * width, device=DEVICE) + 1
    table = order.to(torch.int32).view(len(rows), width)
    pool = torch.randn(2, (len(order) + 1) * page_size, shape.kv_heads, shape.head_dim, device=DEVICE).to(dtype)
    tokens = sum(row.count for row in rows)
    query = torch.randn(tokens, shape.heads, shape.head_dim, device=DEVICE).to(dtype)
    layout = layout_of(rows, shape, tile, spare_blocks)
    out = torch.full_like(query, float("nan"))
    paged_attention(query, pool[0], pool[1], table, layout, layout.narrow, page_size, out)
    expected = attend_by_twin(query, pool, table, rows, page_size)
    torch.testing.assert_close(out.float(), expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("programs", [1, 16])
def test_any_mixture_of_rows_whole_or_split(step: str, tile: str, programs: int) -> None:
    shared = replace(TILES[tile], programs=programs)
    assert_equal_to_twin(HeadShape(4, 2, 16), STEPS[step], 16, shared, torch.float32, 1e-5)


def test_a_split_row_is_merged_where_the_bucket_has_room_for_more_blocks_than_may_be_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_work, "_PARTIAL_BYTES_MAX", 6 * 4096)  # six pieces of this tile
    assert_equal_to_twin(HeadShape(4, 2, 16), [Row(200, 1)], 16, TILES["wide"], torch.float32, 1e-5, spare_blocks=9)


@pytest.mark.parametrize(
    "shape", [HeadShape(4, 4, 64), HeadShape(6, 1, 96), HeadShape(24, 2, 24), HeadShape(2, 1, 256)]
)
def test_any_shape_of_heads(shape: HeadShape) -> None:
    assert_equal_to_twin(shape, [Row(37, 3), Row(5, 1)], 16, TILES["narrow"], torch.float32, 1e-5)


@pytest.mark.parametrize("page_size", [1, 3, 64, 256])
def test_any_page_size(page_size: int) -> None:
    assert_equal_to_twin(HeadShape(4, 2, 16), [Row(70, 2), Row(0, 1)], page_size, TILES["narrow"], torch.float32, 1e-5)


def test_half_precision_is_as_exact_as_its_numbers() -> None:
    assert_equal_to_twin(HeadShape(4, 2, 64), STEPS["appended"], 16, TILES["narrow"], torch.float16, 4e-3)
