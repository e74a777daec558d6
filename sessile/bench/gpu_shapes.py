"""Models of known shape without weights, and an engine in process that runs them: what GPU benchmarks measure."""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sessile.bench.gpu_trace import TracedDevice
from sessile.contract.messages import (
    Batch,
    CloseSession,
    Done,
    Flush,
    OpenSession,
    Reply,
    Sampling,
    Submit,
    pack_tokens,
    unpack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.core.limits import SchedulerOptions
from sessile.device.config import DeviceOptions
from sessile.device.factory import chosen_kind, open_device
from sessile.device.gpu_device import GpuDevice
from sessile.engine.build import Device, DeviceRequest, Engine, open_engine
from sessile.engine.clock import MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import MakeDrafter, lookup_drafter
from sessile.engine.garbage import IdleCollector
from sessile.engine.inbox import LocalInbox
from sessile.engine.outbox import LocalOutbox
from sessile.model.options import ModelOptions

_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "8B": _COMMON
    | {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
        "rope_theta": 500000.0, "max_position_embeddings": 131072,
    },
    "1.5B": _COMMON
    | {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "rope_theta": 1000000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""config.json of the shapes that docs/BENCHMARKS.md names: Llama-3.1-8B and Qwen2.5-1.5B (with a longer context)."""

NOISE_TEMPERATURE = 10_000.0
"""So hot that a request's seed decides what it says, whatever the model: hardly ever a near tie that steps of another
shape decide otherwise, and no token twice soon."""


@dataclass
class Turns:
    """What a run of the loop did: when it began and each turn ended (ns), its new tokens, and all batches, with times.

    What is drawn from batches is so after the run: while it runs, nobody waits for this, and it would be taken for work
    of the engine's.
    """

    begun_ns: int = 0
    ends_ns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: dict[int, Done] = field(default_factory=dict)
    batches: list[tuple[int, Batch]] = field(default_factory=list)

    @cached_property
    def first_ns(self) -> dict[int, int]:
        """When each request began to answer."""
        first_ns: dict[int, int] = {}
        for sent_ns, batch in self.batches:
            for key in memoryview(batch.delta_keys).cast("q"):
                first_ns.setdefault(key, sent_ns)
        return first_ns

    def outputs(self) -> dict[int, list[int]]:
        """The tokens of each request."""
        outputs: dict[int, list[int]] = {}
        for _, batch in self.batches:
            ends = np.cumsum(unpack_tokens(batch.delta_counts)).tolist()
            tokens = unpack_tokens(batch.delta_tokens).tolist()
            keys = memoryview(batch.delta_keys).cast("q").tolist()
            for key, begin, end in zip(keys, [0, *ends], ends, strict=False):
                outputs.setdefault(key, []).extend(tokens[begin:end])
        return outputs


class ShapeEngine:
    """An engine in process on seeded random weights of a shape; prompts are random token ids, all different."""

    def __init__(
        self, shape: str, folder: Path, scheduler: SchedulerOptions, options: EngineOptions, *, traced: bool = False,
        make_drafter: MakeDrafter = lookup_drafter, quantize: str = "none",
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        model = ModelOptions(model=str(folder), load_format="dummy", quantize=quantize)
        started_ns = time.monotonic_ns()
        self.engine = self._open(model, scheduler, options, make_drafter)
        self.start_s = (time.monotonic_ns() - started_ns) / 1e9
        while self.engine.device.prepare():
            pass  # As an idle server does before its first requests.
        self.trace: TracedDevice | None = None
        if traced:
            assert isinstance(self.engine.device, GpuDevice), "only a GPU's steps are traced"
            self.engine.device = self.trace = TracedDevice(self.engine.device)
        self.vocab_size = self.engine.device.facts.vocab_size
        self._inbox, self._outbox = LocalInbox(), LocalOutbox()
        # As in an engine process: garbage is collected while nothing runs.
        self._collector = IdleCollector()
        self._collector.take_over()
        self._loop = self.engine.loop(self._inbox, self._outbox, MonotonicClock(), self._collector)
        self._numbers = itertools.count(1)
        self._random = np.random.default_rng(0)

    def prompt(self, tokens: int) -> np.ndarray:
        """Random token ids int32[tokens]."""
        return self._random.integers(10, self.vocab_size, tokens).astype(np.int32)

    def submit(self, prompt: np.ndarray, new_tokens: int, session: str | None = None) -> int:
        """Hand a greedy request to the engine; its key."""
        sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
        return self.send(prompt, sampling, session=session)

    def send(
        self, prompt: np.ndarray, sampling: Sampling, *, session: str | None = None,
        corpora: tuple[str, ...] | None = None,
    ) -> int:  # fmt: skip
        """Hand a request to the engine, which may draft for it only if corpora are named; its key."""
        key = next(self._numbers)
        self._inbox.put(
            Submit(
                key=key, tokens=pack_tokens(prompt), sampling=sampling, session=session, corpora=corpora,
                speculate=corpora is not None,
            )
        )  # fmt: skip
        return key

    def open_session(self, session: str) -> None:
        """Open a streaming session."""
        self._inbox.put(OpenSession(op=next(self._numbers), session=session))

    def close_session(self, session: str) -> None:
        """Close it."""
        self._inbox.put(CloseSession(next(self._numbers), session))

    def flush(self) -> None:
        """Drop all KV, of prefixes and of sessions, which keep their tokens; nothing is running."""
        op = next(self._numbers)
        self._inbox.put(Flush(op))
        replies: list[Reply] = []
        while not any(reply.op == op for reply in replies):
            self._loop.turn()
            replies += [reply for batch in self._outbox.take() for reply in batch.replies]
        assert all(reply.error is None for reply in replies), f"the engine did not flush: {replies}"

    def run(
        self, requests: int, on_done: Callable[[int], None] = lambda key: None,
        at_turn: Mapping[int, Callable[[], None]] = MappingProxyType({}),
    ) -> Turns:  # fmt: skip
        """Turn the loop until so many requests have ended. on_done, and at_turn before that turn, may submit more."""
        turns = Turns(begun_ns=time.perf_counter_ns())
        while len(turns.done) < requests:
            if (act := at_turn.get(len(turns.ends_ns))) is not None:
                act()
            self._loop.turn()
            now_ns = time.perf_counter_ns()
            count = 0
            for batch in self._outbox.take():
                count += len(batch.delta_tokens) // 4
                turns.batches.append((now_ns, batch))
                for done in batch.done:
                    ended = f"request {done.key} ended with {done.reason}: {done.message}"
                    assert done.reason in ("length", "stop"), ended
                    turns.done[done.key] = done
                    on_done(done.key)
            turns.ends_ns.append(now_ns)
            turns.tokens.append(count)
        return turns

    def close(self) -> None:
        """Give the device back, and the collector."""
        self._collector.release()
        self.engine.close()

    def _open(
        self, model: ModelOptions, scheduler: SchedulerOptions, options: EngineOptions, make_drafter: MakeDrafter
    ) -> Engine:
        device = DeviceOptions()

        def open_for(request: DeviceRequest) -> Device:
            return open_device(
                model, device, page_size=request.page_size, context_tokens=request.context_tokens,
                rows_max=request.rows_max, drafts_max=request.drafts_max, progress=lambda stage, share: None,
            )  # fmt: skip

        def describe(*, vocab_size: int, context_tokens: int) -> ModelFacts:
            return ModelFacts(vocab_size=vocab_size, context_tokens=context_tokens, eos_ids=())

        return open_engine(
            scheduler, options, open_for, describe, on_cpu=chosen_kind(device) == "cpu", clock=MonotonicClock(),
            make_drafter=make_drafter,
        )  # fmt: skip
