"""Server-sent events: one `data:` line of JSON an event, `data: [DONE]` at the end."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sessile.server.calls import Call, attended

DONE = b"data: [DONE]\n\n"
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
    """

    def __init__(self, calls: Sequence[Call], events: AsyncIterator[bytes], *, end: bytes = DONE) -> None:
        """end: what is sent behind the last event."""
        super().__init__()
        self._end = end
        self._calls = calls
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with attended(receive, *self._calls):
            started = False
            async for chunk in self._events:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            assert started, "an event stream has at least its end"
            await send({"type": "http.response.body", "body": self._end, "more_body": False})
