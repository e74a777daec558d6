"""Runs plans on a GPU: state, forward pass and sampling all stay there, and the host waits for nothing.

Everything is queued on one stream in the order of the plans. A step of a common size is one CUDA graph, captured when
the device opens or while it has nothing to do. Other sizes run eagerly the first time and are captured the second.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import NO_INTS, PLAN_ARRAYS, Ints, NextPlans, StepPlan, encode_plan, goes_on_from
from sessile.device.buckets import Bucket, bucket_of
from sessile.device.exchange import Crossing, Exchange
from sessile.device.inputs import SamplePositions, StepFacts, check_ends, check_plan, positions_around, sample_positions
from sessile.device.kv_pool import KvPool
from sessile.device.page_table import check_runs
from sessile.device.pending import PendingLogprobs, PendingStep
from sessile.device.row_parameters import RowParameters, TokenCounter
from sessile.device.sampler import Sampler
from sessile.device.shortage import is_out_of_memory, reason_of
from sessile.device.staging import to_device
from sessile.errors import OutOfMemory
from sessile.kernels.flash_attention3 import FlashAttention3
from sessile.kernels.triton_plan import RowState, StepLayout, apply_state, lay_out
from sessile.kernels.triton_sampling import Chosen, choose_tokens, settle_rows
from sessile.model.fused_gpu import BlockKinds, FusedDecoder, GpuCache
from sessile.model.layers import Decoder

log = logging.getLogger("sessile.device")

_UPLOAD_WORDS = 1 << 20
_APPLIED_OTHERWISE = [
    PLAN_ARRAYS.index(name)
    for name in (
        "bias_tokens", "bias_values", "ban_tokens", "seen_tokens", "copies", "score_queries", "score_targets",
        "score_tops", "mask_queries", "mask_words",
    )
]  # fmt: skip
"""Arrays of a plan that the step's own kernels do not read: penalties, bias, bans, masks and scores are applied by
other means, and only where a row has them."""
_LAYERS_ASKED = 2
"""Layers that show all kernels of a step: the first one, which gets no other's output, and one behind it."""
_SCORES_AT_ONCE = 64


@dataclass(frozen=True)
class Forward:
    """What a step's forward pass left on the device: its layout and the residual stream [t, hidden]."""

    layout: StepLayout
    residual: Tensor


@dataclass(slots=True)
class Replayed:
    """A step that was one graph's work and bound no rows, for the next one to go on from. next_plans: packs those."""

    plan: StepPlan
    facts: StepFacts
    graph: torch.cuda.CUDAGraph
    result_words: int
    next_plans: NextPlans
    positions: Ints | None = None
    """Those of several steps in one array that nobody can write to, all of them within the rows' pages."""


