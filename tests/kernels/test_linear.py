"""Quantised linear layers equal the plain product with their own rounded weights, and stay near the original."""

import pytest
import torch

from sessile.kernels import linear, reference
from sessile.kernels.linear import Int4Weight, Int8Weight, PlainWeight, compiled_linear, pack_linear


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5


@pytest.mark.parametrize("tokens", [1, 5, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "error"), [("int8", 0.02), ("int4", 0.15)])
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 160), (192, 576)])
def test_a_quantised_product_is_near_the_plain_one(
    tokens: int, dtype: torch.dtype, quantize: str, error: float, rows: int, columns: int
) -> None:
    plain = weight(rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    product = pack_linear(plain, dtype, quantize)(x, bias)
    assert product.dtype == dtype
    assert product.shape == (tokens, rows)
    exact = x.float() @ plain.T + bias.float()
    assert float((product.float() - exact).square().mean().sqrt()) < error


def test_weights_on_the_grid_of_int4_are_kept_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    quarters = torch.randint(0, 16, (32, 64), generator=generator)
    quarters[:, ::32], quarters[:, 1::32] = 0, 15
    plain = quarters / 4 - 2.0
    product = Int4Weight(plain)(torch.eye(64), None)
    torch.testing.assert_close(product, plain.T.contiguous(), atol=1e-6, rtol=0)


def test_what_does_not_fit_int4_becomes_int8() -> None:
    assert isinstance(pack_linear(weight(32, 40), torch.float32, "int4"), Int8Weight)
    assert isinstance(pack_linear(weight(32, 64), torch.float32, "none"), PlainWeight)


def test_quantised_weights_hold_fewer_bytes() -> None:
    plain, eight, four = (pack_linear(weight(512, 512), torch.bfloat16, kind) for kind in ("none", "int8", "int4"))
    assert plain.bytes == 2 * 512 * 512
    assert eight.bytes < 0.6 * plain.bytes
    assert four.bytes < 0.4 * plain.bytes


def test_a_row_of_zeros_survives_quantisation() -> None:
    for quantize in ("int8", "int4"):
        product = pack_linear(torch.zeros(32, 64), torch.float32, quantize)(torch.ones(2, 64), None)
        assert product.abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (33, 64), (96, 160)])
def test_compiled_products_equal_torchs(tokens: int, rows: int, columns: int) -> None:
    kernels = compiled_linear()
    assert kernels is not None, "numba is a dependency and torch's wheels carry OpenMP"
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    plain = weight(rows, columns)
    four, eight = Int4Weight(plain), Int8Weight(plain)
    twins = {
        PlainWeight(plain): plain, PlainWeight(plain.bfloat16()): plain.bfloat16().float(),
        eight: eight.quantised.float() * eight.scales[:, None],
        four: reference.unpack_int4(four.packed, four.scales),
    }  # fmt: skip
    for packed, twin in twins.items():
        torch.testing.assert_close(kernels.linear(x, packed.stored), x @ twin.T)
    torch.testing.assert_close(kernels.unpack_int4(four.stored), twins[four])


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_without_compiled_kernels_products_stay_the_same(
    monkeypatch: pytest.MonkeyPatch, tokens: int, quantize: str
) -> None:
    packed = pack_linear(weight(48, 64), torch.float32, quantize)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2))
    expected = packed(x, None)
    monkeypatch.setattr(linear, "compiled_linear", lambda: None)
    torch.testing.assert_close(packed(x, None), expected, atol=1e-5, rtol=1e-5)
