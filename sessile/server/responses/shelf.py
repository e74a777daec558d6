"""A shelf: what the server keeps for its clients by id, bounded for each tenant in number, bytes and idle time."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Keepable(Protocol):
    """What a shelf keeps: whose it is, how it is called, how many bytes it counts for, and when it was used last."""

    id: str
    tenant: str
    size_bytes: int
    used_s: float


Kept = TypeVar("Kept", bound=Keepable)


class Shelf(Generic[Kept]):
    """By tenant and id, those used least recently first. What leaves, whatever the reason, is passed to let_go once."""

    def __init__(
        self,
        *,
        count_max: int,
        bytes_max: int,
        idle_s: float,
        let_go: Callable[[Kept], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._idle_s = idle_s
        self._let_go = let_go
        self._clock = clock
        self._kept: dict[str, OrderedDict[str, Kept]] = {}
        self._bytes: dict[str, int] = {}

    def put(self, kept: Kept) -> None:
        """Keep something new; what is beyond a limit then, or idle for too long, is let go, oldest first."""
        self._kept.setdefault(kept.tenant, OrderedDict())[kept.id] = kept
        self._bytes[kept.tenant] = self._bytes.get(kept.tenant, 0) + kept.size_bytes
        kept.used_s = self._clock()
        self._trim(kept.tenant)

    def find(self, tenant: str, kept_id: str) -> Kept | None:
        """What a tenant has under an id, which counts as its use; None if nothing: another tenant's is not there."""
        self.expire()
        kept = self._kept.get(tenant, OrderedDict()).get(kept_id)
        if kept is not None:
            kept.used_s = self._clock()
            self._kept[tenant].move_to_end(kept_id)
        return kept

    def resize(self, kept: Kept, size_bytes: int) -> None:
        """Count something for another number of bytes."""
        change, kept.size_bytes = size_bytes - kept.size_bytes, size_bytes
        if self._kept.get(kept.tenant, OrderedDict()).get(kept.id) is kept:
            self._bytes[kept.tenant] += change
            self._trim(kept.tenant)

    def remove(self, kept: Kept) -> None:
        """Let something go; nothing happens if that was done before."""
        own = self._kept.get(kept.tenant, OrderedDict())
        if own.get(kept.id) is not kept:
            return
        del own[kept.id]
        self._bytes[kept.tenant] -= kept.size_bytes
        if not own:
            del self._kept[kept.tenant], self._bytes[kept.tenant]
        self._let_go(kept)

    def _trim(self, tenant: str) -> None:
        self.expire()
        while own := self._kept.get(tenant):
            if len(own) <= self._count_max and self._bytes[tenant] <= self._bytes_max:
                break
            self.remove(next(iter(own.values())))

    def expire(self) -> None:
        """Let go of what was not used for too long."""
        due_s = self._clock() - self._idle_s
        for own in list(self._kept.values()):
            while own and (oldest := next(iter(own.values()))).used_s < due_s:
                self.remove(oldest)
