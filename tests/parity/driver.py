"""Drive a device by hand: a planner that owns pages naively, runs whole prompts in chunks, and mixes requests.

It is the least that a core does, so that a failure of parity here is the device's and not the scheduler's.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sessile.contract.plan import (
    BIND_FLOATS,
    BIND_FREQUENCY,
    BIND_INTS,
    BIND_MIN_NEW_TOKENS,
    BIND_MIN_P,
    BIND_PRESENCE,
    BIND_REPETITION,
    BIND_SEED_HIGH,
    BIND_SEED_LOW,
    BIND_TEMPERATURE,
    BIND_TOP_K,
    BIND_TOP_P,
    FROM_DEVICE,
    SAMPLE,
    StepPlan,
    StepResult,
)


@dataclass
class Run:
    """One request and what came back for it. drafts: tokens to propose after each sampled one, by output index.

    allowed: the tokens that may be chosen, by output index; beyond the last entry, all.
    """

    prompt: list[int]
    new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = 0
    min_new_tokens: int = 0
    bans: list[int] = field(default_factory=list)
    biases: dict[int, float] = field(default_factory=dict)
    logprobs: int = -1
    score_top: int = -1
    drafts: list[int] = field(default_factory=list)
    drafts_max: int = 0
    allowed: list[list[int]] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    score_top_ids: list[list[int]] = field(default_factory=list)
    is_faulty: bool = False
    steps: int = 0
    row: int = -1
    kv_tokens: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.is_faulty or len(self.output) >= self.new_tokens

    @property
    def is_prompt(self) -> bool:
        return self.kv_tokens < len(self.prompt) - 1 or not self.output


@dataclass
class _Share:
    """What one run does in one step."""

    run: Run
    tokens: list[int]
    drafts: int
    flags: int
    scored: int


class Driver:
    """Runs requests on a device step by step; pages are handed out in a shuffled order, rows from the top down."""

    def __init__(self, device: Any, *, chunk_tokens: int, seed: int = 0) -> None:
        self.device = device
        self.chunk_tokens = chunk_tokens
        self.step = 0
        facts = device.facts
        order = np.random.default_rng(seed).permutation(facts.pages_total - 1) + 1
        self.free_pages: list[int] = order.tolist()
        self.free_rows = list(range(facts.rows_max))
        self._page_size = facts.page_size

    def run_all(self, runs: list[Run]) -> None:
        """Run every request to its end; prompts share each step with the rows that decode."""
        waiting = list(runs)
        running: list[Run] = []
        while waiting or running:
            while waiting and self.free_rows:
                running.append(waiting.pop(0))
                running[-1].row = -1
            self.run_step(running)
            for run in [run for run in running if run.is_done]:
                running.remove(run)
                self.finish(run)

    def finish(self, run: Run) -> None:
        """Take back the row and the pages of a run."""
        self.free_rows.append(run.row)
        self.free_pages.extend(run.pages)
        run.pages = []

    def run_step(self, running: list[Run]) -> StepResult:
        """One step of all given runs, within the token budget; at least one makes progress."""
        bound = [run for run in running if run.row < 0]
        for run in bound:
            run.row = self.free_rows.pop()
        shares = self._shares(running)
        result = self.device.launch(self._plan(bound, shares)).result()
        self._settle(shares, result)
        return result

    def _shares(self, running: list[Run]) -> list[_Share]:
        budget = self.chunk_tokens
        shares = []
        for run in sorted(running, key=lambda run: run.is_prompt):
            if budget <= 0:
                break
            if run.is_prompt:
                tokens = run.prompt[run.kv_tokens : run.kv_tokens + budget]
                last = run.kv_tokens + len(tokens) == len(run.prompt)
                scored = min(len(tokens), len(run.prompt) - 1 - run.kv_tokens) if run.score_top >= 0 else 0
                shares.append(_Share(run, tokens, 0, SAMPLE if last else 0, scored))
            else:
                left = run.new_tokens - len(run.output) - 1
                start = len(run.output)
                drafts = run.drafts[start : start + min(run.drafts_max, left, budget - 1)] if run.drafts_max else []
                shares.append(_Share(run, [-1, *drafts], len(drafts), SAMPLE | FROM_DEVICE, 0))
            budget -= len(shares[-1].tokens)
        return shares

    def _plan(self, bound: list[Run], shares: list[_Share]) -> StepPlan:
        self.step += 1
        arrays: dict[str, Any] = self._bindings(bound)
        table_rows, table_starts, table_pages = [], [], []
        for share in shares:
            run = share.run
            while len(run.pages) * self._page_size < run.kv_tokens + len(share.tokens):
                table_rows.append(run.row)
                table_starts.append(len(run.pages))
                run.pages.append(self.free_pages.pop())
                table_pages.append(run.pages[-1])
        arrays |= {
            "table_rows": table_rows, "table_starts": table_starts, "table_counts": [1] * len(table_rows),
            "table_pages": table_pages, "rows": [share.run.row for share in shares],
            "starts": [share.run.kv_tokens for share in shares],
            "query_counts": [len(share.tokens) for share in shares],
            "draft_counts": [share.drafts for share in shares], "flags": [share.flags for share in shares],
            "output_indices": [len(share.run.output) for share in shares],
            "logprob_tops": [share.run.logprobs for share in shares],
            "tokens": [token for share in shares for token in share.tokens],
        } | _scores(shares) | _masks(shares, self.device.facts.vocab_size)  # fmt: skip
        dtypes = {"bind_floats": np.float32, "bias_values": np.float32}
        shaped = {name: np.array(value, dtypes.get(name, np.int32)) for name, value in arrays.items() if len(value)}
        return StepPlan.empty(self.step, **shaped)

    def _bindings(self, bound: list[Run]) -> dict[str, Any]:
        ints, floats = np.zeros((len(bound), BIND_INTS), np.int32), np.zeros((len(bound), BIND_FLOATS), np.float32)
        for index, run in enumerate(bound):
            ints[index, BIND_TOP_K], ints[index, BIND_MIN_NEW_TOKENS] = run.top_k, run.min_new_tokens
            ints[index, [BIND_SEED_LOW, BIND_SEED_HIGH]] = np.array([run.seed], np.uint64).view(np.int32)
            floats[index, BIND_TEMPERATURE], floats[index, BIND_TOP_P] = run.temperature, run.top_p
            floats[index, BIND_MIN_P], floats[index, BIND_REPETITION] = run.min_p, run.repetition
            floats[index, BIND_FREQUENCY], floats[index, BIND_PRESENCE] = run.frequency, run.presence
        penalised = [(run.repetition, run.frequency, run.presence) != (1.0, 0.0, 0.0) for run in bound]
        return {
            "bind_rows": [run.row for run in bound], "bind_ints": ints, "bind_floats": floats,
            "bias_counts": [len(run.biases) for run in bound],
            "bias_tokens": [token for run in bound for token in run.biases],
            "bias_values": [value for run in bound for value in run.biases.values()],
            "ban_counts": [len(run.bans) for run in bound],
            "ban_tokens": [token for run in bound for token in run.bans],
            "prompt_counts": [len(run.prompt) * has for run, has in zip(bound, penalised, strict=True)],
            "output_counts": [0] * len(bound),
            "seen_tokens": [token for run, has in zip(bound, penalised, strict=True) if has for token in run.prompt],
        }  # fmt: skip

    def _settle(self, shares: list[_Share], result: StepResult) -> None:
        assert result.step == self.step
        assert result.rows.tolist() == [share.run.row for share in shares]
        assert result.query_counts.tolist() == [len(share.tokens) for share in shares]
        tokens = result.tokens.tolist()
        logprobs, top_ids, tops = result.logprobs.tolist(), result.top_ids.tolist(), result.top_logprobs.tolist()
        scores, score_ids = result.score_logprobs.tolist(), result.score_top_ids.tolist()
        for share, emitted, faulty in zip(shares, result.emitted.tolist(), result.faulty.tolist(), strict=True):
            run = share.run
            run.steps += 1
            run.is_faulty = faulty
            run.kv_tokens += len(share.tokens) if not share.drafts else emitted
            run.output += _take(tokens, emitted)
            if run.logprobs >= 0:
                run.output_logprobs += _take(logprobs, emitted)
                run.top_ids += [_take(top_ids, run.logprobs) for _ in range(emitted)]
                run.top_logprobs += [_take(tops, run.logprobs) for _ in range(emitted)]
            run.scores += _take(scores, share.scored)
            run.score_top_ids += [_take(score_ids, run.score_top) for _ in range(share.scored)]
        left = tokens + logprobs + top_ids + tops + scores + score_ids
        assert left == [], "a result holds what nobody asked for"


def _scores(shares: list[_Share]) -> dict[str, list[int]]:
    queries: list[int] = []
    targets: list[int] = []
    tops: list[int] = []
    offset = 0
    for share in shares:
        start = share.run.kv_tokens
        queries += range(offset, offset + share.scored)
        targets += share.run.prompt[start + 1 : start + 1 + share.scored]
        tops += [share.run.score_top] * share.scored
        offset += len(share.tokens)
    return {"score_queries": queries, "score_targets": targets, "score_tops": tops}


def _masks(shares: list[_Share], vocab_size: int) -> dict[str, Any]:
    queries: list[int] = []
    masks = []
    end = 0
    for share in shares:
        end += len(share.tokens)
        for depth in range(share.drafts + 1 if share.flags & SAMPLE else 0):
            output_index = len(share.run.output) + depth
            if output_index < len(share.run.allowed):
                queries.append(end - share.drafts - 1 + depth)
                bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
                bits[share.run.allowed[output_index]] = 1
                masks.append(np.packbits(bits, bitorder="little").view(np.int32))
    return {"mask_queries": queries, "mask_words": np.concatenate(masks) if masks else []}


def _take(values: list[Any], count: int) -> list[Any]:
    """Remove and return the first values."""
    taken = values[:count]
    assert len(taken) == count, "the result holds too little"
    del values[:count]
    return taken
