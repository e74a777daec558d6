"""A wire to a server that breaks where a test says: between a client and what it talks to, connection by connection."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

READ_BYTES = 65_536
END = b"0\r\n\r\n"
"""How a chunked reply ends."""


class BrokenWire:
    """Listens on a port of its own and passes bytes on to a server. A context manager.

    breaks: what becomes of each reply to come, in order; those after the last pass whole. None: it passes whole. n: its
    first n bytes pass. "lost": the server says all of it, and nothing arrives. "refused": the request does not arrive.
    """

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._server = (where.hostname, where.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.breaks: list[int | str | None] = []
        self.requests = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "BrokenWire":
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """One connection, request by request, until one of them is broken."""
        with client, socket.create_connection(self._server) as server, contextlib.suppress(OSError):
            while request := read_request(client):
                self.requests += 1
                fate = self.breaks.pop(0) if self.breaks else None
                if fate == "refused":
                    return
                server.sendall(request)
                left = fate if isinstance(fate, int) else None
                for chunk in reply_of(server):
                    if fate == "lost":
                        continue
                    client.sendall(chunk if left is None else chunk[:left])
                    if left is not None:
                        left -= len(chunk)
                        if left <= 0:
                            return
                if fate is not None:
                    return


def read_request(client: socket.socket) -> bytes:
    """A whole request, or nothing if the client has left."""
    received = b""
    while True:
        head, found, body = received.partition(b"\r\n\r\n")
        if found and len(body) >= content_length(head):
            return received
        chunk = client.recv(READ_BYTES)
        if not chunk:
            return b""
        received += chunk


def reply_of(server: socket.socket) -> Iterator[bytes]:
    """A whole reply, as it comes."""
    received = b""
    while True:
        chunk = server.recv(READ_BYTES)
        if not chunk:
            return
        received += chunk
        yield chunk
        head, found, body = received.partition(b"\r\n\r\n")
        is_chunked = b"transfer-encoding: chunked" in head.lower()
        if found and (body.endswith(END) if is_chunked else len(body) >= content_length(head)):
            return


def content_length(head: bytes) -> int:
    """What a head announces; 0 if nothing."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0
