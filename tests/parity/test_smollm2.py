"""The embedded default, read from its GGUF file, gives the greedy tokens that transformers gives of the same file."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from tests.parity.driver import Driver, Run
from tests.parity.smollm2 import load_twin

pytestmark = pytest.mark.long

NEW_TOKENS = 24
# Token ids of SmolLM2's ChatML turns and of plain text, written out so that this test needs no tokenizer.
CHAT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
CHAT += [198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
PROMPTS = [CHAT, [504, 3575, 282, 4649, 314], list(range(300, 420)), [28, 260, 198, 504] * 60]


@pytest.fixture(scope="module")
def twin() -> PreTrainedModel:
    return load_twin()


@pytest.fixture(scope="module", params=[1, 16, 256])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    device = open_device(
        ModelOptions(dtype="float32"), DeviceOptions(kv_memory="96M", threads=2), page_size=request.param,
        context_tokens=512, rows_max=8, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


@torch.inference_mode()
def follow(twin: PreTrainedModel, run: Run) -> None:
    """Assert that each output token is the twin's most likely one, given the run's own tokens before it."""
    tokens = torch.tensor([run.prompt + run.output])
    logits = twin(tokens).logits[0, len(run.prompt) - 1 : -1].float()
    assert logits.argmax(dim=-1).tolist() == run.output
    chosen = logits.log_softmax(dim=-1).gather(-1, torch.tensor(run.output)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(run.output_logprobs), chosen, atol=1e-3, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [64, 512])
def test_smollm2_in_mixed_steps_gives_the_tokens_and_logprobs_of_transformers(
    device: Any, twin: PreTrainedModel, chunk_tokens: int
) -> None:
    runs = [Run(prompt, NEW_TOKENS, logprobs=0) for prompt in PROMPTS]
    Driver(device, chunk_tokens=chunk_tokens).run_all(runs)
    for run in runs:
        follow(twin, run)
