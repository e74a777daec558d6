"""Plans and results on their way: memory that is used again is not used again too soon, and no step gets another's."""

import numpy as np
import pytest
import torch

from sessile.device.exchange import Crossing, Exchange
from sessile.kernels.triton_mailbox import PROGRAMS, SLOTS, Mailbox, fetch_plan, leave_results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def words(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def exchange_of(plan_words: int, left: torch.Tensor) -> Exchange:
    return Exchange(plan_words, left.to(torch.int32))


def step(exchange: Exchange, plan: np.ndarray, left: int) -> Crossing:
    """A whole step, which leaves the first words of what the exchange looks at."""
    crossing = exchange.send(plan)
    exchange.fetch()
    exchange.leave(left)
    crossing.close(left)
    return crossing


@pytest.mark.parametrize("size", [1, 1023, 1024, PROGRAMS * 1024, PROGRAMS * 1024 + 1, 20_000])
def test_a_plan_of_any_size_arrives_at_the_start_of_the_target(size: int) -> None:
    exchange = exchange_of(20_000, torch.zeros(4, device=DEVICE))
    for turn in range(SLOTS + 1):
        plan = np.arange(turn, turn + size, dtype=np.int32)
        step(exchange, plan, 1)
        assert (exchange.target[:size].cpu().numpy() == plan).all()


@pytest.mark.parametrize("size", [1, 1024, 1025, 5000])
def test_results_of_any_size_come_back(size: int) -> None:
    exchange = exchange_of(4, torch.arange(5000, device=DEVICE))
    for _ in range(SLOTS + 1):
        assert (step(exchange, words(1), size).take() == np.arange(size)).all()


def test_what_was_taken_stays_as_it_was_when_the_memory_is_used_again() -> None:
    left = torch.arange(8, dtype=torch.int32, device=DEVICE)
    exchange = exchange_of(4, left)
    taken = step(exchange, words(1), 8).take()
    left += 100
    for _ in range(SLOTS):
        assert step(exchange, words(1), 3).take().tolist() == [100, 101, 102]
    assert taken.tolist() == list(range(8))


def test_steps_on_their_way_share_no_memory_and_more_of_them_than_there_is_room_for_wait() -> None:
    left = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    exchange = exchange_of(4, left)
    crossings = []
    for _ in range(3 * SLOTS):
        crossings.append(step(exchange, words(1), 4))
        left += 1
    assert [crossing.take().tolist() for crossing in reversed(crossings)] == [
        [number] * 4 for number in reversed(range(3 * SLOTS))
    ]


def test_a_step_that_leaves_nothing_can_be_waited_for() -> None:
    exchange = exchange_of(4, torch.zeros(4, device=DEVICE))
    crossing = exchange.send(words(1))
    exchange.fetch()
    crossing.close(0)
    assert crossing.take().size == 0


@pytest.mark.parametrize("is_fetched", [False, True])
def test_the_plan_after_one_that_failed_is_found(is_fetched: bool) -> None:
    exchange = exchange_of(4, torch.zeros(4, device=DEVICE))
    for number in range(2 * SLOTS):
        exchange.send(words(-1))
        if is_fetched:
            exchange.fetch()
        exchange.lose_track()
        step(exchange, words(number), 1)
        assert exchange.target[0].item() == number


def test_a_step_is_not_waited_for_before_it_is_queued_as_a_whole() -> None:
    crossing = exchange_of(4, torch.zeros(4, device=DEVICE)).send(words(1))
    with pytest.raises(AssertionError, match="queued as a whole"):
        crossing.take()
    crossing.close(0)
    with pytest.raises(AssertionError, match="closed once"):
        crossing.close(0)


def test_slots_are_used_in_turn() -> None:
    mailbox = Mailbox.empty(4, 4, DEVICE)
    mailbox.plans[:, 0] = torch.arange(SLOTS)
    mailbox.lengths[:] = 1
    target, left = torch.zeros(4, dtype=torch.int32, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for turn in range(2 * SLOTS):
        fetch_plan(mailbox, target)
        assert target[0].item() == turn % SLOTS
        left.fill_(turn)
        leave_results(mailbox, left, 2)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert mailbox.results[turn % SLOTS].tolist() == [turn, turn, 0, 0]
        mailbox.results.zero_()
