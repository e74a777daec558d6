"""Groups: several answers to one prompt, which is computed once.

Whoever of a group runs first computes the prompt, and publishes its full pages as every plain request does. The others
wait for it, then start from what the tree has and from a copy of the page behind that, which only the first one owns.
If it ends before, whichever way, the next one takes its place. Nobody waits for one who does not run.
"""

from collections.abc import Sequence

from sessile.contract.messages import Submit
from sessile.core.prefix import Match
from sessile.core.request import Phase, Request
from sessile.core.rows import RowTable
from sessile.core.tenants import Tenant
from sessile.errors import InvalidRequest


class Groups:
    """The requests of each group that have not ended, in order of arrival."""

    def __init__(self) -> None:
        self._members: dict[int, list[Request]] = {}

    def __len__(self) -> int:
        return len(self._members)

    @property
    def requests(self) -> int:
        """Members of all groups together."""
        return sum([len(members) for members in self._members.values()])

    def size_of(self, group: int) -> tuple[int, int]:
        """(requests, input tokens) that a group has so far; of -1, which is none, nothing."""
        members = self._members.get(group, ())
        return len(members), sum([member.input_tokens for member in members])

    def has_begun(self, request: Request) -> bool:
        """Whether the request, or another one of its group, was ever admitted: together they are one client's wish."""
        return any([member.cached_tokens >= 0 for member in self._members.get(request.group, (request,))])

    def check(self, message: Submit, tenant: Tenant) -> None:
        """Raise InvalidRequest unless the request may be one of its group: alike in prompt and tenant, no turn."""
        members = self._members.get(message.group, ())
        if message.session is not None:
            raise InvalidRequest("group: a turn of a session cannot be one of several answers", param="n")
        if members and (members[0].delta != message.tokens or members[0].tenant is not tenant):
            raise InvalidRequest("group: its requests must have the same prompt", param="n")

    def enter(self, request: Request) -> None:
        """Count a request that came in."""
        if request.group >= 0:
            self._members.setdefault(request.group, []).append(request)

    def leave(self, request: Request) -> None:
        """Forget one that has ended."""
        if request.group >= 0:
            members = self._members[request.group]
            members.remove(request)
            if not members:
                del self._members[request.group]

    def leader_of(self, request: Request) -> Request | None:
        """The first other one of the group that runs; None if the request itself has to compute the prompt."""
        for other in self._members[request.group]:
            if other is not request and other.phase is Phase.RUNNING and other.lease is not None:
                return other
        return None

    def source_of(self, request: Request, rows: RowTable[Request], bound: Sequence[Request]) -> Request | None:
        """Another one of the group whose KV of the prompt, but for the last token, is known to be right; else None.

        bound: who is admitted in this very step, and whose row says nothing about it yet.
        """
        for other in self._members[request.group]:
            if other is request or other.phase is not Phase.RUNNING or other.lease is None or other in bound:
                continue
            if int(rows.settled[other.row]) >= other.prompt_tokens - 1:
                return other
        return None


def shared_tokens(request: Request, match: Match, page_size: int) -> int:
    """KV with which a request starts whose leader has the prompt.

    All but the prompt's last token if the tree has the full pages of that: what is less than a page can be copied.
    Prompt positions that are to be scored have to be computed again, so then it is what the tree has.
    """
    kv_tokens = request.prompt_tokens - 1
    if request.scores_left or match.pages != kv_tokens // page_size:
        return match.pages * page_size
    return kv_tokens
