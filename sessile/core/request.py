"""A request: one prompt or one turn of a session, from its submission to its one Done."""

from array import array
from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct

from sessile.contract.drafting import DraftLine, DraftWish
from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Done, Sampling, Scores, Submit, TokenDetail
from sessile.core.history import TOKEN_BYTES, History, Packed
from sessile.core.ledger import Lease
from sessile.core.prefix import Pin
from sessile.core.rows import STOP_COLUMNS, pack_row
from sessile.core.session import Session, StoredReply
from sessile.core.stop import PatternMatcher, StopMatcher
from sessile.core.tenants import Tenant
from sessile.units import RowId

_BIND_INTS = Struct("<IIQ")
_BIND_FLOATS = Struct("<6f")


class Phase(Enum):
    """Where a request is. Its KV is with it only while RUNNING."""

    QUEUED = auto()
    """In the waiting line: just arrived, or preempted. No row; its KV, if any, is parked with its session."""
    RUNNING = auto()
    """Has a row, a lease and a pin; planned whenever there is something to compute."""
    DRAINING = auto()
    """Done was emitted; only the row is left, until the step in flight that still reads it settles."""
    ENDED = auto()
    """Holds nothing."""


@dataclass(slots=True)
class Drafts:
    """What a request has to do with drafts. wish: what it allows. remembered: whether it asked to be.

    line: with it the index of its sequence, from when it is first asked for to its end. offered, accepted: drafts
    that were verified, and tokens that it got beyond one a step.
    """

    wish: DraftWish
    remembered: bool = False
    line: DraftLine | None = None
    offered: int = 0
    accepted: int = 0


