"""A session: a committed history and, while it is warm, the parked KV of it.

A turn is a transaction. While it is in flight the history stays as it was; only a finished turn appends to it, and
then history and KV length change together. The KV of a session is with exactly one holder: with the request while the
turn runs, else parked here. Parked KV is reclaimable page by page from its tail; the session is whole without it.
"""

from array import array

from sessile.core.history import History
from sessile.core.ledger import Lease
from sessile.core.prefix import Pin
from sessile.units import RequestKey


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


class Session:
    """One conversation. `turn` names the request that has the right to be in flight, queued or preempted included."""

    __slots__ = (
        "closing", "history", "id", "idle_timeout_ns", "last_use", "last_used_ns", "metadata", "namespace",
        "opened_ns", "parked", "serial", "tokens_max", "turn", "turn_ends",
    )  # fmt: skip

    def __init__(
        self,
        session_id: str,
        serial: int,
        *,
        now_ns: int,
        idle_timeout_ns: int | None,
        tokens_max: int,
        metadata: dict[str, str],
    ) -> None:
        self.id = session_id
        self.serial = serial
        """Never used again, so that a late timer cannot name a new session of the same id (H75)."""
        self.namespace = ""
        """Key of the tree's root: sequences of different namespaces never share a page."""
        self.history = History()
        self.turn_ends = array("q")
        """Length of the history after each committed turn."""
        self.turn: RequestKey | None = None
        """The mark belongs to a request: only the end of that very request clears it (H25, H33)."""
        self.parked: ParkedKv | None = None
        self.closing = False
        self.opened_ns = now_ns
        self.last_used_ns = now_ns
        """When the last turn ended; refused turns do not move it (H40)."""
        self.last_use = 0
        """The same in the prefix tree's clock, for the order of reclaiming."""
        self.idle_timeout_ns = idle_timeout_ns
        self.tokens_max = tokens_max
        self.metadata = metadata

    @property
    def turns(self) -> int:
        """Committed turns."""
        return len(self.turn_ends)

    def cut_history(self, history: History, turn_ends: "array[int]") -> None:
        """Take over a history and the ends of those turns that lie in it."""
        self.history = history
        self.turn_ends = array("q", (end for end in turn_ends if end <= len(history)))
