"""The embedded default through the core: greedy tokens and their log-probabilities are those of transformers.

Twenty prompts × 64 tokens. CI runs nine corners of the grid, in which any two settings meet, with some prompts in each
and every prompt in one; `make parity` runs every prompt in every corner.
"""

import os
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from sessile.text.load import load_tokenizer
from tests.parity.core_driver import Core, Twin, check_prompts, check_sessions
from tests.parity.smollm2 import load_twin

pytestmark = pytest.mark.long

NEW_TOKENS, TOP = 64, 4
TURN_TOKENS = (20, 1, 43)
STORY = "The harbour had been quiet since the last ferry left, and the old keeper wrote one line a day in his book. "
TEXTS = [
    "Paris is the capital of", "1, 2, 3, 4, 5,", "Once upon a time", "def fibonacci(n):\n", "Water boils at",
    "Dear Sir or Madam,\n\n", "Blue, red and yellow are", "In 1969, people first", "Q: Why is the sky blue?\nA:",
    "To make a cup of tea, first", "Hot is the opposite of", "SELECT name FROM users WHERE", "My favourite season is",
    "Photosynthesis is the process by which", "Roses are red,\nviolets are blue,\n", "Two and two make",
    STORY, "Again: " + STORY * 3, "Listen. " + STORY * 12, "Behold! " + STORY * 24,
]  # fmt: skip


class Corner(NamedTuple):
    """One corner of the grid: chunk size, side by side or alone, with or without prefix hits, turns or one prompt."""

    chunk_tokens: int
    mixed: bool
    hit: bool
    turns: bool

    def __str__(self) -> str:
        sides = "side by side" if self.mixed else "alone"
        return f"chunk {self.chunk_tokens}, {sides}{', hit' if self.hit else ''}{', in turns' if self.turns else ''}"


def fifth(first: int) -> slice:
    """Every fifth prompt: four short ones, or three and a long one."""
    return slice(first, None, 5)


def only(index: int) -> slice:
    """One prompt."""
    return slice(index, index + 1)


PAIRWISE = {
    1: [
        (Corner(7, True, False, True), fifth(3)),
        (Corner(64, True, True, False), fifth(0)),
        (Corner(512, False, True, True), only(17)),
    ],
    16: [
        (Corner(7, False, True, False), only(8)),
        (Corner(64, True, False, True), fifth(1)),
        (Corner(512, True, True, True), fifth(2)),
    ],
    256: [
        (Corner(7, True, True, True), fifth(3)),
        (Corner(64, False, False, True), only(5)),
        (Corner(512, True, False, False), fifth(4)),
    ],
}
"""By page size: corners, and which prompts CI runs there. Any two values of any two settings meet in one of them."""
WHOLE = [Corner(*corner) for corner in product((7, 64, 512), (True, False), (True, False), (True, False))]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("default")
    prompts = [tokenizer.encode(text) for text in TEXTS]
    assert len({prompt[0] for prompt in prompts}) == 20, "none may find a page of another in the tree"
    return prompts


@pytest.fixture(scope="module")
def twin() -> Twin:
    model = load_twin()

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].float()

    return Twin(logits)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a corner and page size, so that the whole grid shows how far it is."""
    if "corner" not in metafunc.fixturenames:
        return
    some = PAIRWISE
    if metafunc.config.getoption("--whole-grid"):
        some = {page_size: [(corner, slice(None)) for corner in WHOLE] for page_size in PAIRWISE}
    cases = [(page_size, corner, which) for page_size, corners in some.items() for corner, which in corners]
    names = [f"page {page_size}, {corner}" for page_size, corner, _ in cases]
    metafunc.parametrize(("device", "corner", "which"), cases, ids=names, indirect=["device"], scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    options = DeviceOptions(kv_memory="400M", threads=int(os.environ["OMP_NUM_THREADS"]))
    device = open_device(
        ModelOptions(dtype="float32"), options, page_size=request.param,
        context_tokens=1024, rows_max=20, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


def in_turns(prompt: list[int]) -> list[list[int]]:
    """A prompt as the inputs of three turns; the first has at least two tokens, the others may have none."""
    third = max(2, len(prompt) // 3)
    return [prompt[:third], prompt[third : 2 * third], prompt[2 * third :]]


def check(device: Any, twin: Twin, corner: Corner, prompts: list[list[int]]) -> None:
    for group in [prompts] if corner.mixed else [[prompt] for prompt in prompts]:
        core = Core(device, chunk_tokens=corner.chunk_tokens)
        if corner.turns:
            check_sessions(core, twin, list(map(in_turns, group)), TURN_TOKENS, hit=corner.hit, top=TOP)
        else:
            check_prompts(core, twin, group, NEW_TOKENS, hit=corner.hit, top=TOP)


def test_smollm2_gives_the_tokens_and_logprobs_of_transformers(
    device: Any, twin: Twin, prompts: list[list[int]], corner: Corner, which: slice
) -> None:
    check(device, twin, corner, prompts[which])


def test_ci_runs_every_prompt_and_any_two_settings_together() -> None:
    some = [(page_size, *corner) for page_size, corners in PAIRWISE.items() for corner, _ in corners]
    every = [(page_size, *corner) for page_size in PAIRWISE for corner in WHOLE]
    for one in range(5):
        for other in range(one):
            assert {(c[one], c[other]) for c in some} == {(c[one], c[other]) for c in every}
    run = [index for corners in PAIRWISE.values() for _, which in corners for index in range(20)[which]]
    assert sorted(set(run)) == list(range(20))
