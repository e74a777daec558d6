"""How many connections there may be, and what each may cost: bytes of its head, time to arrive, and time to be read.

uvicorn bounds none of it: a head without end is kept in memory, one that never ends keeps its connection, and so does a
client that takes nothing of what it was sent. Bodies are bounded where they are read (body.py), streams where they are
written (link.py).
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

UNREAD_TIMEOUT_S = 60.0
"""How long a client may take nothing while more than a buffer of 64 KiB waits for it."""


def bounded_http(connections_max: int) -> "type[BoundedHttp]":
    """The protocol for a server with so many connections at most."""
    return type("BoundedHttp", (BoundedHttp,), {"connections_max": connections_max})


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with those bounds: 503 beyond the first, 431 beyond the second, else the connection's end."""

    connections_max = 3000

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Bytes since the head began, or since the last chunk ended, that are no body.
        self._bare_bytes = 0
        self._arrival: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is due from now on."""
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            self._turn_away(
                b"503 Service Unavailable\r\nretry-after: 1",
                f"{self.connections_max} connections are open, which is the limit: try again later",
            )
        else:
            self._expect(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._expect(None)
        self._stop_waiting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called when more than a buffer waits for the client: from now on it has to take some of it now and then."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """Called when the client has taken most of it."""
        self._stop_waiting()
        super().resume_writing()

    def _await_reading(self) -> None:
        waiting_bytes = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < waiting_bytes:
                self._await_reading()
            else:
                self.transport.abort()  # a polite end would wait for the client to take the rest

        self._stop_waiting()
        self._reading = self.loop.call_later(UNREAD_TIMEOUT_S, look)

    def _stop_waiting(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def data_received(self, received: bytes) -> None:
        """Feed the parser, unless the client was turned away.

        What a read adds beyond the limit is seen after it, and reads are bounded themselves.
        """
        if self.transport.is_closing():
            return
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
            self._turn_away(b"431 Request Header Fields Too Large", message)
        else:
            self.transport.close()

    def _turn_away(self, status: bytes, message: str) -> None:
        """Answer and close the connection; status: with further headers, if there are any."""
        content = orjson.dumps({"error": {"message": message}})
        self.transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, len(content), content)
        )
        self.transport.close()
