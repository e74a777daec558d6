"""What /v1/pool shows: every page of KV and every row by its owner."""

import msgspec


class PoolHolder(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A request that runs, or a session or turn of a branching one with parked KV or a reserve, and its pages."""

    key: int | None = None
    """Of a request."""
    session: str | None = None
    """Of a session with parked KV or a reserve, or of the request that is a turn of it."""
    tenant: str = ""
    phase: str
    """"running"; of a parked session "idle", "queued", "preempted" or "closing"."""
    own_pages: int
    shared_pages: int
    """Pages of the tree that it reads; they are TREE's, and counted there."""
    reserve_pages: int = 0
    """Of its own pages, those that hold no KV."""
    row: int | None = None


class PoolView(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Every page of the pool and every row by owner.

    pages_total = free + limbo + tree_pinned + tree_parked + tree_unpinned + scratch + quarantine + request_pages +
    session_pages. The last two are the own pages of all holders and of the rest.
    """

    page_size: int
    pages_total: int
    free: int
    limbo: list[tuple[int, int]]
    """(step, pages that wait for it to settle), in order of steps."""
    tree_pinned: int
    """Read by running requests, or kept by reservations."""
    tree_parked: int
    """Read by parked sessions alone."""
    tree_unpinned: int
    scratch: int
    quarantine: int
    request_pages: int
    session_pages: int
    """Parked KV, and reserves."""
    rows_total: int
    requests_running: int
    requests_waiting: int
    requests_draining: int
    """A running or draining request holds one row."""
    sessions_open: int
    sessions_idle: int
    session_tokens: int
    holders: list[PoolHolder]
    """Those that own most pages, in that order."""
    rest_requests: int
    rest_sessions: int
    rest_own_pages: int
