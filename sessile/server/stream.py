"""Server-sent events: one `data:` line of JSON an event, `data: [DONE]` at the end, a comment when nothing comes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sessile.errors import UserError
from sessile.server.calls import Call, attended
from sessile.server.link import refusal_error
from sessile.server.replies import Surface, error_content

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients pass over: proxies end a connection that is silent for long, as behind a long prompt."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


LINE_BREAKS = {"\u0085".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}
"""What Unicode, and with it some clients, takes for the end of a line, and JSON does not: written as escapes."""


def event(content: Any) -> bytes:
    """One event, in one line by anybody's rules."""
    return b"data: " + one_line(orjson.dumps(content)) + b"\n\n"


def one_line(line: bytes) -> bytes:
    """JSON without what somebody may take for the end of a line."""
    for character, escape in LINE_BREAKS.items():
        if character in line:
            line = line.replace(character, escape)
    return line


class EventStream(Response):
    """Sends the calls, then their events as they come; the calls end with the client's connection.

    The headers go out with the first event: a UserError that `events` raises before it becomes a plain error reply.
    Once something has gone out, whatever goes wrong is an event of its own: no stream ends without saying how.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        events: AsyncIterator[bytes],
        *,
        end: bytes = DONE,
        fault: Callable[[UserError], bytes] | None = None,
    ) -> None:
        """end: what is sent behind the last event. fault: the event of an error; None: its JSON, without a name."""
        super().__init__()
        self._end = end
        self._fault = fault
        self._calls = calls
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send)
        every_s: float = scope["app"].state.service.options.stream_keep_alive_s
        async with attended(receive, *self._calls):
            alive = asyncio.create_task(wire.keep_alive(every_s))
            try:
                async for chunk in self._events:
                    await wire.send(chunk)
                assert wire.started, "an event stream has at least its end"
            except UserError as error:
                if not wire.started:
                    raise
                await wire.send(self._told(scope, error))
            except Exception as error:
                if not wire.started:
                    raise
                log.exception("a stream broke off")
                shown = refusal_error(500, "internal_error", f"internal error: {type(error).__name__}")
                await wire.send(self._told(scope, shown))
            finally:
                alive.cancel()
            await wire.send(self._end, is_last=True)

    def _told(self, scope: Scope, error: UserError) -> bytes:
        """The event of an error."""
        return self._fault(error) if self._fault else event(error_content(Surface.of(scope["path"]), error))


class _Wire:
    """What has gone out of one stream; two may send, one after the other."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._sent = 0
        self._lock = asyncio.Lock()

    async def send(self, chunk: bytes, *, is_last: bool = False) -> None:
        """Send a chunk, the headers before the first. Waits while the client does not read."""
        async with self._lock:
            self._sent += 1
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await self._send({"type": "http.response.body", "body": chunk, "more_body": not is_last})

    async def keep_alive(self, every_s: float) -> None:
        """Send a comment whenever nothing else was sent for so long, until cancelled."""
        while True:
            sent = self._sent
            await asyncio.sleep(every_s)
            if sent == self._sent:
                await self.send(KEEP_ALIVE)
