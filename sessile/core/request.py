"""A request: one prompt or one turn of a session, from its submission to its one Done."""

from array import array
from enum import Enum, auto

import numpy as np

from sessile.contract.messages import Sampling
from sessile.core.history import History, Tokens
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

    base: the session's committed history, not to be changed while the turn runs. tail: the turn's own tokens, prompt
    and then output; the history gets them only when the turn commits.
    """

    __slots__ = (
        "arrival", "base", "base_tokens", "cached_tokens", "computed_tokens", "found", "goal_tokens", "key", "lease",
        "logprobs", "matcher", "namespace", "overtaken", "phase", "pin", "preempted_tokens", "preempting", "preemptions", "prompt_tokens",
        "publishing", "reached_tokens", "row", "sampling", "scored_tokens", "scores_from", "session", "share_key",
        "share_waits", "stop_ids", "tail",
    )  # fmt: skip

    def __init__(
        self, key: int, base: History, delta: Tokens, sampling: Sampling, goal_tokens: int, session: Session | None
    ) -> None:
        self.key = key
        self.session = session
        self.namespace = ""
        self.base = base
        self.base_tokens = len(base)
        self.tail = array("i", delta.tobytes())
        self.prompt_tokens = len(base) + len(delta)
        self.goal_tokens = goal_tokens
        self.sampling = sampling
        self.stop_ids: tuple[int, ...] = ()
        self.matcher: StopMatcher | None = StopMatcher(sampling.stop) if sampling.stop else None
        self.logprobs = -1
        self.scores_from = -1
        self.scored_tokens = 0
        """Prompt positions below this were scored already: a preempted request does not score them again."""
        self.arrival = 0
        self.phase = Phase.QUEUED
        self.preempting = False
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
        return self.matcher is not None or self.logprobs >= 0 or len(self.stop_ids) > STOP_COLUMNS

    def note_admission(self, start_tokens: int) -> None:
        """Note the KV that was there; what counts as cached is decided at the first admission."""
        if self.cached_tokens < 0:
            self.cached_tokens = start_tokens
            self.reached_tokens = start_tokens

    @property
    def known_tokens(self) -> int:
        """History, prompt and output so far."""
        return self.base_tokens + len(self.tail)

    @property
    def output_tokens(self) -> int:
        """Tokens emitted so far."""
        return self.base_tokens + len(self.tail) - self.prompt_tokens

    def tokens(self, start: int, stop: int) -> Tokens:
        """int32[stop - start] of the whole context; a copy. Costs what it returns, not what lies before."""
        base = self.base_tokens
        if start >= base:
            return np.array(self.tail[start - base : stop - base], np.int32)
        if stop <= base:
            return self.base.slice(start, stop)
        return np.concatenate((self.base.slice(start, base), np.array(self.tail[: stop - base], np.int32)))

    def token(self, position: int) -> int:
        """One token of the context."""
        if position >= self.base_tokens:
            return self.tail[position - self.base_tokens]
        return int(self.base.slice(position, position + 1)[0])
