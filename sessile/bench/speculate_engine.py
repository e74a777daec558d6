"""The engine of `sessile bench speculate`: in process, with a shelf of corpora, and requests that say what they allow.

All requests run on one engine, those without speculation too: for them it plans no late part and asks no drafter, so
its steps overlap as in an engine that has none.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sessile.contract.messages import Batch, Done, Sampling, Submit, pack_tokens, unpack_tokens
from sessile.contract.plan import Ints
from sessile.core.limits import SchedulerOptions
from sessile.device.config import DeviceOptions
from sessile.device.factory import chosen_kind, open_device
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.shelf import OPERATOR, Shelf
from sessile.engine.build import Device, DeviceRequest, open_engine
from sessile.engine.clock import MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import OwnedDrafter, StepFacts, StepTable, lookup_drafter
from sessile.engine.inbox import LocalInbox
from sessile.engine.outbox import LocalOutbox
from sessile.model.options import ModelOptions
from sessile.text.tokenizer import Tokenizer

TOP_IDS = 8
"""Tokens among which the two of a divergence are sought."""


@dataclass(frozen=True)
class Arm:
    """One way to run the same requests. corpora: ids that drafts are looked up in, beside the sequence itself."""

    name: str
    speculate: bool
    corpora: tuple[str, ...] = ()


@dataclass
class Run:
    """What some requests came to that were sent at once. outputs: of each, in their order."""

    outputs: list[list[int]]
    dones: list[Done]
    wall_s: float
    processor_s: float

    @property
    def tokens(self) -> int:
        """Of all outputs."""
        return sum(map(len, self.outputs))

    @property
    def accepted(self) -> int:
        """Tokens that took no step of their own."""
        return sum(done.drafts_accepted for done in self.dones)

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.wall_s


class SpeculatingEngine:
    """A model in an engine that may draft. Owns the device until `close`."""

    def __init__(
        self, model: ModelOptions, tokenizer: Tokenizer, *, context_tokens: int, rows_max: int, drafts_max: int
    ) -> None:
        """Raises StartupError for a model that cannot be served."""
        self.step_ms: StepTable = ()
        self.shelf = Shelf()
        clock, device = MonotonicClock(), DeviceOptions()

        def open_for(request: DeviceRequest) -> Device:
            return open_device(
                model, device, page_size=request.page_size, context_tokens=request.context_tokens,
                rows_max=request.rows_max, drafts_max=request.drafts_max, progress=lambda stage, share: None,
            )  # fmt: skip

        def make_drafter(shelf: Shelf, facts: StepFacts) -> OwnedDrafter:
            self.shelf, self.step_ms = shelf, facts.step_ms
            return lookup_drafter(shelf, facts)

        self._engine = open_engine(
            SchedulerOptions(context_tokens=context_tokens, rows_max=rows_max),
            EngineOptions(speculate="on", drafts_max=drafts_max),
            open_for, tokenizer.facts, on_cpu=chosen_kind(device) == "cpu", clock=clock,
            make_drafter=make_drafter,
        )  # fmt: skip
        self.ready = self._engine.ready
        self._inbox, self._outbox = LocalInbox(), LocalOutbox()
        self._loop = self._engine.loop(self._inbox, self._outbox, clock)
        self._keys = itertools.count(1)

    def close(self) -> None:
        """Give the device back."""
        self._engine.close()

    def put(self, corpus_id: str, documents: Sequence[Ints]) -> None:
        """Let a corpus stand on the shelf, in place of one of the same name if there is one."""
        self.shelf.put(OPERATOR, corpus_id, CorpusIndex.build(documents))

    def run(
        self, arm: Arm, prompts: Sequence[Sequence[int]], lengths: Sequence[int], stop: tuple[bytes, ...] = ()
    ) -> Run:
        """Send all at once, greedy, each for at most so many tokens, and turn the loop until the last one has ended."""
        outputs: dict[int, list[int]] = {}
        dones: dict[int, Done] = {}
        started_s = time.perf_counter(), time.process_time()
        for prompt, length in zip(prompts, lengths, strict=True):
            key = next(self._keys)
            outputs[key] = []
            sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=length, stop=stop)
            self._inbox.put(self._submit(key, arm, prompt, sampling))
        while len(dones) < len(outputs):
            for batch in self._turn():
                for key, tokens in _deltas(batch):
                    outputs[key] += tokens
                dones |= {done.key: done for done in batch.done}
        wall_s, processor_s = time.perf_counter() - started_s[0], time.process_time() - started_s[1]
        for done in dones.values():
            assert done.reason in ("stop", "length"), f"a request of the bench ended with {done.reason}: {done.message}"
        return Run(list(outputs.values()), [dones[key] for key in outputs], wall_s, processor_s)

    def margin(self, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float:
        """Difference of the log-probabilities of the tokens with which two outputs part; infinite if not both are
        among the TOP_IDS likeliest, or if one just ends."""
        common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if common is None:
            return float("inf")
        context = [*prompt, *one[:common]]
        key = next(self._keys)
        self._inbox.put(
            Submit(
                key=key, tokens=pack_tokens(context), sampling=Sampling(seed=0, temperature=0.0, max_new_tokens=1),
                logprobs=TOP_IDS, speculate=False,
            )
        )  # fmt: skip
        likely: dict[int, float] = {}
        is_done = False
        while not is_done:
            for batch in self._turn():
                for detail in batch.details:
                    ids, logprobs = np.frombuffer(detail.top_ids, "<i4"), np.frombuffer(detail.top_logprobs, "<f4")
                    likely |= dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
                is_done = is_done or bool(batch.done)
        if one[common] not in likely or other[common] not in likely:
            return float("inf")
        return abs(likely[one[common]] - likely[other[common]])

    def _submit(self, key: int, arm: Arm, prompt: Sequence[int], sampling: Sampling) -> Submit:
        return Submit(
            key=key, tokens=pack_tokens(prompt), sampling=sampling, speculate=arm.speculate,
            corpora=arm.corpora if arm.speculate else None,
        )  # fmt: skip

    def _turn(self) -> list[Batch]:
        self._loop.turn()
        return self._outbox.take()


def _deltas(batch: Batch) -> list[tuple[int, list[int]]]:
    """(request, its new tokens) of a batch."""
    keys = memoryview(batch.delta_keys).cast("q").tolist()
    ends = np.cumsum(unpack_tokens(batch.delta_counts))
    pieces = np.split(unpack_tokens(batch.delta_tokens), ends[:-1]) if keys else []
    return [(key, piece.tolist()) for key, piece in zip(keys, pieces, strict=True)]
