"""Products with int8, int4 and fp8 weights equal those with the numbers that the weights stand for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sessile.kernels.linear import Fp8Weight, Int4Weight, Int8Weight
from sessile.kernels.triton_few import (
    FewTile,
    few_gated_linear,
    few_linear,
    few_linear_whole,
    gated_tile_of,
    tile_of,
)
from sessile.kernels.triton_linear import LinearTile, Norm, add_linear, norm_gated_linear, norm_linear
from sessile.kernels.triton_weight import Quantised
from sessile.kernels.triton_widen import widen
from sessile.model.gpu_linear import GATED_TOKENS, as_kernels_see_it
from tests.kernels.layouts import DEVICE

FORMATS = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}
# The interpreter multiplies no bfloat16; on a GPU it is what the instructions of our own make.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the largest element: products are summed in float32, but inputs, outputs and widened weights are rounded."""
TILE = FewTile(32, 64, 1, 3, 2)
every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def quantised(name: str, outs: int, ins: int) -> Quantised:
    weight = as_kernels_see_it(FORMATS[name](random(outs, ins)))
    assert isinstance(weight, Quantised)
    return weight


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (found.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@every_format
@every_dtype
@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 130])
@pytest.mark.parametrize(("outs", "ins"), [(64, 192), (40, 160)])
def test_the_parts_of_a_product_add_up_to_it(name: str, dtype: torch.dtype, tokens: int, outs: int, ins: int) -> None:
    weight, x, bias = quantised(name, outs, ins), random(tokens, ins).to(dtype), random(outs).to(dtype)
    parts = few_linear(x, weight, bias, FewTile(32, 64, 3, 3, 2))
    assert parts.shape == (3, tokens, outs) and parts.dtype == torch.float32
    assert_near(parts.sum(0), functional.linear(x.float(), weight.widened(), bias.float()), dtype)


@every_format
@every_dtype
@pytest.mark.parametrize("tokens", [2, 32])
def test_a_product_that_is_not_split_comes_in_its_inputs_type(name: str, dtype: torch.dtype, tokens: int) -> None:
    weight, x = quantised(name, 96, 128), random(tokens, 128).to(dtype)
    found = few_linear_whole(x, weight, None, TILE)
    assert found.dtype == dtype
    assert_near(found, functional.linear(x.float(), weight.widened()), dtype)


@every_format
@every_dtype
@pytest.mark.parametrize("tokens", [3, 32])
@pytest.mark.parametrize(("inner", "ins"), [(48, 128), (40, 96)])
def test_the_gating_of_two_products_is_part_of_them(
    name: str, dtype: torch.dtype, tokens: int, inner: int, ins: int
) -> None:
    weight, x = quantised(name, 2 * inner, ins), random(tokens, ins).to(dtype)
    gate, up = functional.linear(x.float(), weight.widened()).chunk(2, dim=-1)
    assert_near(few_gated_linear(x, weight, TILE), functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@every_dtype
@pytest.mark.parametrize(("outs", "ins"), [(64, 128), (36, 160)])
def test_of_one_token_norm_gating_and_sum_are_part_of_the_product(
    name: str, dtype: torch.dtype, outs: int, ins: int
) -> None:
    weight, x, tile = quantised(name, outs, ins), random(1, ins).to(dtype), LinearTile(4, 64, 4)
    gain, bias, residual = random(ins).to(dtype), random(outs).to(dtype), random(1, outs).to(dtype)
    normed = functional.rms_norm(x.float(), (ins,), gain.float(), 1e-5)
    product = functional.linear(normed, weight.widened())
    assert_near(norm_linear(x, Norm(gain, 1e-5), weight, bias, tile), product + bias.float(), dtype)
    gate, up = product.chunk(2, dim=-1)
    assert_near(norm_gated_linear(x, Norm(gain, 1e-5), weight, tile), functional.silu(gate) * up, dtype)
    expected = residual.float() + functional.linear(x.float(), weight.widened(), bias.float())
    add_linear(x, weight, bias, residual, tile)
    assert_near(residual, expected, dtype)


@every_format
@every_dtype
@pytest.mark.parametrize(("outs", "ins"), [(24, 1056), (20, 96)])
def test_rows_widened_into_memory_are_what_they_stand_for(
    name: str, dtype: torch.dtype, outs: int, ins: int
) -> None:
    weight = quantised(name, outs, ins)
    found = widen(weight, 5, torch.full((outs - 8, ins), torch.nan, device=DEVICE, dtype=dtype))
    torch.testing.assert_close(found, weight.widened()[5:-3].to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 0,
                               atol=0)  # fmt: skip


@every_format
def test_all_numbers_of_a_format_are_widened_exactly(name: str) -> None:
    """Scales are one and minima zero, so that nothing is rounded: each number comes out as it is."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).expand(16, 256).contiguous()
    if name == "int4":
        weight = Quantised(every, torch.full((16, 16), 0x3F80, dtype=torch.int32, device=DEVICE))
    else:
        number = every.view(torch.int8 if name == "int8" else torch.float8_e4m3fn)
        number[:, [0x7F, 0xFF] if name == "fp8" else []] = 0  # which in fp8 are no numbers
        weight = Quantised(number, torch.ones(16, device=DEVICE))
    expected = weight.widened()
    for column in (0, 7, 255) if name != "int4" else ():
        one = torch.zeros(1, 256, device=DEVICE)
        one[0, column] = 1
        row = torch.zeros(1, 16, device=DEVICE)
        add_linear(one, weight, None, row, LinearTile(4, 64, 4))
        assert torch.equal(row[0], expected[:, column])
    for dtype in DTYPES:
        ones = torch.eye(expected.shape[1], device=DEVICE, dtype=dtype)[:64]
        assert torch.equal(few_linear_whole(ones, weight, None, FewTile(16, 64, 1, 3, 1)).float(), expected.T[:64])
        assert torch.equal(widen(weight, 0, torch.empty_like(expected, dtype=dtype)).float(), expected)


@every_format
@pytest.mark.parametrize(
    ("outs", "ins"),
    [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536),
     (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 2, 16, 32, 64, 128])
def test_common_weights_are_cut_without_a_rest(name: str, outs: int, ins: int, tokens: int) -> None:
    numbers = torch.empty(outs, ins // 2 if name == "int4" else ins, dtype=torch.uint8, device="meta")
    scales = torch.empty((outs, ins // 32) if name == "int4" else (outs,), dtype=torch.int32, device="meta")
    weight = Quantised(numbers if name == "int4" else numbers.view(torch.int8), scales)
    tile = tile_of(weight, tokens)
    assert outs % tile.outs == 0 and ins % (tile.ins * tile.splits) == 0
    assert outs // tile.outs * tile.splits >= 132, "not every multiprocessor has a program"
    if tokens <= GATED_TOKENS:
        gated = gated_tile_of(weight, tokens)
        assert outs % gated.outs == 0 and ins % gated.ins == 0 and gated.splits == 1
