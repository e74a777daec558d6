"""A client that costs little beside the server that it measures: asyncio and a parser in C, one packet at a time.

What a client for users has beyond it (`AsyncClient`) is left out: keys, patience, redirects. A reply that is neither
chunked nor tells its length counts as broken off.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Self, Unpack

import httptools
import httpx
import orjson

from sessile.client.protocol import CONNECT_TIMEOUT_S, Turn, broken_off, content_of, http_options, unreachable
from sessile.completion import GenerateFields, Generation, Piece, Prompt


class LeanClient:
    """Talks to one server, over as many connections as there are requests at once; nothing is sent twice.

    A context manager. Raises the UserErrors that the server raised, as far as its reply tells, and NotReady if it
    cannot be reached or its answer breaks off.
    """

    def __init__(self, url: str) -> None:
        """Raises StartupError for what is no address of a server."""
        http_options(url, None)
        where = httpx.URL(url)
        self.url = url
        self._tls = ssl.create_default_context() if where.scheme == "https" else None
        self._host, self._port = where.host, where.port or (443 if self._tls else 80)
        self._prefix = where.path.rstrip("/")
        self._shared_head = b"host: %s\r\ncontent-type: application/json\r\n" % where.netloc
        self._idle: list[_Connection] = []

    def generate(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> Generation:
        """Complete a prompt, given as text or token ids: await it for the whole, iterate over it for pieces."""
        return Generation(self.pieces(Turn(prompt, fields)))

    async def pieces(self, turn: Turn) -> AsyncGenerator[Piece, None]:
        """Send a turn; what is new of its output, event by event."""
        async with self._sent("POST", "/generate", turn.body) as connection:
            if await connection.status() != httpx.codes.OK:
                content_of(await connection.reply())
            rest = b""
            while received := await connection.received():
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    if piece := turn.take(line):
                        yield piece
            if not turn.is_done:
                raise broken_off()

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request; the JSON of its reply."""
        return content_of(await self.exchange(method, path, body))

    async def exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """The same, but whatever the server answers is the reply."""
        async with self._sent(method, path, body) as connection:
            return await connection.reply()

    async def close(self) -> None:
        """Close all connections. May be called again."""
        while self._idle:
            self._idle.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> "AsyncIterator[_Connection]":
        """A connection with a request on it. It is kept for the next one if the reply was read whole, else closed."""
        content = b"" if body is None else orjson.dumps(body)
        line = f"{method} {self._prefix}{path} HTTP/1.1\r\n".encode()
        try:
            connection = await self._connection()
            try:
                connection.send(b"%s%scontent-length: %d\r\n\r\n%s" % (line, self._shared_head, len(content), content))
                yield connection
            finally:
                if connection.is_free:
                    connection.renew()
                    self._idle.append(connection)
                else:
                    connection.close()
        except httpx.TransportError as error:
            raise unreachable(self.url, error) from error

    async def _connection(self) -> "_Connection":
        """One that is open, of those that were used last. Raises httpx.ConnectError."""
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        loop = asyncio.get_running_loop()
        making = loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        try:
            _, connection = await asyncio.wait_for(making, CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection in {CONNECT_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection: a request, its reply, and then another. Its reader is woken once a packet.

    Whatever breaks off raises httpx.TransportError, but only after all that came before.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._lost: httpx.TransportError | None = None
        self._reader: asyncio.Future[None] | None = None
        self.renew()

    def renew(self) -> None:
        """Be ready for another reply; the last one was read whole."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._status = 0  # until the head has come
        self._is_whole = self._is_kept = False

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return self._lost is None

    @property
    def is_free(self) -> bool:
        """Whether its reply was read whole and the server keeps the connection for another."""
        return self.is_open and self._is_whole and self._is_kept and not self._body

    def send(self, request: bytes) -> None:
        """Send a request."""
        assert self._transport is not None, "a connection that was made"
        self._transport.write(request)

    def close(self) -> None:
        """Close it. May be called again."""
        assert self._transport is not None, "a connection that was made"
        self._transport.close()

    async def status(self) -> int:
        """The reply's status, once its head has come."""
        while not self._status:
            await self._news()
        return self._status

    async def received(self) -> bytes:
        """What has come of the body since the last call, at least something; empty at its end."""
        while not self._body and not self._is_whole:
            await self._news()
        received, self._body = b"".join(self._body), []
        return received

    async def reply(self) -> httpx.Response:
        """The whole reply."""
        status, content = await self.status(), b""
        while received := await self.received():
            content += received
        return httpx.Response(status, headers=self._headers, content=content)

    async def _news(self) -> None:
        """Wait for the next packet. Raises the error that ended the connection."""
        if self._lost is not None:
            raise self._lost
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._lost = self._lost or (httpx.ReadError(str(exc)) if exc else broken_off())
        self._wake()

    def data_received(self, received: bytes) -> None:
        """Called by asyncio with a packet."""
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserError as error:
            self._lost = httpx.RemoteProtocolError(f"it does not answer as HTTP says: {error}")
            self.close()
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by httptools."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by httptools with what it has of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Called by httptools."""
        self._is_whole, self._is_kept = True, self._parser.should_keep_alive()
