"""The waiting line: who is looked at first when there is room.

Each tenant has a line of its own: by priority, then in order of arrival, which survives preemption. Among tenants
whoever was served least for its weight goes first. Whoever was overtaken too often goes before all of them: priority
and fairness delay a request, they never starve it (H77).
"""

from bisect import bisect_left, insort

from sessile.core.request import Request
from sessile.core.tenants import Tenant


def _rank(request: Request) -> tuple[int, int]:
    return -request.priority, request.arrival


class WaitingLine:
    """QUEUED requests. `tokens`: what they have beyond committed histories."""

    def __init__(self, overtakes_max: int) -> None:
        self._overtakes_max = overtakes_max
        self._lines: dict[int, list[Request]] = {}
        """By the tenant's index, only tenants with somebody waiting; each sorted by `_rank`."""
        self._oldest: dict[int, Request] = {}
        """The first arrival of a line in which priorities differ, found when it is asked for."""
        self._urgent: list[Request] = []
        """Who was overtaken too often, in the order in which that came about."""
        self._length = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: Request) -> bool:
        line = self._lines.get(request.tenant.index, [])
        place = bisect_left(line, _rank(request), key=_rank)
        return place < len(line) and line[place] is request

    @property
    def tenants(self) -> list[Tenant]:
        """Tenants with somebody waiting."""
        return [line[0].tenant for line in self._lines.values()]

    def waiting_tokens_of(self, tenant: Tenant, enough: int) -> int:
        """Input tokens that wait in a tenant's line, counted from its front up to `enough`."""
        tokens = 0
        for request in self._lines.get(tenant.index, ()):
            tokens += request.known_tokens - request.base_tokens
            if tokens >= enough:
                return enough
        return tokens

    def enter(self, request: Request) -> None:
        """Put a request at its place."""
        line = self._lines.setdefault(request.tenant.index, [])
        self._length += 1
        self.tokens += request.known_tokens - request.base_tokens
        self._oldest.pop(request.tenant.index, None)
        if not line or _rank(line[-1]) < _rank(request):
            line.append(request)
        else:
            insort(line, request, key=_rank)

    def leave(self, request: Request) -> None:
        """Take a request out: it runs, or it has ended."""
        index = request.tenant.index
        line = self._lines[index]
        place = 0 if line[0] is request else bisect_left(line, _rank(request), key=_rank)
        assert line[place] is request, f"request {request.key} does not wait"
        del line[place]
        if not line:
            del self._lines[index]
        self._length -= 1
        self.tokens -= request.known_tokens - request.base_tokens
        if self._oldest.get(index) is request:
            del self._oldest[index]
        if request.urgent:
            self._urgent.remove(request)
            request.urgent = False

    def note_admitted(self, request: Request) -> None:
        """Count whom a request that was just taken out has overtaken by its priority."""
        index = request.tenant.index
        line = self._lines.get(index)
        if line is None or line[-1].priority >= request.priority:
            return
        oldest = self._oldest.get(index)
        if oldest is None:
            oldest = self._oldest[index] = min(line, key=lambda waiting: waiting.arrival)
        if oldest.arrival < request.arrival:
            self.note_overtaken(oldest)

    def note_overtaken(self, request: Request) -> None:
        """Count that a later request was admitted before this one; past the limit it goes before everybody."""
        request.overtaken += 1
        if request.overtaken >= self._overtakes_max and not request.urgent:
            request.urgent = True
            self._urgent.append(request)

    def first(self, count: int) -> list[Request]:
        """The requests to look at for admission, first to last, at most `count`."""
        if len(self._lines) == 1:
            (line,) = self._lines.values()
            if line[0].priority == line[-1].priority:
                return line[:count]
        chosen = self._urgent[:count]
        owed = {index: line[0].tenant.served for index, line in self._lines.items()}
        places = dict.fromkeys(self._lines, 0)
        while len(chosen) < count and owed:
            index = min(owed, key=lambda each: (owed[each], each))
            line, place = self._lines[index], places[index]
            request = line[place]
            if not request.urgent:
                chosen.append(request)
                owed[index] += request.tenant.cost_of(request.known_tokens - request.base_tokens)
            places[index] = place + 1
            if place + 1 == len(line):
                del owed[index]
        return chosen
