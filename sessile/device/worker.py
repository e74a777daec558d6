"""The device: runs step plans in order on one thread of its own, and owns the model, the KV pool and the row state."""

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import StepPlan, StepResult
from sessile.device.inputs import FlatStep, SamplePositions, check_plan, flatten_step, sample_positions
from sessile.device.kv_pool import KvPool
from sessile.device.logprobs import NO_LOGPROBS, Logprobs, chunked_logprobs, token_logprobs
from sessile.device.page_table import PageTable
from sessile.device.row_parameters import RowParameters
from sessile.device.sampler import Sampled, Sampler
from sessile.errors import NotReady
from sessile.kernels.attention import CpuAttentionStep, PagedCache, StepRows
from sessile.model.fused_cpu import fuse_for_cpu, is_few_tokens, query_items
from sessile.model.layers import Decoder, StepInputs
from sessile.model.native_cpu import native_decoder


@dataclass(frozen=True)
class DeviceFacts:
    """What was opened: sizes for the core's limits and names for the user.

    context_tokens: longest sequence that is served. pages_total counts the scratch page. kv_bytes is the size of the
    pool, weight_bytes what the weights hold. attention: which kernels attend. step_ms: (tokens, milliseconds) of steps
    that verify drafts, fewest tokens first; empty if they were not measured. decode_ms: the same of steps without
    drafts, where the device runs those otherwise, else empty. late_ms: what a step takes longer that is launched only
    when the one before it is done.
    """

    model_path: str
    architecture: str
    dtype: str
    quantize: str
    device: str
    attention: str
    threads: int
    vocab_size: int
    context_tokens: int
    page_size: int
    pages_total: int
    rows_max: int
    kv_bytes: int
    weight_bytes: int
    step_ms: tuple[tuple[int, float], ...] = ()
    decode_ms: tuple[tuple[int, float], ...] = ()
    late_ms: float = 0.0


class Ticket:
    """The promise of one step's result."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether the step is done, or has failed."""
        return self._done.is_set()

    def result(self) -> StepResult:
        """Wait for the step and return its result, or raise what the device raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a ticket that is done has a result or an error"
        return self._result

    def fulfil(self, result: StepResult) -> None:
        """Hand over the result; called once, by the device."""
        self._result = result
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """Hand over what the device raised; called once, by the device."""
        self._error = error
        self._done.set()


class CpuModel:
    """A decoder on its pool, run in the best way that its weights and this machine allow."""

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._native = native_decoder(decoder, cache)
        self._fused = fuse_for_cpu(decoder, cache) if self._native is None else None

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: StepRows, *, is_read: bool
    ) -> Tensor:
        """Residual stream after the last layer [t, hidden]: all layers in one call where kernels have that.

        tokens, positions, slots int64[t]. is_read: whether anybody reads what is returned; else it means nothing.
        """
        if self._native is not None:
            return self._native.forward(tokens, positions, slots, rows, is_read=is_read)
        if self._fused is not None and is_few_tokens(rows):
            return self._fused.forward(tokens, positions, slots, query_items(rows))
        return self._decoder(StepInputs(tokens, positions, CpuAttentionStep(self._cache, rows, slots)))


class StepRunner:
    """Applies and runs one plan at a time, on the caller's thread; the state of a device but for its thread."""

    def __init__(self, decoder: Decoder, pool: KvPool, rows_max: int, row_pages: int) -> None:
        device = pool.keys.device
        self._decoder = decoder
        self._pool = pool
        self._table = PageTable(rows_max, row_pages, pool.pages, device)
        self._parameters = RowParameters(rows_max, decoder.config.vocab_size, device)
        self._sampler = Sampler(self._parameters)
        self._model = CpuModel(decoder, pool.cache(self._table.pages))
        self._bounds = rows_max, decoder.config.vocab_size, row_pages * pool.page_size

    @property
    def pages_total(self) -> int:
        """Pages of the pool, the scratch page included."""
        return self._pool.pages

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan's changes of state, run its rows, sample, and report."""
        check_plan(plan, *self._bounds)
        self._table.apply(plan)
        self._parameters.apply(plan)
        self._parameters.clear_last_tokens(plan.bind_rows)
        self._pool.copy(plan.copies)
        if not plan.rows.size:
            return _nothing_ran(plan)
        flat = flatten_step(plan, self._table.pages, self._pool.page_size, self._parameters.last_tokens)
        rows = StepRows(plan.rows, plan.starts, plan.query_counts)
        places = sample_positions(plan)
        is_read = bool(places.flat.size or plan.score_queries.size)
        hidden = self._model.forward(flat.tokens, flat.positions, flat.slots, rows, is_read=is_read)
        scores = self._score(plan, hidden)
        if not places.flat.size:
            return _result(plan, flat, scores=scores)
        logits = self._decoder.logits(hidden[torch.from_numpy(places.flat).to(hidden.device)])
        sampled = self._sampler.run(plan, places, logits, flat.tokens)
        return _result(plan, flat, places, sampled, _emitted_logprobs(plan, places, logits, sampled), scores)

    def _score(self, plan: StepPlan, hidden: torch.Tensor) -> Logprobs:
        if not plan.score_queries.size:
            return NO_LOGPROBS
        queries = torch.from_numpy(plan.score_queries.astype(np.int64)).to(hidden.device)
        targets = torch.from_numpy(plan.score_targets.astype(np.int64)).to(hidden.device)
        return chunked_logprobs(hidden[queries], self._decoder, targets, plan.score_tops)


