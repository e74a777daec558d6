"""Greedy tokens and logits equal those of transformers in float32, whatever the page size, chunk size and company."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.kernels.attention import CpuAttentionStep, PagedCache, StepRows
from sessile.model.layers import StepInputs, WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from tests.parity.driver import Driver, Run
from tests.parity.tiny_models import CONTEXT, MODELS, Tiny, make_tiny, prompts

NEW_TOKENS = 12


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[list[int]]:
    return [tiny.greedy(prompt, NEW_TOKENS) for prompt in prompts()]


@pytest.fixture(scope="module", params=[1, 16, 256])
def device(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Any]:
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="24M", threads=2),
        page_size=request.param, context_tokens=CONTEXT, rows_max=8, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


@pytest.mark.parametrize("chunk_tokens", [7, 64, 512])
def test_requests_that_run_alone_give_the_tokens_of_transformers(
    device: Any, expected: list[list[int]], chunk_tokens: int
) -> None:
    driver = Driver(device, chunk_tokens=chunk_tokens)
    for prompt, tokens in zip(prompts(), expected, strict=True):
        run = Run(prompt, NEW_TOKENS)
        driver.run_all([run])
        assert run.output == tokens


@pytest.mark.parametrize("chunk_tokens", [7, 64, 512])
def test_requests_in_mixed_steps_give_the_tokens_of_transformers(
    device: Any, expected: list[list[int]], chunk_tokens: int
) -> None:
    runs = [Run(prompt, NEW_TOKENS) for prompt in prompts()]
    Driver(device, chunk_tokens=chunk_tokens, seed=1).run_all(runs)
    assert [run.output for run in runs] == expected


def test_prompt_logprobs_over_the_whole_vocabulary_are_those_of_transformers(device: Any, tiny: Tiny) -> None:
    prompt = prompts()[4]
    vocab = device.facts.vocab_size
    run = Run(prompt, 1, score_top=vocab)
    Driver(device, chunk_tokens=100).run_all([run])
    logprobs = tiny.logits(prompt).log_softmax(dim=-1)[:-1]
    chosen = logprobs.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(run.scores), chosen, atol=1e-3, rtol=0)
    ranked = torch.tensor(run.score_top_ids)
    assert (ranked.sort(dim=-1).values == torch.arange(vocab)).all()
    assert (logprobs.gather(-1, ranked).diff(dim=-1) <= 1e-3).all()


def test_raw_logits_are_within_a_thousandth_of_transformers(tiny: Tiny) -> None:
    form = WeightFormat(torch.float32, torch.device("cpu"))
    decoder = load_model(ModelOptions(model=str(tiny.folder)), form, lambda stage, done: None).decoder
    config, prompt, page_size = decoder.config, prompts()[5], 16
    pages = len(prompt) // page_size + 1
    pool = torch.zeros(2, config.layers, pages * page_size, config.kv_heads, config.head_dim)
    table = torch.arange(pages, dtype=torch.int32).flip(0)[None]
    cache = PagedCache(pool[0], pool[1], table, page_size)
    positions = torch.arange(len(prompt))
    slots = table[0, positions // page_size].long() * page_size + positions % page_size
    hidden = []
    with torch.inference_mode():
        for part in positions.split(200):
            rows = StepRows(np.zeros(1, np.int32), part[:1].numpy().astype(np.int32), np.array([len(part)], np.int32))
            step = CpuAttentionStep(cache, rows, slots[part])
            hidden.append(decoder(StepInputs(torch.tensor(prompt)[part], part, step)))
        logits = decoder.logits(torch.cat(hidden))
    torch.testing.assert_close(logits, tiny.logits(prompt), atol=1e-3, rtol=0)
