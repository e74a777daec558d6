"""LLM and AsyncLLM on the simulator's toy device: the real core and loop, every token a byte, no model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sessile import LLM, AsyncLLM
from sessile.contract.messages import EngineReady
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.engine.build import Engine
from sessile.engine.clock import MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.executor import Ticket
from sessile.offline import async_llm, llm
from sessile.offline.driver import Driver
from sessile.sim.toy import ToyDevice
from tests.http.fake_engine import byte_tokenizer

VOCAB_SIZE, CONTEXT_TOKENS, PAGES, ROWS = 256, 512, 400, 8


class _Facts:
    device = "cpu"


class ToyEngineDevice:
    """A device whose steps take `step_s`, and raise `failure` if there is one."""

    facts = _Facts()

    def __init__(self) -> None:
        self.step_s = 0.0
        self.failure: Exception | None = None
        self.closed = 0
        self._toy = ToyDevice(
            pages_total=PAGES, page_size=4, rows_max=ROWS, context_tokens=CONTEXT_TOKENS, drafts_max=0,
            vocab_size=VOCAB_SIZE,
        )  # fmt: skip

    def launch(self, plan: StepPlan) -> Ticket:
        time.sleep(self.step_s)
        if self.failure:
            raise self.failure
        return self._toy.launch(plan)

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self.closed += 1


def toy_engine(device: ToyEngineDevice, **limits: int) -> Engine:
    """An engine on that device, audited after every step."""
    settings = {"page_size": 4, "rows_max": ROWS, "chunk_tokens": 32, "audit_level": 2} | limits
    bounds = Limits(pages_total=PAGES, context_tokens=CONTEXT_TOKENS, **settings)  # type: ignore[arg-type]
    token_bytes = tuple(bytes([byte]) for byte in range(VOCAB_SIZE))
    facts = ModelFacts(VOCAB_SIZE, CONTEXT_TOKENS, eos_ids=(), token_bytes=token_bytes)
    ready = EngineReady(
        model_name="toy", model_path="toy", architecture="toy", dtype="none", device="cpu", vocab_size=VOCAB_SIZE,
        context_tokens=CONTEXT_TOKENS, page_size=4, pages_total=PAGES, rows_max=ROWS, chunk_tokens=32, kv_bytes=0,
        weight_bytes=0, start_s=0.0,
    )  # fmt: skip
    return Engine(Machine(bounds, facts), device, ready, EngineOptions())  # type: ignore[arg-type]


@contextmanager
def toys(**limits: int) -> Iterator[tuple[ToyEngineDevice, Callable[[], LLM], Callable[[], AsyncLLM]]]:
    """A device, and what makes an LLM or an AsyncLLM on it."""
    device = ToyEngineDevice()

    def open_driver(sections: object, tokenizer: object) -> Driver:
        return Driver(toy_engine(device, **limits), MonotonicClock())

    with pytest.MonkeyPatch.context() as patch:
        for module in (llm, async_llm):
            patch.setattr(module, "open_driver", open_driver)
            patch.setattr(module, "load_tokenizer", lambda model: byte_tokenizer())
        yield device, LLM, AsyncLLM
