"""Where effects of steps go out: one message a step."""

from typing import Protocol

import msgspec
import zmq

from sessile.contract.messages import Batch, EngineFailed, EngineReady, FromEngine


class Outbox(Protocol):
    """The ordered stream of messages from an engine."""

    def send(self, message: FromEngine) -> None:
        """Send a message; may block while the other end is far behind, never drops it."""
        ...


class SocketOutbox:
    """Messages to a connected zmq socket, one msgpack-encoded message a frame. The socket stays its caller's."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromEngine) -> None:
        """See Outbox."""
        self._socket.send(self._encoder.encode(message))


class LocalOutbox:
    """Batches kept for the thread that runs the engine itself."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []

    def send(self, message: FromEngine) -> None:
        """See Outbox; only batches are expected, as start and failure are seen by the thread directly."""
        assert not isinstance(message, (EngineReady, EngineFailed)), "start and failure are not batches"
        self._batches.append(message)

    def take(self) -> list[Batch]:
        """All batches since the last call, oldest first."""
        batches, self._batches = self._batches, []
        return batches
