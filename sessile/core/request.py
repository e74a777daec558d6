"""A request: one prompt or one turn of a session, from its submission to its one Done."""

from array import array
from enum import Enum, auto

from sessile.contract.messages import Sampling
from sessile.core.history import TOKEN_BYTES, History, Packed
from sessile.core.ledger import Lease
from sessile.core.prefix import Pin
from sessile.core.rows import STOP_COLUMNS
from sessile.core.session import Session
from sessile.core.stop import StopMatcher
from sessile.units import RowId


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


class Request:
    """Tokens and settings of one request; the counters of a running one are in its row, not here.

    Its context is base + delta + output. base: the session's committed history, not to be changed while the turn runs.
    delta: the turn's own input, packed. output: what was emitted, all of it facts. The history gets delta
    and output only when the turn commits.
    """

    __slots__ = (
        "arrival", "base", "base_tokens", "bound_pages", "cached_tokens", "computed_tokens", "delta", "goal_tokens",
        "key", "lease", "logprobs", "matcher", "namespace", "output", "overtaken", "phase", "pin", "preempted_tokens",
        "preemptions", "prompt_tokens", "publishing", "reached_tokens", "row", "sampling",
        "scored_tokens", "scores_from", "session", "share_key", "share_waits", "stop_ids",
    )  # fmt: skip

    def __init__(
        self, key: int, base: History, delta: Packed, sampling: Sampling, goal_tokens: int, session: Session | None
    ) -> None:
        self.key = key
        self.session = session
        self.namespace = session.namespace if session is not None else ""
        self.base = base
        self.base_tokens = len(base)
        self.delta = delta
        self.output = array("i")
        self.prompt_tokens = len(base) + len(delta) // TOKEN_BYTES
        self.goal_tokens = goal_tokens
        self.bound_pages = 0
        """While running: pages it can come to need by its goal, beside those it shares."""
        self.sampling = sampling
        self.stop_ids: tuple[int, ...] = ()
        self.matcher: StopMatcher | None = StopMatcher(sampling.stop) if sampling.stop else None
        self.logprobs = -1
        self.scores_from = -1
        self.scored_tokens = 0
        """Prompt positions below this were scored already: a preempted request does not score them again."""
        self.arrival = 0
        self.phase = Phase.QUEUED
        self.preempted_tokens = -1
        """KV it had when it was preempted last."""
        self.preemptions = 0
        self.overtaken = 0
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

    @property
    def settles_slowly(self) -> bool:
        """Whether an output token takes more than being appended and compared with a few stop tokens."""
        return (
            self.matcher is not None
            or self.logprobs >= 0
            or self.sampling.min_new_tokens > 0
            or len(self.stop_ids) > STOP_COLUMNS
        )

    def note_admission(self, start_tokens: int) -> None:
        """Note the KV that was there; what counts as cached is decided at the first admission."""
        if self.cached_tokens < 0:
            self.cached_tokens = start_tokens
            self.reached_tokens = start_tokens

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
        return int.from_bytes(self.tokens(known - 1, known), "little", signed=True)
