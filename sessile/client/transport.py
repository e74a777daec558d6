"""Many requests at a time for httpx, each at the cost that one alone has."""

import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import httpx

UNUSED_S = 5.0
"""How long a connection waits for another request before it is closed; httpx's own default."""


class SpreadTransport(httpx.AsyncBaseTransport):
    """One connection a request, each in a pool of its own; what was used last is used next.

    httpcore's pool looks at all its connections whenever a request begins or ends: with 256 streams that takes longer
    than all that is said on them.
    """

    def __init__(self) -> None:
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._pools: set[httpx.AsyncHTTPTransport] = set()
        self._unused: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()
        """Since when, and which; the one that was used last at the end."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Called by httpx. The connection is lent until the response is closed."""
        await self._close_unused()
        pool = self._unused.pop()[1] if self._unused else self._added()
        take_back = functools.partial(self._take_back, pool)
        try:
            response = await pool.handle_async_request(request)
        except BaseException:
            take_back()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Lent(response.stream, take_back)
        return response

    async def aclose(self) -> None:
        """Close all connections, those that are lent too."""
        self._unused.clear()
        while self._pools:
            await self._pools.pop().aclose()

    def _added(self) -> httpx.AsyncHTTPTransport:
        pool = httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=httpx.Limits(max_connections=1))
        self._pools.add(pool)
        return pool

    def _take_back(self, pool: httpx.AsyncHTTPTransport) -> None:
        self._unused.append((time.monotonic(), pool))

    async def _close_unused(self) -> None:
        """Close what nobody has needed for so long, so that a burst of requests leaves nothing behind."""
        while self._unused and time.monotonic() - self._unused[0][0] > UNUSED_S:
            _, pool = self._unused.popleft()
            self._pools.discard(pool)
            await pool.aclose()


class _Lent(httpx.AsyncByteStream):
    """The body of a response; its connection goes back when it is closed."""

    def __init__(self, body: httpx.AsyncByteStream, take_back: Callable[[], None]) -> None:
        self._body = body
        self._take_back: Callable[[], None] | None = take_back

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.__aiter__()

    async def aclose(self) -> None:
        """May be called again."""
        take_back, self._take_back = self._take_back, None
        try:
            await self._body.aclose()
        finally:
            if take_back is not None:
                take_back()
