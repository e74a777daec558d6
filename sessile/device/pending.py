"""A step that was queued on a GPU: what will be its result once the device has passed it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sessile.contract.plan import Floats, Ints, StepPlan, StepResult
from sessile.device.exchange import Crossing
from sessile.device.inputs import StepFacts, sample_positions
from sessile.device.logprobs import NO_LOGPROBS, Logprobs, joined
from sessile.device.shortage import Pending
from sessile.device.staging import to_host
from sessile.kernels.sampling import top_candidates

_NONE_FAULTY = np.zeros(4096, np.bool_)
"""Of as many rows as a batch can have."""
_NONE_FAULTY.flags.writeable = False


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host.

    chosen float32[n]; ids int64[n, most] and tops float32[n, most] of the most likely; counts: how many of them each
    of the n wants. places: which sampling places they belong to, None for prompt scores.
    """

    chosen: Tensor
    ids: Tensor
    tops: Tensor
    counts: Ints
    places: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls, logits: Tensor, tokens: Tensor, counts: Ints, places: npt.NDArray[np.int64] | None = None
    ) -> "PendingLogprobs":
        """Queue the log-probabilities of tokens int64[n] under raw logits float32[n, vocab]."""
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        most = int(counts.max())
        if most:
            tops, ids = top_candidates(logprobs, most)
        else:
            tops, ids = logprobs[:, :0], tokens[:, None][:, :0]
        return cls(to_host(chosen), to_host(ids), to_host(tops), counts, places)

    def select(self, is_wanted: npt.NDArray[np.bool_]) -> Logprobs:
        """What has arrived, of those of the n that are wanted."""
        counts = self.counts[is_wanted]
        is_top = np.arange(self.ids.shape[1]) < counts[:, None]
        ids: Ints = self.ids.numpy()[is_wanted][is_top].astype(np.int32)
        tops: Floats = self.tops.numpy()[is_wanted][is_top]
        return Logprobs(self.chosen.numpy()[is_wanted], ids, tops)


@dataclass(slots=True)  # As with a plan: not frozen, for speed only.
class PendingStep:
    """Everything that a result is made of. crossing: brings the results of `settle_rows`, no words if no rows ran."""

    plan: StepPlan
    facts: StepFacts
    crossing: Crossing
    rows_max: int
    logprobs: PendingLogprobs | None = None
    scores: Sequence[PendingLogprobs] = ()

    def is_done(self) -> bool:
        """Whether the device has passed the step."""
        return self.crossing.is_done()

    def wait(self) -> StepResult:
        """Wait for the device and make the result. Raises what the device raised."""
        plan, count, rows_max = self.plan, self.plan.rows.size, self.rows_max
        # Counted while the device is still at it.
        places = sample_positions(plan) if self.logprobs is not None or self.facts.has_drafts else None
        results = self.crossing.take()
        emitted, faulty = results[rows_max : rows_max + count], results[2 * rows_max : 2 * rows_max + count]
        tokens, logprobs = results[3 * rows_max :], NO_LOGPROBS
        if places is None:
            # Every place is emitted: one token of each row that samples.
            tokens = tokens[: self.facts.samples]
        else:
            is_emitted = places.depths < emitted[places.row_indices]
            tokens = tokens[: places.flat.size][is_emitted]
            if self.logprobs is not None:
                assert self.logprobs.places is not None, "log-probabilities of sampled tokens have places"
                logprobs = self.logprobs.select(is_emitted[self.logprobs.places])
        scores = NO_LOGPROBS
        if self.scores:
            scores = joined([part.select(np.ones(part.counts.size, np.bool_)) for part in self.scores])
        return StepResult(
            step=plan.step,
            rows=plan.rows,
            query_counts=results[:count],
            emitted=emitted,
            tokens=tokens,
            faulty=faulty != 0 if np.count_nonzero(faulty) else _NONE_FAULTY[:count],
            logprobs=logprobs.chosen,
            top_ids=logprobs.top_ids,
            top_logprobs=logprobs.tops,
            score_logprobs=scores.chosen,
            score_top_ids=scores.top_ids,
            score_top_logprobs=scores.tops,
        )


class GpuTicket:
    """The promise of one queued step; keeps the result, or the error, once it is there."""

    def __init__(self, pending: Pending | None, error: BaseException | None = None) -> None:
        self._pending = pending
        self._error = error
        self._result: StepResult | None = None

    def is_done(self) -> bool:
        """Whether `result` would not block."""
        return self._pending is None or self._pending.is_done()

    def result(self) -> StepResult:
        """Wait for the step and return its result, or raise what the device raised."""
        if self._error is not None:
            raise self._error
        if self._result is None:
            assert self._pending is not None, "a ticket without an error has a step"
            self._result = self._pending.wait()
            self._pending = None
        return self._result
