"""Drive a real device by the real core, with a step of overlap, and compare what clients would see with a twin.

The two ways of the parity grid, as plain prompts and as sessions of turns, are `check_prompts` and `check_sessions`.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sessile.contract.messages import (
    Batch,
    Branch,
    CloseSession,
    Done,
    ForkSession,
    OpenSession,
    RewindSession,
    Sampling,
    Submit,
    ToEngine,
    pack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine


class Core:
    """A fresh machine over an opened device; greedy requests, end-of-sequence ignored."""

    def __init__(self, device: Any, *, chunk_tokens: int, **limits: Any) -> None:
        facts = device.facts
        self.page_size = facts.page_size
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

    def open(self, session: str, *, branching: bool = False) -> None:
        self._send(OpenSession(op=0, session=session, branching=branching))

    def fork(self, session: str, child: str, tokens: int) -> None:
        self._send(ForkSession(op=0, session=session, child=child, at_tokens=tokens))

    def rewind(self, session: str, tokens: int) -> None:
        self._send(RewindSession(op=0, session=session, to_tokens=tokens))

    def demote(self, session: str) -> None:
        """Take a session's KV away; its tokens stay."""
        self._machine.demote("", session)

    def close(self, session: str) -> None:
        self._send(CloseSession(0, session))

    def submit(
        self, key: int, prompt: list[int], new_tokens: int, *, session: str | None = None, top: int = -1,
        scored: bool = False, rid: str = "", branch: Branch | None = None, group: int = -1,
    ) -> None:  # fmt: skip
        sampling = Sampling(seed=key, temperature=0.0, max_new_tokens=new_tokens)
        self._send(
            Submit(
                key=key, tokens=pack_tokens(prompt), sampling=sampling, session=session, logprobs=top,
                prompt_logprobs_from=0 if scored else -1, rid=rid, branch=branch, group=group,
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
            self._gather(self._machine.take_effects())
            in_flight = ticket
        assert in_flight is None, "a step was in flight that nobody waited for"

    def _settle(self, result: Any) -> None:
        for row, count in zip(result.rows.tolist(), result.query_counts.tolist(), strict=True):
            self.queries[row] += count
        self._machine.settle(result)

    def _gather(self, batch: Batch | None) -> None:
        if batch is None:
            return
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


class Twin:
    """What transformers says of a context; each context and output is computed once."""

    def __init__(self, logits: Callable[[list[int]], torch.Tensor]) -> None:
        self._logits = logits
        self._known: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def says(self, context: list[int], output: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the context's tokens, f32[context - 1], and at each output, f32[outputs, vocabulary]."""
        key = (len(context), (*context, *output))
        if key not in self._known:
            logprobs = self._logits(context + output)[:-1].log_softmax(dim=-1)
            scores = logprobs[: len(context) - 1].gather(-1, torch.tensor(context[1:], dtype=torch.long)[:, None])[:, 0]
            self._known[key] = scores, logprobs[len(context) - 1 :].clone()
        return self._known[key]

    def assert_followed(self, core: Core, key: int, context: list[int]) -> None:
        """Each output token is the most likely one; all log-probabilities that were told are within a thousandth."""
        output = core.output[key]
        scores, expected = self.says(context, output)
        assert output == expected.argmax(dim=-1).tolist()
        assert len(core.tops[key]) == len(output) == core.done[key].completion_tokens
        for (ids, logprobs), wanted in zip(core.tops[key], expected, strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), wanted[torch.tensor(ids).long()], atol=1e-3, rtol=0)
        if core.scores[key]:
            torch.testing.assert_close(torch.tensor(core.scores[key]), scores, atol=1e-3, rtol=0)


def check_prompts(core: Core, twin: Twin, prompts: list[list[int]], new_tokens: int, *, hit: bool, top: int) -> None:
    """Run prompts side by side, after a request that left their prefixes in the tree (hit), else scored throughout."""
    if hit:
        _leave_prefixes(core, prompts)
    for key, prompt in enumerate(prompts):
        core.submit(key, prompt, new_tokens, top=top, scored=not hit)
    core.run()
    for key, prompt in enumerate(prompts):
        twin.assert_followed(core, key, prompt)
        assert core.done[key].cached_tokens == (_left(core, prompt) if hit else 0)
        assert hit or len(core.scores[key]) == len(prompt) - 1


def check_sessions(
    core: Core, twin: Twin, conversations: list[list[list[int]]], outputs: tuple[int, ...], *, hit: bool, top: int
) -> None:
    """Run conversations side by side, turn by turn. Every warm turn reuses its history but the last token, and what
    the device counted as computed is the rest."""
    if hit:
        _leave_prefixes(core, [conversation[0] for conversation in conversations])
    for session in range(len(conversations)):
        core.open(str(session))
    histories: list[list[int]] = [[] for _ in conversations]
    for turn, new_tokens in enumerate(outputs):
        keys = [1000 * (1 + turn) + session for session in range(len(conversations))]
        for session, key in enumerate(keys):
            core.submit(key, conversations[session][turn], new_tokens, session=str(session), top=top)
        before = sum(core.queries.values())
        core.run()
        for session, key in enumerate(keys):
            done, context = core.done[key], histories[session] + conversations[session][turn]
            twin.assert_followed(core, key, context)
            assert done.cached_tokens == (len(histories[session]) - 1 if turn else _left(core, context) * hit)
            assert done.prompt_tokens - done.cached_tokens == done.computed_tokens
            histories[session] = context + core.output[key]
        counted = sum(core.done[key].computed_tokens + core.done[key].completion_tokens - 1 for key in keys)
        assert sum(core.queries.values()) - before == counted


def _leave_prefixes(core: Core, prompts: list[list[int]]) -> None:
    for index, prompt in enumerate(prompts):
        core.submit(1_000_000 + index, prompt[:-1], 0)
    core.run()


def _left(core: Core, prompt: list[int]) -> int:
    """Tokens of whole pages that `_leave_prefixes` left: of the prompt but the last token, all have KV but the last."""
    return (len(prompt) - 2) // core.page_size * core.page_size
