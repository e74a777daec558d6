"""The inbox: an ordered stream, taken in bounded portions."""

from collections.abc import Iterator

import msgspec
import pytest
import zmq

from sessile.contract.messages import Cancel, Sampling, Submit
from sessile.engine.inbox import BYTES_PER_TURN_MAX, MESSAGES_PER_TURN_MAX, SocketInbox

WAIT_NS = 5 * 10**9


@pytest.fixture
def ends() -> "Iterator[tuple[zmq.Socket[bytes], SocketInbox]]":
    context = zmq.Context()
    server, engine = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket in (server, engine):
        socket.set_hwm(0)
    server.bind("inproc://link")
    engine.connect("inproc://link")
    yield server, SocketInbox(engine)
    server.close(linger=0)
    engine.close(linger=0)
    context.term()


Ends = tuple["zmq.Socket[bytes]", SocketInbox]


def test_nothing_comes_of_waiting_in_vain(ends: Ends) -> None:
    assert ends[1].take(1_000_000) == []


def test_messages_come_in_order_of_sending(ends: Ends) -> None:
    server, inbox = ends
    for key in range(5):
        server.send(msgspec.msgpack.encode(Cancel(key)))
    assert inbox.take(WAIT_NS) == [Cancel(key) for key in range(5)]


def test_h69_a_burst_is_taken_in_portions(ends: Ends) -> None:
    server, inbox = ends
    for key in range(MESSAGES_PER_TURN_MAX + 3):
        server.send(msgspec.msgpack.encode(Cancel(key)))
    assert [len(inbox.take(WAIT_NS)) for _ in range(2)] == [MESSAGES_PER_TURN_MAX, 3]


def test_h69_large_messages_are_taken_a_few_at_a_time(ends: Ends) -> None:
    server, inbox = ends
    large = Submit(key=1, tokens=bytes(BYTES_PER_TURN_MAX // 2), sampling=Sampling(seed=0))
    for _ in range(5):
        server.send(msgspec.msgpack.encode(large))
    assert [len(inbox.take(WAIT_NS)) for _ in range(3)] == [2, 2, 1]


def test_a_frame_that_is_no_message_is_an_error(ends: Ends) -> None:
    server, inbox = ends
    server.send(b"\xc1")
    with pytest.raises(msgspec.DecodeError):
        inbox.take(WAIT_NS)