class GpuRunner:
    """The state of one GPU and how a plan changes it. `start` queues a step and returns what its result will be.

    flash: attends with prompts in steps of sizes that it is faster at; None: our own kernels do.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        rows_max: int,
        row_pages: int,
        *,
        captures: bool = True,
        flash: FlashAttention3 | None = None,
    ) -> None:
        device = pool.keys.device
        self.graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self.shortages = 0
        """How often memory ran out, in a step or where one was to be captured."""
        self._device = device
        self._pool = pool
        self._rows_max = rows_max
        self._row_pages = row_pages
        self._vocab_size, self._table_tokens = decoder.config.vocab_size, row_pages * pool.page_size
        self.captures = captures and device.type == "cuda"
        self._seen_buckets: dict[Bucket, bool] = {}
        self._due: deque[Bucket] = deque()
        """Sizes of which `prepare_next` captures a graph."""
        self._has_settled = False
        """Whether the step that is being queued has changed what it reads itself: last tokens, and counts of tokens."""
        self._graph_pool = torch.cuda.graph_pool_handle() if self.captures else None
        self._state = RowState.empty(rows_max, row_pages, device)
        cache = GpuCache(pool.keys, pool.values, self._state.table, pool.page_size)
        self._decoder = FusedDecoder(decoder, cache, flash)
        self._parameters = RowParameters(rows_max, decoder.config.vocab_size, device)
        self._sampler = Sampler(self._parameters)
        self._results = torch.zeros(3 * rows_max + rows_max * 256, dtype=torch.int32, device=device)
        self._exchange = Exchange(_UPLOAD_WORDS, self._results)
        self._replayed: Replayed | None = None

    def start(self, plan: StepPlan) -> PendingStep:
        """Queue a plan's changes of state, its rows and its sampling.

        Raises OutOfMemory where the same plan may be started again, whole or in parts, once there is memory for it.
        """
        self._has_settled = False
        last, self._replayed = self._replayed, None
        try:
            if last is not None and goes_on_from(plan, last.plan):
                return self._start_next(plan, last)
            return self._start(plan)
        except Exception as error:
            # Until rows are settled, whatever a plan does can be done again, and in parts: rows get the same occupants,
            # the page table the same runs, and copies the same KV, as a step writes nothing that it copies. What it
            # wrote of K and V is written over, and read by nobody before that.
            self._exchange.lose_track()
            if self._has_settled or not is_out_of_memory(error):
                raise
            reason = reason_of(error)
        # Only now: the frames of the exception held what the step had taken.
        self._note_shortage()
        raise OutOfMemory(
            f"Too little memory for a step of {plan.tokens.size} tokens on {plan.rows.size} rows: {reason}. "
            "Lower --kv-memory or --chunk-tokens."
        )

    def _start(self, plan: StepPlan) -> PendingStep:
        facts = check_plan(plan, self._rows_max, self._vocab_size, self._table_tokens)
        check_runs(plan, self._rows_max, self._row_pages, self._pool.pages)
        self._parameters.apply(plan)
        crossing = self._send(plan)
        self._pool.copy(plan.copies)
        if not plan.rows.size:
            self._exchange.fetch()
            apply_state(self._exchange.target, self._state)
            crossing.close(0)
            return PendingStep(plan, facts, crossing, self._rows_max)
        bucket = self.bucket_of(plan)
        scores: Sequence[PendingLogprobs] = ()
        logprobs = None
        has_extras = facts.has_logprobs or plan.score_queries.size or plan.mask_queries.size
        if has_extras or (self._parameters.adjusted_rows and self._parameters.adjusted[plan.rows].any()):
            scores, logprobs = self._run_with_extras(plan, bucket)
        elif bucket.is_captured:
            graph = self._run_captured(bucket)
            if graph is not None and not (plan.bind_rows.size or plan.copies.size):
                words = self._result_words(bucket.places)
                self._replayed = Replayed(plan, facts, graph, words, NextPlans(_APPLIED_OTHERWISE))
        else:
            self._run(bucket)
        crossing.close(self._result_words(bucket.places))
        return PendingStep(plan, facts, crossing, self._rows_max, logprobs, scores)

    def _start_next(self, plan: StepPlan, last: Replayed) -> PendingStep:
        """A plan that goes on from the last one, which was a graph's work and no more: so is this one."""
        if last.positions is None or plan.starts.base is not last.positions:
            check_ends(plan, last.facts, self._table_tokens)
            last.positions = positions_around(plan, last.facts, self._table_tokens)
        if plan.table_rows.size:
            check_runs(plan, self._rows_max, self._row_pages, self._pool.pages)
            crossing = self._send(plan)
        else:
            crossing = self._exchange.send(last.next_plans.encode(plan))
        last.graph.replay()
        self._has_settled = True
        crossing.close(last.result_words)
        last.plan, self._replayed = plan, last
        return PendingStep(plan, last.facts, crossing, self._rows_max)

    def _send(self, plan: StepPlan) -> Crossing:
        """Lay out what the device reads of a plan."""
        packed = encode_plan(plan, _APPLIED_OTHERWISE)
        if packed.size > self._exchange.words:
            # Binding very many pages at once is rare: change the state by itself, then send the rest.
            apply_state(to_device(packed, self._device), self._state)
            plan = replace(
                plan, bind_rows=NO_INTS, table_rows=NO_INTS, table_starts=NO_INTS, table_counts=NO_INTS,
                table_pages=NO_INTS,
            )  # fmt: skip
            packed = encode_plan(plan, _APPLIED_OTHERWISE)
        return self._exchange.send(packed)

    def _note_shortage(self) -> None:
        """Memory ran out: wait for all that was queued, and give back what PyTorch keeps but nobody uses."""
        self.shortages += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _run_captured(self, bucket: Bucket) -> torch.cuda.CUDAGraph | None:
        """A step of a size that is kept as a graph, which is returned; None if graphs are off, or it is the first of
        its size."""
        graph = self.graphs.get(bucket)
        if graph is None and self.captures and bucket in self._seen_buckets:
            graph = self._captured_if_it_fits(bucket)
        if graph is None:
            self._seen_buckets[bucket] = True
            self._run(bucket)
            return None
        graph.replay()
        self._has_settled = True
        return graph

    def _captured_if_it_fits(self, bucket: Bucket) -> torch.cuda.CUDAGraph | None:
        """A new graph; None if memory ran out. What a graph has taken stays taken, so none is tried after that."""
        try:
            return self._capture(bucket)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = reason_of(error)
        self.captures = False
        self._note_shortage()
        log.warning("Too little memory to capture %s: %s. Sizes without a graph stay without", bucket, reason)
        return None

    def bucket_of(self, plan: StepPlan) -> Bucket:
        """The size at which a step with this plan runs."""
        return bucket_of(plan, self._decoder.narrow_row_tokens)

    @torch.inference_mode()
    def ask_for(self, bucket: Bucket) -> None:
        """Within `compiled_together`: have compiled what a step of this size launches without extras."""
        layout = self._layout(bucket)
        # Only our own kernels do not run now; these two are indices for others.
        layout.tokens.zero_()
        layout.place_tokens.zero_()
        self._choose(self._forward(layout, _LAYERS_ASKED), bucket)

    def prepare(self, bucket: Bucket) -> None:
        """Keep a graph of this size before a step needs it. Steps of its kind have run, so kernels are compiled."""
        if self.captures and bucket not in self.graphs:
            self._capture(bucket)

    def prepare_later(self, buckets: Iterable[Bucket]) -> None:
        """Keep graphs of these sizes too, in this order, by and by (`prepare_next`) or as soon as a step needs one."""
        for bucket in buckets:
            self._due.append(bucket)
            self._seen_buckets[bucket] = True

    def prepare_next(self) -> bool:
        """Capture one graph of those put off, while nothing is queued; whether there was one to capture."""
        while self.captures and self._due:
            bucket = self._due.popleft()
            if bucket not in self.graphs:
                self._captured_if_it_fits(bucket)
                return True
        return False

    def _capture(self, bucket: Bucket) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._graph_pool):
                self._run(bucket)
        finally:
            # A capture that fails at its very end leaves its own stream current.
            torch.cuda.set_stream(stream)
            self._has_settled = False  # Nothing has run.
        self.graphs[bucket] = graph
        return graph

    @torch.inference_mode()
    def _run(self, bucket: Bucket) -> None:
        """A whole step, as far as most steps go: what a graph holds."""
        self._choose(self._forward(self._layout(bucket)), bucket)

    def _choose(self, forward: Forward, bucket: Bucket) -> None:
        if not bucket.places:
            self._settle(self._nothing_chosen(), forward.layout)
            return
        logits = self._decoder.logits(forward.residual, forward.layout.place_tokens)
        self._settle(choose_tokens(logits, self._state, forward.layout), forward.layout)

    def _layout(self, bucket: Bucket) -> StepLayout:
        """Memory for the layout of a step."""
        kinds = BlockKinds(bucket.has_narrow, bucket.has_wide)
        return self._decoder.layout(bucket.tokens, bucket.rows, bucket.places, kinds)

    def _forward(self, layout: StepLayout, layers: int | None = None) -> Forward:
        """Fetch the plan, apply it, lay it out, and run all layers, or the first few."""
        self._exchange.fetch()
        apply_state(self._exchange.target, self._state)
        lay_out(self._exchange.target, self._state, layout, self._pool.page_size, self._decoder.shape.kv_heads)
        return Forward(layout, self._decoder.forward(layout, layers))

    @torch.inference_mode()
    def _run_with_extras(self, plan: StepPlan, bucket: Bucket) -> tuple[list[PendingLogprobs], PendingLogprobs | None]:
        """A step with prompt scores, log-probabilities, masks, or rows whose logits are adjusted, without a graph."""
        forward = self._forward(self._layout(bucket))
        scores = self._score(plan, forward)
        places = sample_positions(plan)
        if not places.flat.size:
            self._settle(self._nothing_chosen(), forward.layout)
            return scores, None
        logits = self._decoder.logits(forward.residual, forward.layout.place_tokens).float()
        flat_tokens = forward.layout.tokens.to(torch.int64)
        adjusted = self._sampler.adjust(plan, places, logits, flat_tokens)
        chosen = choose_tokens(adjusted, self._state, forward.layout)
        logprobs = self._emitted_logprobs(plan, places, logits, chosen.tokens)
        counters = self._counters(plan, places, chosen.tokens)
        self._settle(chosen, forward.layout)
        for counter in counters:
            counter.count()
        return scores, logprobs

    def _settle(self, chosen: Chosen, layout: StepLayout) -> None:
        """The point of no return: what follows takes no memory, lest a step be run again that has changed its input.

        It is a kernel that was loaded when the device opened, with all that `ask_for` names.
        """
        settle_rows(chosen, self._state, layout, self._results, self._rows_max)
        self._has_settled = True
        self._exchange.leave(self._result_words(chosen.tokens.numel()))

    def _result_words(self, places: int) -> int:
        """Of `settle_rows`, for a step with room for so many places."""
        return 3 * self._rows_max + places

    def _nothing_chosen(self) -> Chosen:
        nothing = torch.empty(0, dtype=torch.int32, device=self._device)
        return Chosen(nothing, nothing)

    def _score(self, plan: StepPlan, forward: Forward) -> list[PendingLogprobs]:
        """Log-probabilities of prompt tokens, a few positions at a time to bound memory."""
        pending = []
        for start in range(0, plan.score_queries.size, _SCORES_AT_ONCE):
            part = slice(start, start + _SCORES_AT_ONCE)
            queries = to_device(plan.score_queries[part], self._device)
            logits = self._decoder.logits(forward.residual, queries).float()
            targets = to_device(plan.score_targets[part].astype(np.int64), self._device)
            pending.append(PendingLogprobs.of(logits, targets, plan.score_tops[part]))
        return pending

    def _emitted_logprobs(
        self, plan: StepPlan, places: SamplePositions, logits: Tensor, tokens: Tensor
    ) -> PendingLogprobs | None:
        """Log-probabilities at the places of rows that want them; which are emitted is known only with the result."""
        tops: Ints = plan.logprob_tops[places.row_indices]
        wanted = np.flatnonzero(tops >= 0)
        if not wanted.size:
            return None
        index = to_device(wanted, self._device)
        return PendingLogprobs.of(logits[index], tokens[index].to(torch.int64), tops[wanted], wanted)

    def _counters(self, plan: StepPlan, places: SamplePositions, tokens: Tensor) -> list[TokenCounter]:
        """What will count the tokens that rows with a penalty emit, without asking how many these are."""
        counters = []
        counts = np.diff(places.firsts, append=places.flat.size)
        for first, count in zip(places.firsts.tolist(), counts.tolist(), strict=True):
            plan_row = int(places.row_indices[first])
            row = int(plan.rows[plan_row])
            if row in self._parameters.seen:
                emitted = self._results[self._rows_max + plan_row]
                counters.append(TokenCounter.of(tokens[first : first + count], emitted, self._parameters.seen[row]))
        return counters
