"""The core on a real device, over the whole grid: tokens and logits are those of transformers.

Page sizes × chunk sizes × alone or mixed × with or without a prefix hit × one prompt or a session of turns, for every
family. Lengths are chosen so that prompts, turns and outputs cross pages and chunks of every size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from tests.parity.core_driver import Core, Twin, check_prompts, check_sessions
from tests.parity.tiny_models import CONTEXT, MODELS, VOCAB, Tiny, make_tiny

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
def twin(tiny: Tiny) -> Twin:
    return Twin(tiny.logits)


@pytest.fixture(scope="module", params=[1, 16, 256])
def device(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Any]:
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="12M", threads=1),
        page_size=request.param, context_tokens=CONTEXT, rows_max=4, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


grid = pytest.mark.parametrize("chunk_tokens", [7, 64, 512])
company = pytest.mark.parametrize("together", [1, 3], ids=["alone", "mixed"])
hits = pytest.mark.parametrize("hit", [False, True], ids=["cold", "hit"])


@grid
@company
@hits
def test_prompts_give_the_tokens_and_logits_of_transformers(
    device: Any, twin: Twin, chunk_tokens: int, together: int, hit: bool
) -> None:
    core = Core(device, chunk_tokens=chunk_tokens)
    check_prompts(core, twin, PROMPTS[chunk_tokens][:together], 4, hit=hit, top=VOCAB)


@grid
@company
@hits
def test_sessions_of_turns_give_the_tokens_and_logits_of_transformers(
    device: Any, twin: Twin, chunk_tokens: int, together: int, hit: bool
) -> None:
    core = Core(device, chunk_tokens=chunk_tokens)
    check_sessions(core, twin, CONVERSATIONS[chunk_tokens][:together], (5, 1, 4), hit=hit, top=VOCAB)


@grid
def test_several_answers_are_those_of_transformers_and_compute_their_prompt_once(
    device: Any, twin: Twin, chunk_tokens: int
) -> None:
    core, prompt = Core(device, chunk_tokens=chunk_tokens), PROMPTS[chunk_tokens][1]
    for key in range(4):
        core.submit(key, prompt, 4, top=VOCAB, group=0)
    core.run()
    for key in range(4):
        twin.assert_followed(core, key, prompt)
    assert sum(core.queries.values()) == len(prompt) - 1 + 4 * 4
    assert [core.done[key].cached_tokens for key in range(4)] == [0] + 3 * [len(prompt) - 1]
