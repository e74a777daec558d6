"""Where messages to the engine come in: an ordered stream, taken in bounded portions."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import msgspec
import zmq

from sessile.contract.messages import ToEngine

MESSAGES_PER_TURN_MAX = 256
BYTES_PER_TURN_MAX = 4 * 2**20
"""What one turn of the loop takes in at most (H69): a burst is spread over several steps instead of stalling one."""


class Inbox(Protocol):
    """The ordered stream of messages to an engine."""

    def take(self, wait_ns: int) -> list[ToEngine]:
        """The messages that have come, oldest first, waiting up to wait_ns for the first; at most a turn's worth."""
        ...


class SocketInbox:
    """Messages from a connected zmq socket, one msgpack-encoded message a frame. The socket stays its caller's."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def take(self, wait_ns: int) -> list[ToEngine]:
        """See Inbox. Raises ValueError for a frame that is no message, as msgspec does: the other end is our server."""
        if wait_ns and not self._socket.poll(-(-wait_ns // 1_000_000)):
            return []
        messages: list[ToEngine] = []
        taken_bytes = 0
        while len(messages) < MESSAGES_PER_TURN_MAX and taken_bytes < BYTES_PER_TURN_MAX:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(self._decoder.decode(frame))
            taken_bytes += len(frame)
        return messages


class LocalInbox:
    """Messages put in by the same thread, for an engine without a process of its own. Never waits."""

    def __init__(self, messages: Iterable[ToEngine] = ()) -> None:
        self._messages = deque(messages)

    def put(self, message: ToEngine) -> None:
        """Append a message to the stream."""
        self._messages.append(message)

    def take(self, wait_ns: int) -> list[ToEngine]:
        """See Inbox; returns at once, as nobody could put anything in meanwhile."""
        portion = min(len(self._messages), MESSAGES_PER_TURN_MAX)
        return [self._messages.popleft() for _ in range(portion)]
