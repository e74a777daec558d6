"""Packed weights lie as cpp/linear.h draws them, here spelled out weight by weight."""

import numpy as np
import pytest
import torch

from sessile.kernels.packing import BYTES, GROUP, NIBBLES, Groups, pack_groups, quantise, widen

ROWS = (16, 33, 1057)
"""Half a pair of blocks, one row more than a pair, and more than are packed at once."""
COLUMNS = 2 * GROUP


def groups_of(kind: int, rows: int) -> Groups:
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    return quantise(weight, kind)


def numbers_of(groups: Groups) -> np.ndarray:
    """The number of each weight, [rows, columns], with rows of zeros up to whole pairs of blocks."""
    numbers = groups.numbers.numpy()
    if groups.kind == NIBBLES:
        numbers = np.concatenate((numbers & 15, numbers >> 4), axis=2)
    return np.pad(numbers.reshape(len(numbers), -1), ((0, -len(numbers) % 32), (0, 0)))


@pytest.mark.parametrize("rows", ROWS)
def test_nibbles_lie_in_words_of_four_pairs(rows: int) -> None:
    groups = groups_of(NIBBLES, rows)
    numbers = numbers_of(groups)
    packed = pack_groups(groups).numpy().reshape(len(numbers) // 16, -1, 320)
    words = packed[..., :256].copy().view("<u2").reshape(*packed.shape[:2], 4, 16, 2)
    for k in range(GROUP):
        pair, half = divmod(k % 8, 2)
        found = words[:, :, k // 8, :, half] >> 4 * pair & 15  # [blocks, groups, 16]
        np.testing.assert_array_equal(found.transpose(0, 2, 1).reshape(len(numbers), -1), numbers[:, k::GROUP])


@pytest.mark.parametrize("rows", ROWS)
def test_bytes_lie_in_the_order_in_which_masked_nibbles_come(rows: int) -> None:
    groups = groups_of(BYTES, rows)
    numbers = numbers_of(groups)
    packed = pack_groups(groups).numpy().reshape(len(numbers) // 16, -1, 544)
    quads = packed[..., :512].view(np.int8).reshape(*packed.shape[:2], 8, 16, 4)
    for place, k in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        for octet in range(4):
            found = quads[:, :, 2 * octet + place // 4, :, place % 4]
            expected = numbers[:, 8 * octet + k :: GROUP]
            np.testing.assert_array_equal(found.transpose(0, 2, 1).reshape(len(numbers), -1), expected)


@pytest.mark.parametrize("kind", [NIBBLES, BYTES])
def test_scales_and_minima_follow_the_numbers_of_their_group(kind: int) -> None:
    groups = groups_of(kind, 48)
    packed = pack_groups(groups).numpy().reshape(4, COLUMNS // GROUP, -1)
    parts = [groups.scales] if groups.minima is None else [groups.scales, groups.minima]
    for index, part in enumerate(reversed(parts)):
        end = packed.shape[2] - 32 * index
        found = packed[..., end - 32 : end].copy().view(np.float16)
        np.testing.assert_array_equal(found.transpose(0, 2, 1).reshape(64, -1)[:48], part.numpy())


@pytest.mark.parametrize(("kind", "steps"), [(NIBBLES, 15), (BYTES, 254)])
def test_what_is_rounded_is_off_by_half_a_step_at_most(kind: int, steps: int) -> None:
    weight = torch.linspace(-1, 1, 3 * COLUMNS).reshape(3, COLUMNS).roll(7)
    spread = weight.unflatten(1, (-1, GROUP)).aminmax(dim=2)
    widest = (spread.max - spread.min) if kind == NIBBLES else 2 * torch.maximum(spread.max, -spread.min)
    error = (widen(quantise(weight, kind)) - weight).abs().unflatten(1, (-1, GROUP)).amax(dim=2)
    assert (error <= widest / steps * 0.51 + 1e-3).all()
