"""The sampler draws from the distribution it should, reproducibly, and independently of everything but its seed."""

import pytest
import torch

from sessile.kernels import sampling
from sessile.kernels.sampling import CANDIDATES, gumbel_noise, sample, top_candidates


def draw(
    logits: torch.Tensor, count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, seed: int = 11,
) -> torch.Tensor:  # fmt: skip
    """Tokens for output indices 0 … count - 1 from the same logits [vocab]."""
    return sample(
        logits.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_k),
        torch.full((count,), top_p), torch.full((count,), min_p), torch.full((count,), seed), torch.arange(count),
    )  # fmt: skip


def shares(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=vocab) / len(tokens)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_shares_are_the_softmax(temperature: float) -> None:
    drawn = shares(draw(LOGITS, 40_000, temperature=temperature), 6)
    torch.testing.assert_close(drawn, (LOGITS / temperature).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2]),  # 2 and 3 tie: the lower id stays
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_k": 2, "top_p": 0.72}, [0]),  # top-p is a share of what top-k left: 0.73 is enough
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        ({"min_p": 0.3}, [0, 1]),
        ({"top_k": 1}, [0]),
        ({"min_p": 1.0}, [0]),
        ({"top_p": 1e-6}, [0]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_filters_keep_what_they_say_and_renormalise(filters: dict[str, float], kept: list[int]) -> None:
    drawn = shares(draw(LOGITS, 40_000, **filters), 6)
    expected = torch.zeros(6)
    expected[kept] = LOGITS[kept].softmax(0)
    torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0)
    assert drawn.nonzero().flatten().tolist() == kept


def test_filters_that_reach_beyond_the_candidates_look_at_the_whole_vocabulary() -> None:
    vocab = 3 * CANDIDATES[-1]
    tokens = draw(torch.zeros(vocab), 4000, top_p=0.9)
    assert tokens.max() < 0.9 * vocab + 1
    assert tokens.max() > CANDIDATES[-1]
    free = draw(torch.zeros(vocab), 500)
    assert (draw(torch.zeros(vocab), 500, top_k=vocab, top_p=0.999999) == free).float().mean() > 0.99


def test_temperature_zero_takes_the_most_likely_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 1.0]])
    zeros = torch.zeros(2)
    index = torch.zeros(2, dtype=torch.int64)
    assert sample(logits, zeros, index, zeros + 1, zeros, index, index).tolist() == [1, 0]


def test_a_draw_depends_on_seed_and_index_but_not_on_the_batch() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, 200, seed=5)
    alone = [
        int(sample(logits[None], torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1),
                   torch.tensor([5]), torch.tensor([index])))
        for index in range(200)
    ]  # fmt: skip
    assert together.tolist() == alone
    assert (draw(logits, 200, seed=6) != together).any()


def test_a_filtered_row_uses_the_same_noise_as_a_free_one() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3))
    assert (draw(logits, 300, top_k=299) == draw(logits, 300)).float().mean() > 0.98


def test_noise_is_standard_gumbel_and_uncorrelated_between_neighbours() -> None:
    noise = gumbel_noise(torch.arange(64), torch.arange(64), torch.arange(4096))
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - 1.6449) < 0.02
    for left, right in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert abs(float(torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1])) < 0.01


def test_large_and_negative_seeds_give_different_noise() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, -1, -(2**63), 1 << 32])
    noise = gumbel_noise(seeds, torch.zeros(6, dtype=torch.int64), torch.arange(100))
    assert len({tuple(row) for row in noise.tolist()}) == 6


def test_candidates_descend_and_ties_go_by_id() -> None:
    values = torch.tensor([[1.0, -2.0, 1.0, 0.0, -0.5, float("-inf")]])
    tops, ids = top_candidates(values, 6)
    assert ids.tolist() == [[0, 2, 3, 4, 1, 5]]
    assert tops.tolist() == [[1.0, 1.0, 0.0, -0.5, -2.0, float("-inf")]]


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_the_compiled_draw_is_the_one_of_plain_torch(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    logits = torch.randn(400, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    seeds, indices = torch.arange(400) * 977, torch.arange(400)
    compiled = sampling.free_draw(logits, seeds, indices)
    monkeypatch.setattr(sampling, "_compiled", lambda: None)
    assert compiled.tolist() == sampling.free_draw(logits, seeds, indices).tolist()


def test_the_compiled_draw_takes_no_token_that_is_banned() -> None:
    logits = torch.full((50, 40), float("-inf"))
    logits[:, 17] = -3.0
    assert (sampling.free_draw(logits, torch.arange(50), torch.arange(50)) == 17).all()


@pytest.mark.parametrize("vocab", [8192, 20_011])
def test_a_few_candidates_among_many_are_those_of_a_full_sort(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    values = (torch.randn(5, vocab, generator=generator) * 2).round()  # many ties, within and across blocks
    values[2] = float("-inf")
    values[3, ::2] = -0.0
    tops, ids = top_candidates(values + 0.0, 60)
    order = (values + 0.0).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tops, order.values[:, :60])
    assert torch.equal(ids, order.indices[:, :60])
