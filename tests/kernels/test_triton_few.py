"""Products of few tokens equal the plain ones, whole or as the sum of their parts, and are read so by what follows."""

import pytest
import torch
from torch.nn import functional

from sessile.kernels.triton_few import (
    FEW_TOKENS,
    FewTile,
    few_gated_linear,
    few_linear,
    few_linear_whole,
    few_tile,
)
from sessile.kernels.triton_layers import add_rms_norm, rotate_and_store
from tests.kernels.layouts import DEVICE

SPLIT = FewTile(32, 32, 3, 3, 2)
WHOLE = FewTile(32, 32, 1, 3, 2)
every_count = pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 32, 33, FEW_TOKENS])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@every_count
@pytest.mark.parametrize(("outs", "ins"), [(64, 96), (40, 72), (32, 40)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_parts_of_a_product_add_up_to_it(tokens: int, outs: int, ins: int, has_bias: bool) -> None:
    x, weight = random(tokens, ins), random(outs, ins)
    bias = random(outs) if has_bias else None
    parts = few_linear(x, weight, bias, SPLIT)
    assert parts.shape == (3, tokens, outs) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum(0), functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@every_count
@pytest.mark.parametrize(("outs", "ins"), [(64, 96), (40, 72)])
def test_a_product_that_is_not_split_comes_in_its_inputs_type(tokens: int, outs: int, ins: int) -> None:
    x, weight, bias = random(tokens, ins), random(outs, ins), random(outs)
    torch.testing.assert_close(
        few_linear_whole(x, weight, bias, WHOLE), functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4
    )
    assert few_linear_whole(x.bfloat16(), weight.bfloat16(), None, WHOLE).dtype == torch.bfloat16


@every_count
@pytest.mark.parametrize(("inner", "ins"), [(48, 64), (40, 72)])
def test_the_gating_of_two_products_is_part_of_them(tokens: int, inner: int, ins: int) -> None:
    x, weight = random(tokens, ins), random(2 * inner, ins)
    gate, up = functional.linear(x, weight).chunk(2, dim=-1)
    gated = few_gated_linear(x, weight, WHOLE)
    torch.testing.assert_close(gated, functional.silu(gate) * up, atol=1e-4, rtol=1e-4)


def test_a_norm_adds_all_parts_to_the_residual_stream() -> None:
    parts, residual, gain = random(3, 5, 72), random(5, 72), random(72)
    expected = residual + parts.sum(0)
    normed = add_rms_norm(parts, residual, gain, 1e-5)
    torch.testing.assert_close(residual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed, functional.rms_norm(expected, (72,), gain, 1e-5), atol=1e-4, rtol=1e-4)


def test_a_rotation_reads_all_parts() -> None:
    parts, angle = random(3, 4, (4 + 2 * 2) * 16), random(4, 8)
    slots = torch.tensor([3, 0, 7, 5], dtype=torch.int32, device=DEVICE)
    stored = []
    for qkv in (parts, parts.sum(0)):
        keys, values = torch.zeros(2, 9, 2, 16, device=DEVICE)
        stored.append((rotate_and_store(qkv, (angle.cos(), angle.sin()), slots, keys, values), keys, values))
    for found, expected in zip(*stored, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("outs", "ins"), [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536)])
@pytest.mark.parametrize(("wide_outs", "wide_ins"), [(6144, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("tokens", [2, 16, 32, 64])
def test_common_weights_are_cut_without_a_rest(
    outs: int, ins: int, wide_outs: int, wide_ins: int, tokens: int
) -> None:
    for rows, columns in ((outs, ins), (wide_outs, wide_ins)):
        tile = few_tile(rows, columns, tokens)
        assert rows % tile.outs == 0 and columns % (tile.ins * tile.splits) == 0
        assert rows // tile.outs * tile.splits >= 110, "not every multiprocessor has a program"
