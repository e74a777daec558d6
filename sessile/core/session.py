"""A session: a committed history and, while it is warm, the parked KV of it.

A turn is a transaction. While it is in flight the history stays as it was; only a finished turn appends to it, and
then history and KV length change together. The KV of a session is with exactly one holder: with the request while the
turn runs, else parked here. Parked KV is reclaimable page by page from its tail; the session is whole without it.
"""

from array import array
from dataclasses import dataclass

from sessile.contract.drafting import SequenceIndex
from sessile.contract.messages import Done, Scores, TokenDetail, with_key
from sessile.core.effects import Effects
from sessile.core.history import History, Packed
from sessile.core.ledger import Lease
from sessile.core.prefix import Pin
from sessile.core.tenants import Tenant
from sessile.units import RequestKey

SessionKey = tuple[str, str]
"""A tenant's name and a session's id."""


class ParkedKv:
    """KV at rest: a softly pinned tree prefix, the sequence's own pages behind it, and how many tokens they hold.

    ready_step: the newest step that may still touch the pages; a turn is admitted only once it has settled.
    """

    __slots__ = ("lease", "pin", "ready_step", "tokens")

    def __init__(self, lease: Lease, pin: Pin, tokens: int, ready_step: int) -> None:
        self.lease = lease
        self.pin = pin
        self.tokens = tokens
        self.ready_step = ready_step


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What the last turn of a session was answered, but for its tokens: those are in the history."""

    rid: str
    input: Packed
    """What the turn was sent with."""
    done: Done
    scores: tuple[Scores, ...]
    details: tuple[TokenDetail, ...]

    def repeat(self, effects: Effects, key: int, output: list[int]) -> None:
        """Say it again, to the request with this key."""
        for scores in self.scores:
            effects.scores(with_key(scores, key))
        if output:
            effects.delta(key, output)
        if self.details:
            effects.detail(
                TokenDetail(
                    key,
                    b"".join([detail.logprobs for detail in self.details]),
                    b"".join([detail.top_ids for detail in self.details]),
                    b"".join([detail.top_logprobs for detail in self.details]),
                )
            )
        effects.done(with_key(self.done, key))


class Session:
    """One conversation, or one turn of a branching one.

    `turn` names the request that has the right to be in flight, queued or preempted included.
    """

    __slots__ = (
        "base_tokens", "branching", "closing", "history", "id", "idle_timeout_ns", "index", "input_end", "last_use",
        "last_used_ns", "metadata", "nodes", "opened_ns", "parent", "parked", "reply", "reserve", "reserved_pages",
        "rid", "root", "serial", "tenant", "tokens_max", "turn", "turn_ends", "turns_in_flight",
    )  # fmt: skip

    def __init__(
        self,
        session_id: str,
        serial: int,
        tenant: Tenant,
        *,
        now_ns: int,
        idle_timeout_ns: int | None,
        tokens_max: int,
        metadata: dict[str, str],
        branching: bool = False,
    ) -> None:
        self.id = session_id
        self.serial = serial
        """Never used again, so that a late timer cannot name a new session of the same id (H75)."""
        self.tenant = tenant
        """Whose it is: nobody else finds it (H55)."""
        self.history = History()
        self.turn_ends = array("q")
        """Length of the history after each committed turn."""
        self.turn: RequestKey | None = None
        """The mark belongs to a request: only the end of that very request clears it (H25, H33)."""
        self.parked: ParkedKv | None = None
        self.index: SequenceIndex | None = None
        """Where drafts are looked up, between turns that draft; of no more tokens than the history has."""
        self.closing = False
        self.opened_ns = now_ns
        self.last_used_ns = now_ns
        """When the last turn ended; refused turns do not move it (H40)."""
        self.last_use = 0
        """The same in the prefix tree's clock, for the order of reclaiming."""
        self.idle_timeout_ns = idle_timeout_ns
        self.tokens_max = tokens_max
        self.metadata = metadata
        self.reply: StoredReply | None = None
        """That of the last committed turn, for a client that lost it (H59)."""
        self.reserved_pages = 0
        """Pages that are this session's whether it uses them or not."""
        self.reserve: Lease | None = None
        """Those of them that hold no KV now."""
        self.branching = branching
        self.nodes: dict[str, Session] = {}
        """Of a branching session, by rid: every turn, finished or in flight, is a node with a history of its own."""
        self.turns_in_flight = 0
        """Of a branching session: how many of its nodes have a turn in flight."""
        self.root: Session | None = None
        """Of a node: the branching session it belongs to."""
        self.rid = ""
        """Of a node: its turn."""
        self.parent: Session | None = None
        """Of a node: the node it goes on from; None for a new root."""
        self.base_tokens = 0
        """Of a node: with how many of its parent's tokens it begins."""
        self.input_end = 0
        """Of a node: where its turn's output begins."""

    @property
    def in_flight(self) -> bool:
        """Whether a turn of it is queued or runs."""
        return self.turn is not None or self.turns_in_flight > 0

    @property
    def key(self) -> SessionKey:
        """Its place in `Books.sessions`."""
        return self.tenant.policy.name, self.id

    @property
    def turns(self) -> int:
        """Committed turns."""
        return len(self.turn_ends)

    def cut_history(self, history: History, turn_ends: "array[int]") -> None:
        """Take over a history and the ends of those turns that lie in it; the index is cut with it."""
        self.history = history
        self.turn_ends = array("q", (end for end in turn_ends if end <= len(history)))
        self.cut_index()

    def cut_index(self) -> None:
        """Let the index forget what the history does not have."""
        if self.index is not None and self.index.tokens > len(self.history):
            self.index.truncate(len(self.history))
