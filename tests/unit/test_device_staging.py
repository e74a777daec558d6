"""Memory that is used again is not used again too soon."""

import numpy as np
import torch

from sessile.device.staging import Exchange


def words(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_plan_arrives_at_the_start_of_the_target() -> None:
    exchange = Exchange(4, torch.zeros(4, dtype=torch.int32))
    exchange.send(words(1, 2, 3))
    exchange.send(words(7, 8))
    assert exchange.target[:2].tolist() == [7, 8]
    exchange.send(words(1, 2, 3, 4))
    assert exchange.target.tolist() == [1, 2, 3, 4]


def test_what_was_taken_stays_as_it_was_when_the_memory_is_used_again() -> None:
    left = torch.arange(8, dtype=torch.int32)
    exchange = Exchange(4, left)
    first = exchange.send(words(1))
    first.fetch(8)
    taken = first.take()
    left += 100
    second = exchange.send(words(1))
    second.fetch(3)
    assert second.take().tolist() == [100, 101, 102]
    assert taken.tolist() == list(range(8))


def test_two_steps_on_their_way_share_no_memory() -> None:
    left = torch.zeros(4, dtype=torch.int32)
    exchange = Exchange(4, left)
    first, second = exchange.send(words(1)), exchange.send(words(2))
    first.fetch(4)
    left += 1
    second.fetch(4)
    assert second.take().tolist() == [1] * 4
    assert first.take().tolist() == [0] * 4


def test_a_step_that_leaves_nothing_can_be_waited_for() -> None:
    crossing = Exchange(4, torch.zeros(4, dtype=torch.int32)).send(words(1))
    crossing.fetch(0)
    assert crossing.take().size == 0
