"""The core on a real device, over the whole grid: tokens and logits are those of transformers.

Page sizes × chunk sizes × alone or mixed × with or without a prefix hit × one prompt or a session of turns, for every
family. Lengths are chosen so that prompts, turns and outputs cross pages and chunks of every size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.config import ModelOptions
from tests.parity.core_driver import Core
from tests.parity.tiny_models import CONTEXT, MODELS, VOCAB, Tiny, make_tiny

NEW_TOKENS = 4
TURNS = 3
OUTPUTS = (5, 1, 4)
"""Output tokens of each turn."""
_dice = np.random.default_rng(5)


def _line(count: int) -> list[int]:
    return _dice.integers(3, VOCAB, max(1, count)).tolist()


# What is read in small chunks has to cross a page of 256; what is read in chunks of 512 has to be longer than that.
PROMPTS = {
    chunk: [_line(count) for count in counts]
    for chunk, counts in {7: (259, 34, 17), 64: (270, 129, 17), 512: (521, 260, 17)}.items()
}
CONVERSATIONS = {
    chunk: [[_line(count // (1 + index)) for count in counts] for index in range(3)]
    for chunk, counts in {7: (130, 1, 126), 64: (140, 1, 140), 512: (515, 1, 260)}.items()
}
"""Input tokens of each turn of three sessions."""


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def twin(tiny: Tiny) -> "Twin":
    return Twin(tiny)


@pytest.fixture(scope="module", params=[1, 16, 256])
def device(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Any]:
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="12M", threads=1),
        page_size=request.param, context_tokens=CONTEXT, rows_max=4, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


class Twin:
    """What transformers says of a context, computed once for each."""

    def __init__(self, tiny: Tiny) -> None:
        self._tiny = tiny
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """float32[tokens, vocabulary] after each token."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = self._tiny.logits(tokens).log_softmax(dim=-1)
        return self._known[key]

    def assert_followed(self, core: Core, key: int, context: list[int]) -> None:
        """Each output token is the most likely one, and all log-probabilities beside it are within a thousandth."""
        output = core.output[key]
        expected = self.logprobs(context + output)[len(context) - 1 : -1]
        assert output == expected.argmax(dim=-1).tolist()
        assert len(core.tops[key]) == len(output)
        for (ids, logprobs), wanted in zip(core.tops[key], expected, strict=True):
            assert sorted(ids.tolist()) == list(range(VOCAB))
            torch.testing.assert_close(torch.tensor(logprobs), wanted[torch.tensor(ids).long()], atol=1e-3, rtol=0)
        if core.scores[key]:
            scores = self.logprobs(context + output)[: len(context) - 1].gather(-1, torch.tensor(context[1:])[:, None])
            torch.testing.assert_close(torch.tensor(core.scores[key]), scores[:, 0], atol=1e-3, rtol=0)


grid = pytest.mark.parametrize("chunk_tokens", [7, 64, 512])
company = pytest.mark.parametrize("together", [1, 3], ids=["alone", "mixed"])
hits = pytest.mark.parametrize("hit", [False, True], ids=["cold", "hit"])


@grid
@company
@hits
def test_prompts_give_the_tokens_and_logits_of_transformers(
    device: Any, twin: Twin, chunk_tokens: int, together: int, hit: bool
) -> None:
    core, page_size = Core(device, chunk_tokens=chunk_tokens), device.facts.page_size
    prompts = PROMPTS[chunk_tokens][:together]
    if hit:
        for key, prompt in enumerate(prompts):
            core.submit(100 + key, prompt[:-1], 0)
        core.run()
    for key, prompt in enumerate(prompts):
        core.submit(key, prompt, NEW_TOKENS, top=VOCAB, scored=not hit)
    core.run()
    for key, prompt in enumerate(prompts):
        twin.assert_followed(core, key, prompt)
        assert core.done[key].cached_tokens == ((len(prompt) - 2) // page_size * page_size if hit else 0)
        assert hit or len(core.scores[key]) == len(prompt) - 1


@grid
@company
@hits
def test_sessions_of_turns_give_the_tokens_and_logits_of_transformers(
    device: Any, twin: Twin, chunk_tokens: int, together: int, hit: bool
) -> None:
    core, page_size = Core(device, chunk_tokens=chunk_tokens), device.facts.page_size
    conversations = CONVERSATIONS[chunk_tokens][:together]
    histories: list[list[int]] = [[] for _ in conversations]
    for session, conversation in enumerate(conversations):
        core.open(str(session))
        if hit:
            core.submit(100 + session, conversation[0][:-1], 0)
    core.run()
    for turn in range(TURNS):
        keys = [10 * turn + session for session in range(together)]
        for session, key in enumerate(keys):
            core.submit(key, conversations[session][turn], OUTPUTS[turn], session=str(session), top=VOCAB)
        before = sum(core.queries.values())
        core.run()
        for session, key in enumerate(keys):
            done, context = core.done[key], histories[session] + conversations[session][turn]
            twin.assert_followed(core, key, context)
            shared = (len(context) - 2) // page_size * page_size if hit else 0
            assert done.cached_tokens == (len(histories[session]) - 1 if turn else shared)
            assert done.prompt_tokens - done.cached_tokens == done.computed_tokens
            histories[session] = context + core.output[key]
        outputs = sum(core.done[key].completion_tokens - 1 for key in keys)
        computed = sum(core.done[key].computed_tokens for key in keys)
        assert sum(core.queries.values()) - before == computed + outputs
