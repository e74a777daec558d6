"""Products of one token, fused with what surrounds them, equal the plain ones."""

import pytest
import torch
from torch.nn import functional

from sessile.kernels.triton_linear import (
    LinearTile,
    Norm,
    add_linear,
    norm_gated_linear,
    norm_linear,
    split_linear,
)
from tests.kernels.layouts import DEVICE

TILE = LinearTile(4, 32, 4)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize(("outs", "ins"), [(32, 64), (30, 64), (32, 72)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_norm_before_a_product_is_part_of_it(outs: int, ins: int, has_bias: bool) -> None:
    x, weight, gain = random(1, ins), random(outs, ins), random(ins)
    bias = random(outs) if has_bias else None
    expected = functional.linear(functional.rms_norm(x, (ins,), gain, 1e-5), weight, bias)
    torch.testing.assert_close(norm_linear(x, Norm(gain, 1e-5), weight, bias, TILE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("inner", "ins"), [(48, 64), (40, 72)])
def test_the_gating_after_a_product_is_part_of_it(inner: int, ins: int) -> None:
    x, weight, gain = random(1, ins), random(2 * inner, ins), random(ins)
    gate, up = functional.linear(functional.rms_norm(x, (ins,), gain, 1e-5), weight).chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(norm_gated_linear(x, Norm(gain, 1e-5), weight, TILE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_added_to_the_residual_stream(has_bias: bool) -> None:
    x, weight, residual = random(1, 96), random(64, 96), random(1, 64)
    bias = random(64) if has_bias else None
    expected = residual + functional.linear(x, weight, bias)
    add_linear(x, weight, bias, residual, TILE)
    torch.testing.assert_close(residual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32])
@pytest.mark.parametrize("splits", [2, 4])
def test_a_product_in_parts_adds_up_to_it_without_rounding_between(dtype: torch.dtype, splits: int) -> None:
    x, weight = random(70, 64).to(dtype), random(24, 64).to(dtype)
    parts = split_linear(x, weight, splits)
    assert parts.shape == (splits, 70, 24) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum(0), functional.linear(x.float(), weight.float()), atol=1e-3, rtol=1e-3)
