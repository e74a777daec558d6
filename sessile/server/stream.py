"""Server-sent events: one `data:` line of JSON an event, `data: [DONE]` at the end, a comment when nothing comes."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sessile.errors import UserError
from sessile.server.calls import Call, arrivals_of, attended
from sessile.server.link import Arrival, refusal_error
from sessile.server.replies import Surface, error_content
from sessile.server.request_ids import straight

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

    All that is to be said of an arrival goes out at once. The headers go with the first event: a UserError that `tell`
    raises before it becomes a plain error reply. Once something has gone out, whatever goes wrong is an event of its
    own: no stream ends without saying how.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        tell: Callable[[int, Arrival], bytes],
        *,
        end: bytes = DONE,
        fault: Callable[[UserError], bytes] | None = None,
    ) -> None:
        """tell: the events of what came for a call, given its index; it may have nothing to say, but not of all.

        end: what is sent behind the last event. fault: the event of an error; None: its JSON, without a name.
        """
        super().__init__()
        self._end = end
        self._fault = fault
        self._calls = calls
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send, straight(scope, send))
        every_s: float = scope["app"].state.service.options.stream_keep_alive_s
        async with attended(receive, *self._calls):
            alive = asyncio.create_task(wire.keep_alive(every_s))
            try:
                # As a task: each wake in here would run through all layers of the application around it otherwise.
                last = await asyncio.create_task(self._follow(wire))
            except UserError as error:
                if not wire.started:
                    raise
                last = self._told(scope, error)
            except Exception as error:
                if not wire.started:
                    raise
                log.exception("a stream broke off")
                shown = refusal_error(500, "internal_error", f"internal error: {type(error).__name__}")
                last = self._told(scope, shown)
            finally:
                alive.cancel()
            await wire.send(last + self._end, is_last=True)

    async def _follow(self, wire: "_Wire") -> bytes:
        """Tell of all arrivals; what is to be told of the last is returned, and goes out with the end."""
        tell, told, left = self._tell, b"", len(self._calls)
        if left > 1:
            async for index, arrival in arrivals_of(self._calls):
                told = tell(index, arrival)
                left -= arrival.done is not None
                if told and left:
                    await wire.send(told)
            return told
        call = self._calls[0]
        while True:
            told = tell(0, await call.next())
            if call.done is not None:
                return told
            if told:
                await wire.send(told)

    def _told(self, scope: Scope, error: UserError) -> bytes:
        """The event of an error."""
        return self._fault(error) if self._fault else event(error_content(Surface.of(scope["path"]), error))


class _Wire:
    """What has gone out of one stream; two may send, one after the other."""

    def __init__(self, send: Send, send_body: Send) -> None:
        self.started = False
        self._send = send
        self._send_body = send_body
        self._sent = 0
        self._starting = asyncio.Lock()

    async def send(self, chunk: bytes, *, is_last: bool = False) -> None:
        """Send a chunk, the headers before the first. Waits while the client does not read."""
        self._sent += 1
        if not self.started:
            await self._start()
        await self._send_body({"type": "http.response.body", "body": chunk, "more_body": not is_last})

    async def _start(self) -> None:
        async with self._starting:
            if not self.started:
                await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
                self.started = True

    async def keep_alive(self, every_s: float) -> None:
        """Send a comment whenever nothing else was sent for so long, until cancelled."""
        while True:
            sent = self._sent
            await asyncio.sleep(every_s)
            if sent == self._sent:
                await self.send(KEEP_ALIVE)
