"""What one connection may cost before its request is one: bytes of its head and time to arrive.

uvicorn bounds neither: a head without end is kept in memory, and one that never ends keeps its connection. Bodies are
bounded where they are read (body.py), streams where they are written (link.py).
"""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 65_536
"""Request line and headers; as much again for what a client writes around one chunk of a body, and behind the last."""
HEAD_TIMEOUT_S = 30.0
"""From the connection, or from a request's first byte, to the end of its head."""
BODY_TIMEOUT_S = 300.0
"""From the end of the head to the end of the body."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with those bounds: 431 and the end of the connection beyond the first, its end otherwise."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Bytes since the head began, or since the last chunk ended, that are no body.
        self._bare_bytes = 0
        self._arrival: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is due from now on."""
        super().connection_made(transport)
        self._expect(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, received: bytes) -> None:
        """Feed the parser; what a read adds beyond the limit is seen after it, and reads are bounded themselves."""
        self._bare_bytes += len(received)
        super().data_received(received)
        if self._bare_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect(HEAD_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._expect(BODY_TIMEOUT_S)

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = max(0, self._bare_bytes - len(body))
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        """Called by httptools behind each chunk of a body."""
        self._bare_bytes = 0

    def on_message_complete(self) -> None:
        self._bare_bytes = 0
        self._expect(None)
        super().on_message_complete()

    def _expect(self, limit_s: float | None) -> None:
        """Close the connection unless what is due comes in time; None: nothing is due."""
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = None if limit_s is None else self.loop.call_later(limit_s, self._give_up)

    def _give_up(self) -> None:
        if self._is_in_head() and self._has_open_reply():
            self._expect(HEAD_TIMEOUT_S)  # the next request's head began early; the reply to the last one goes on
        else:
            self.transport.close()

    def _is_in_head(self) -> bool:
        return self.scope is None or "method" not in self.scope

    def _has_open_reply(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self) -> None:
        """End the connection, with 431 if no reply is on its way."""
        if not self._has_open_reply():
            message = f"the request's headers are over the limit of {HEAD_BYTES_MAX} bytes"
            content = orjson.dumps({"error": {"message": message}})
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(content), content)
            )
        self.transport.close()
