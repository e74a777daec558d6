"""Sessions under forced preemption, chunking and company, on a real device, say what their histories say when re-sent.

Nothing but tokens is asked for, so that a GPU runs its steps as graphs; the core audits every step in full.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from tests.parity.core_driver import Core
from tests.parity.tiny_models import CONTEXT, VOCAB, make_tiny

SESSIONS, TURNS, NEW_TOKENS = 6, 4, 9


@pytest.fixture(scope="module", params=[1, 16])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tiny = make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="12M", threads=1),
        page_size=request.param, context_tokens=CONTEXT, rows_max=SESSIONS, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


def run_sessions(core: Core, inputs: list[list[list[int]]]) -> list[list[int]]:
    """Run all sessions side by side, turn by turn; the history of each at the end."""
    histories: list[list[int]] = [[] for _ in inputs]
    for index in range(len(inputs)):
        core.open(f"s{index}")
    for turn in range(TURNS):
        keys = [1 + turn * len(inputs) + index for index in range(len(inputs))]
        for index, key in enumerate(keys):
            core.submit(key, inputs[index][turn], NEW_TOKENS, session=f"s{index}")
        core.run()
        for index, key in enumerate(keys):
            histories[index] += inputs[index][turn] + core.output[key]
    return histories


@pytest.mark.parametrize("retract_every", [0, 5])
def test_h26_h66_torn_sessions_say_what_their_histories_say_when_sent_again(
    device: Any, retract_every: int
) -> None:
    dice = np.random.default_rng(3)
    lengths = [[1 + 13 * (turn + index) for turn in range(TURNS)] for index in range(SESSIONS)]
    inputs = [[dice.integers(3, VOCAB, length).tolist() for length in session] for session in lengths]
    torn = Core(device, chunk_tokens=24, retract_every=retract_every)
    histories = run_sessions(torn, inputs)
    calm = Core(device, chunk_tokens=512)
    for key, history in enumerate(histories, 1):
        assert len(history) == sum(len(turn) for turn in inputs[key - 1]) + TURNS * NEW_TOKENS
        calm.submit(key, history[:-NEW_TOKENS], NEW_TOKENS)
    calm.run()
    assert [calm.output[key] for key in range(1, SESSIONS + 1)] == [history[-NEW_TOKENS:] for history in histories]