class Worker:
    """A device as the engine sees it: `launch` returns at once, steps run in order on one thread.

    After a step that raised, the state of the device is unknown: that ticket and all later ones raise.
    """

    def __init__(self, runner: StepRunner, facts: DeviceFacts) -> None:
        self.facts = facts
        self._runner = runner
        self._queue: queue.SimpleQueue[tuple[StepPlan, Ticket] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sessile-device", daemon=True)
        self._thread.start()

    def launch(self, plan: StepPlan) -> Ticket:
        """Queue a step; its arrays must not change afterwards. Raises NotReady after `close`."""
        if self._closed:
            raise NotReady("the device is closed")
        ticket = Ticket()
        self._queue.put((plan, ticket))
        return ticket

    def prepare(self) -> bool:
        """Nothing: all that steps need is there when the device is opened."""
        return False

    def close(self) -> None:
        """Finish what was launched, then end the thread. May be called again."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self.facts.threads)
        broken: BaseException | None = None
        while (entry := self._queue.get()) is not None:
            plan, ticket = entry
            if broken is not None:
                ticket.fail(broken)
                continue
            try:
                ticket.fulfil(self._runner.run(plan))
            except BaseException as error:
                broken = error
                ticket.fail(error)


def _nothing_ran(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, plan.rows, plan.query_counts, np.empty(0, np.int32), np.empty(0, np.int32),
                      np.empty(0, np.bool_))  # fmt: skip


def _emitted_logprobs(
    plan: StepPlan, places: SamplePositions, logits: torch.Tensor, sampled: Sampled
) -> Logprobs:
    """Log-probabilities of the emitted tokens of rows that want them."""
    if (plan.logprob_tops < 0).all():
        return NO_LOGPROBS
    counts = np.diff(places.firsts, append=places.flat.size)
    is_emitted = places.depths < np.repeat(sampled.emitted.cpu().numpy(), counts)
    tops = plan.logprob_tops[places.row_indices]
    wanted = np.flatnonzero(is_emitted & (tops >= 0))
    index = torch.from_numpy(wanted).to(logits.device)
    return token_logprobs(logits[index], sampled.tokens[index], tops[wanted])


def _result(
    plan: StepPlan,
    flat: FlatStep,
    places: SamplePositions | None = None,
    sampled: Sampled | None = None,
    emitted_logprobs: Logprobs = NO_LOGPROBS,
    scores: Logprobs = NO_LOGPROBS,
) -> StepResult:
    """Bring what the device chose to the host, in the order of the plan's rows."""
    count = plan.rows.size
    emitted, faulty = np.zeros(count, np.int32), np.zeros(count, np.bool_)
    tokens = np.empty(0, np.int32)
    if places is not None and sampled is not None:
        sampling = places.row_indices[places.firsts]
        own = sampled.emitted.cpu().numpy()
        emitted[sampling] = own
        faulty[sampling] = sampled.faulty.cpu().numpy()
        is_emitted = places.depths < np.repeat(own, np.diff(places.firsts, append=places.flat.size))
        tokens = sampled.tokens.cpu().numpy()[is_emitted].astype(np.int32)
    return StepResult(
        step=plan.step,
        rows=plan.rows,
        query_counts=np.bincount(flat.row_indices, minlength=count).astype(np.int32),
        emitted=emitted,
        tokens=tokens,
        faulty=faulty,
        logprobs=emitted_logprobs.chosen,
        top_ids=emitted_logprobs.top_ids,
        top_logprobs=emitted_logprobs.tops,
        score_logprobs=scores.chosen,
        score_top_ids=scores.top_ids,
        score_top_logprobs=scores.tops,
    )