class Request:
    """Tokens and settings of one request; the counters of a running one are in its row, not here.

    Its context is base + delta + output. base: the session's committed history, not to be changed while the turn runs.
    delta: the turn's own input, packed. output: what was emitted, all of it facts. The history gets delta
    and output only when the turn commits.
    """

    __slots__ = (
        "arrival",
        "ban_ids",
        "base",
        "base_tokens",
        "bind_floats",
        "bind_ints",
        "bound_pages",
        "cached_tokens",
        "computed_tokens",
        "constraint",
        "delta",
        "drafts",
        "goal_tokens",
        "group",
        "input",
        "key",
        "lease",
        "logprobs",
        "matcher",
        "output",
        "overtaken",
        "patterns",
        "penalised",
        "phase",
        "pin",
        "preempted_tokens",
        "preemptions",
        "priority",
        "prompt_tokens",
        "publishing",
        "reached_tokens",
        "replied",
        "rid",
        "row",
        "sampling",
        "scored_tokens",
        "scores_from",
        "session",
        "shaped",
        "share_key",
        "share_waits",
        "slow",
        "stop_ids",
        "tenant",
        "urgent",
    )  # fmt: skip

    def __init__(
        self,
        message: Submit,
        base: History,
        delta: Packed,
        *,
        goal_tokens: int, stop_ids: tuple[int, ...], session: Session | None, tenant: Tenant, drafts: Drafts,
        constraint: GrammarLine | None = None,
    ) -> None:  # fmt: skip
        sampling = message.sampling
        self.key, self.group = message.key, message.group
        self.session, self.tenant = session, tenant
        self.rid = message.rid if session is not None and not message.rid_drawn else ""
        self.input = message.tokens if self.rid else b""
        """What a turn that a client named was sent with, to know it again."""
        self.replied: list[Scores | TokenDetail] = []
        """What such a turn was told beside its tokens."""
        self.priority = message.priority
        self.base = base
        self.base_tokens = len(base)
        self.delta = delta
        self.output = array("i")
        self.prompt_tokens = len(base) + len(delta) // TOKEN_BYTES
        self.goal_tokens = goal_tokens
        self.bound_pages = 0
        """While running: pages it can come to need by its goal, beside those it shares."""
        self.sampling = sampling
        self.bind_ints, self.bind_floats = packed_sampling(sampling)
        """What a row is bound with, made at submission: a step has no time for it."""
        self.penalised = penalised(sampling)
        self.ban_ids = stop_ids if sampling.min_new_tokens else ()
        """Never sampled below min_new_tokens."""
        self.shaped = bool(sampling.logit_bias or self.ban_ids or self.penalised)
        """Whether the device changes logits for it."""
        self.stop_ids = stop_ids
        self.matcher: StopMatcher | None = StopMatcher(sampling.stop) if sampling.stop else None
        self.patterns = PatternMatcher(sampling.stop_patterns) if sampling.stop_patterns else None
        self.logprobs = message.logprobs
        self.scores_from = message.prompt_logprobs_from
        self.scored_tokens = 0
        """Prompt positions below this were scored already: a preempted request does not score them again."""
        self.arrival = 0
        self.phase = Phase.QUEUED
        self.preempted_tokens = -1
        """KV it had when it was preempted last."""
        self.preemptions = 0
        self.overtaken = 0
        self.urgent = False
        """Whether it waits before everybody else, because it was overtaken too often."""
        self.cached_tokens = -1
        """Set at first admission."""
        self.computed_tokens = 0
        self.reached_tokens = 0
        """The longest KV it ever had: what lies below is recomputation."""
        self.publishing = False
        """Whether settled prompt pages go to the tree as they come: plain requests and first turns."""
        self.share_key: tuple[int, bytes] | None = None
        self.share_waits = 0
        self.row: RowId | None = None
        self.lease: Lease | None = None
        self.pin: Pin | None = None
        self.drafts, self.constraint = drafts, constraint
        self.slow = (
            self.matcher is not None
            or self.patterns is not None
            or self.logprobs >= 0
            or sampling.min_new_tokens > 0
            or len(stop_ids) > STOP_COLUMNS
        )
        """Whether an output token takes more than being appended and compared with a few stop tokens."""

    def row_start(self, start_tokens: int, planned_tokens: int, samples: bool, step: int) -> bytes:
        """The columns of the row in which this request starts, its first part being planned already."""
        assert self.pin is not None and self.lease is not None
        pinned = len(self.pin.pages)
        return pack_row(
            self.key,
            1,  # live
            self.slow,
            self.arrival,
            self.prompt_tokens + len(self.output),  # known
            0,  # filled
            start_tokens,  # settled
            planned_tokens,
            samples,  # pending
            self.goal_tokens - 1,
            pinned + len(self.lease.pages),
            pinned,
            self.prompt_tokens,
            self.last_token,
            step,
            self.logprobs,
            self.tenant.index,
            self.drafts.wish.drafts_max,
            self.constraint is not None,
        )

    def note_admission(self, start_tokens: int) -> None:
        """Note the KV that was there; what counts as cached is decided at the first admission."""
        if self.cached_tokens < 0:
            self.cached_tokens = start_tokens
            self.reached_tokens = start_tokens

    def stored_reply(self, done: Done) -> StoredReply:
        """What its session keeps of a committed turn's reply."""
        return StoredReply(
            self.rid,
            self.input,
            done,
            tuple([each for each in self.replied if isinstance(each, Scores)]),
            tuple([each for each in self.replied if isinstance(each, TokenDetail)]),
        )

    @property
    def first_score(self) -> int:
        """The first prompt position still to be scored, if any is; committed history has no scores."""
        return max(self.scores_from, 1, self.scored_tokens, self.base_tokens)

    @property
    def scores_left(self) -> bool:
        """Whether positions of its prompt are still to be scored, for which they have to be computed."""
        return self.scores_from >= 0 and self.first_score < self.prompt_tokens

    @property
    def input_tokens(self) -> int:
        """Tokens that came with it: the prompt without a committed history."""
        return self.prompt_tokens - self.base_tokens

    @property
    def known_tokens(self) -> int:
        """History, prompt and output so far, without what a running row has not handed over yet."""
        return self.prompt_tokens + len(self.output)

    @property
    def output_tokens(self) -> int:
        """Tokens emitted so far, without what a running row has not handed over yet."""
        return len(self.output)

    def tokens(self, start: int, stop: int) -> Packed:
        """Tokens [start, stop) of the whole context. Costs what it returns, not what lies before."""
        base, prompt = self.base_tokens, self.prompt_tokens
        if base <= start and stop <= prompt:
            return self.delta[(start - base) * TOKEN_BYTES : (stop - base) * TOKEN_BYTES]
        packed = self.base.slice(start, min(stop, base)) if start < base else b""
        if start < prompt and stop > base:
            packed += self.delta[max(start - base, 0) * TOKEN_BYTES : (stop - base) * TOKEN_BYTES]
        if stop > prompt:
            packed += self.output[max(start - prompt, 0) : stop - prompt].tobytes()
        return packed

    @property
    def last_token(self) -> int:
        """The last known token."""
        if self.output:
            return self.output[-1]
        known = self.prompt_tokens
        last = self.delta[-TOKEN_BYTES:] or self.base.slice(known - 1, known)
        return int.from_bytes(last, "little", signed=True)


def packed_sampling(sampling: Sampling) -> tuple[bytes, bytes]:
    """A row of StepPlan.bind_ints and one of bind_floats, as bytes; the two halves of the seed are one number here."""
    ints = _BIND_INTS.pack(sampling.top_k, sampling.min_new_tokens, sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)
    floats = _BIND_FLOATS.pack(
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    return ints, floats


def penalised(sampling: Sampling) -> bool:
    """Whether the device needs the counts of the tokens so far."""
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
