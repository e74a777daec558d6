"""Drive a real device by the real core, with a step of overlap, and keep what clients would see."""

from collections import defaultdict
from typing import Any

import numpy as np

from sessile.contract.messages import Batch, CloseSession, Done, OpenSession, Sampling, Submit, ToEngine, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine


class Core:
    """A fresh machine over an opened device; greedy requests, end-of-sequence ignored."""

    def __init__(self, device: Any, *, chunk_tokens: int, **limits: Any) -> None:
        facts = device.facts
        self._device = device
        self._machine = Machine(
            Limits(
                pages_total=facts.pages_total, page_size=facts.page_size, rows_max=facts.rows_max,
                context_tokens=facts.context_tokens, chunk_tokens=chunk_tokens, audit_level=2, **limits,
            ),
            ModelFacts(facts.vocab_size, facts.context_tokens, eos_ids=()),
        )  # fmt: skip
        self.output: dict[int, list[int]] = defaultdict(list)
        self.done: dict[int, Done] = {}
        self.queries: dict[int, int] = defaultdict(int)
        """Query tokens that the device counted, by batch row."""
        self.tops: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
        """(token ids, log-probabilities) of the most likely tokens at each output position."""
        self.scores: dict[int, list[float]] = defaultdict(list)
        """Log-probabilities of the prompt's tokens, from the second one on."""

    def open(self, session: str) -> None:
        self._send(OpenSession(op=0, session=session))

    def close(self, session: str) -> None:
        self._send(CloseSession(0, session))

    def submit(
        self, key: int, prompt: list[int], new_tokens: int, *, session: str | None = None, top: int = -1,
        scored: bool = False,
    ) -> None:  # fmt: skip
        sampling = Sampling(seed=key, temperature=0.0, max_new_tokens=new_tokens)
        self._send(
            Submit(
                key=key, tokens=pack_tokens(prompt), sampling=sampling, session=session, logprobs=top,
                prompt_logprobs_from=0 if scored else -1,
            )
        )  # fmt: skip

    def run(self) -> None:
        """Steps until all requests have ended, the next one always launched while one runs."""
        in_flight = None
        while self._machine.has_work:
            planned = self._machine.plan()
            plan = self._machine.complete(planned) if planned else None
            ticket = self._device.launch(plan) if plan else None
            if in_flight is not None:
                self._settle(in_flight.result())
            in_flight = ticket
        assert in_flight is None, "a step was in flight that nobody waited for"

    def _settle(self, result: Any) -> None:
        for row, count in zip(result.rows.tolist(), result.query_counts.tolist(), strict=True):
            self.queries[row] += count
        self._machine.settle(result)
        batch = self._machine.take_effects()
        if batch is not None:
            self._gather(batch)

    def _gather(self, batch: Batch) -> None:
        tokens, first = np.frombuffer(batch.delta_tokens, "<i4").tolist(), 0
        counts = np.frombuffer(batch.delta_counts, "<i4").tolist()
        for key, count in zip(np.frombuffer(batch.delta_keys, "<i8").tolist(), counts, strict=True):
            self.output[key] += tokens[first : first + count]
            first += count
        for detail in batch.details:
            shape = (len(detail.logprobs) // 4, -1)
            ids = np.frombuffer(detail.top_ids, "<i4").reshape(shape)
            logprobs = np.frombuffer(detail.top_logprobs, "<f4").reshape(shape)
            self.tops[detail.key] += zip(ids, logprobs, strict=True)
        for score in batch.scores:
            assert score.start == 1 + len(self.scores[score.key])
            self.scores[score.key] += np.frombuffer(score.logprobs, "<f4").tolist()
        for done in batch.done:
            assert done.reason == "length", done.message
            self.done[done.key] = done

    def _send(self, message: ToEngine) -> None:
        self._machine.receive(message)
        batch = self._machine.take_effects()
        assert batch is None or not (batch.done or any(reply.error for reply in batch.replies)), "refused"
