"""The fused operations of a layer equal the model's plain ones."""

import pytest
import torch
from torch.nn import functional

from sessile.kernels.triton_layers import add_rms_norm, rms_norm, rotate_and_store, silu_mul
from sessile.model.layers import Rope, rotate
from tests.kernels.layouts import DEVICE


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("size", [64, 576, 1000])
def test_the_norm_is_that_of_torch(size: int) -> None:
    x, weight = random(3, size), random(size)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), functional.rms_norm(x, (size,), weight, 1e-5))


def test_adding_to_the_residual_and_the_norm_are_one_pass() -> None:
    x, residual, weight = random(5, 96), random(5, 96), random(96)
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(normed, functional.rms_norm(total, (96,), weight, 1e-6))


@pytest.mark.parametrize("inner", [96, 1536])
def test_gating_is_silu_times_up(inner: int) -> None:
    gate_up = random(3, 2 * inner)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(silu_mul(gate_up), functional.silu(gate) * up)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (9, 3, 64), (2, 1, 24)])
def test_heads_are_rotated_and_stored_where_their_slots_say(
    heads: int, kv_heads: int, head_dim: int, has_norms: bool
) -> None:
    tokens, slots = 5, torch.tensor([7, 0, 31, 2, 16], dtype=torch.int32, device=DEVICE)
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)
    keys, values = random(32, kv_heads, head_dim), random(32, kv_heads, head_dim)
    stored = [keys.clone(), values.clone()]
    rope = Rope([10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    angles = rope.angles(torch.tensor([0, 3, 1000, 77, 12], device=DEVICE), torch.float32)
    norms = (random(head_dim), random(head_dim), 1e-6) if has_norms else None
    query = rotate_and_store(qkv, angles, slots, keys, values, norms)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    if norms:
        q = functional.rms_norm(q, (head_dim,), norms[0], norms[2])
        k = functional.rms_norm(k, (head_dim,), norms[1], norms[2])
    stored[0][slots.long()], stored[1][slots.long()] = rotate(k, angles), v
    torch.testing.assert_close(query, rotate(q, angles))
    torch.testing.assert_close(keys, stored[0])
    torch.testing.assert_close(values, stored[1])
