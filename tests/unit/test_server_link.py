"""The link's server side, with the engine's end of the socket in the test's hand."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from sessile.contract.messages import (
    Batch,
    Cancel,
    CloseSession,
    Done,
    DropTurn,
    EngineFailed,
    EngineReady,
    FromEngine,
    GetStats,
    OpenSession,
    Outcome,
    Refusal,
    Reply,
    RestoreSession,
    Sampling,
    Submit,
    ToEngine,
    pack_tokens,
)
from sessile.errors import NotReady, UserError
from sessile.server.histories import Histories
from sessile.server.link import Arrival, EngineLink
from tests.http.fake_engine import READY

Scenario = Callable[[EngineLink, "Peer"], Awaitable[None]]


class Peer:
    """The engine's end."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket

    async def send(self, message: FromEngine) -> None:
        await self._socket.send(msgspec.msgpack.encode(message))

    async def receive(self) -> ToEngine:
        frame = await asyncio.wait_for(self._socket.recv(), 5)
        return msgspec.msgpack.decode(frame, type=ToEngine)


@asynccontextmanager
async def linked(
    folder: Path, lag_tokens_max: int, ready: EngineReady | None
) -> AsyncIterator[tuple[EngineLink, Peer]]:
    link = EngineLink(f"ipc://{folder}/link", lag_tokens_max=lag_tokens_max, histories=Histories(1 << 20))
    link.start()
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(link.address)
    peer = Peer(socket)
    if ready is not None:
        await peer.send(ready)
        await asyncio.wait_for(link.wait_ready(), 5)
    try:
        yield link, peer
    finally:
        await link.close()
        socket.close(linger=0)
        context.term()


def run(folder: Path, scenario: Scenario, *, lag_tokens_max: int = 100, ready: EngineReady | None = READY) -> None:
    async def main() -> None:
        async with linked(folder, lag_tokens_max, ready) as (link, peer):
            await asyncio.wait_for(scenario(link, peer), 10)

    asyncio.run(main())


def submit(key: int) -> Submit:
    return Submit(key=key, tokens=b"", sampling=Sampling(seed=0))


def batch(deltas: dict[int, list[int]], **effects: object) -> Batch:
    return Batch(
        step=1,
        delta_keys=np.array(list(deltas), "<i8").tobytes(),
        delta_counts=np.array([len(tokens) for tokens in deltas.values()], "<i4").tobytes(),
        delta_tokens=pack_tokens([token for tokens in deltas.values() for token in tokens]),
        **effects,
    )


def test_deltas_of_one_batch_reach_their_own_requests(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        streams = [link.submit(submit(key), whole=False) for key in (1, 2, 3)]
        await peer.send(batch({3: [30], 1: [10, 11]}, done=[Done(key=2, reason="length")]))
        first, second, third = [await stream.next() for stream in streams]
        assert (first.tokens, third.tokens) == ([10, 11], [30])
        assert second.done is not None and second.done.reason == "length"
        assert link.in_flight == 2

    run(tmp_path, scenario)


def test_tokens_and_end_of_one_batch_arrive_together(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=False)
        await peer.send(batch({1: [5]}, done=[Done(key=1, reason="stop", matched=5)]))
        arrival = await stream.next()
        assert arrival.tokens == [5]
        assert arrival.done is not None

    run(tmp_path, scenario)


def test_a_lagging_reader_gets_several_steps_at_once(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=False)
        for token in (1, 2, 3):
            await peer.send(batch({1: [token]}))
        await until(lambda: len(stream._arrival.tokens) == 3)
        assert (await stream.next()).tokens == [1, 2, 3]

    run(tmp_path, scenario)


def test_whoever_wants_the_whole_is_woken_once(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=True)
        reading = asyncio.create_task(stream.next())
        for token in (1, 2):
            await peer.send(batch({1: [token]}))
        await until(lambda: stream.last_s > stream.first_s > 0)
        assert not reading.done()
        await peer.send(batch({}, done=[Done(key=1, reason="stop")]))
        assert (await reading).tokens == [1, 2]

    run(tmp_path, scenario)


def test_h53_a_reader_beyond_the_lag_limit_is_cancelled_with_a_reason(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=False)
        assert isinstance(await peer.receive(), Submit)
        await peer.send(batch({1: [1, 2, 3]}))
        cancel = await peer.receive()
        assert isinstance(cancel, Cancel) and "over 2 tokens wait" in cancel.message
        arrival = await stream.next()
        assert arrival.done is not None and arrival.done.reason == "abort"

    run(tmp_path, scenario, lag_tokens_max=2)


def test_what_comes_with_the_end_is_no_lag(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=False)
        await peer.send(batch({1: [1, 2, 3]}, done=[Done(key=1, reason="stop")]))
        arrival: Arrival = await stream.next()
        assert arrival.tokens == [1, 2, 3]
        assert arrival.done is not None and arrival.done.reason == "stop"

    run(tmp_path, scenario, lag_tokens_max=2)


def test_a_whole_answer_may_be_longer_than_the_lag_limit(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=True)
        await peer.send(batch({1: [1, 2, 3]}, done=[Done(key=1, reason="stop")]))
        arrival: Arrival = await stream.next()
        assert arrival.done is not None and arrival.done.reason == "stop"

    run(tmp_path, scenario, lag_tokens_max=2)


def test_h52_a_reply_finds_its_waiter_however_fast_it_comes(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        async def answer() -> None:
            for _ in range(200):
                message = await peer.receive()
                assert isinstance(message, Submit)
                await peer.send(batch({message.key: [7]}, done=[Done(key=message.key, reason="stop")]))

        answering = asyncio.create_task(answer())
        for key in range(1, 201):
            assert (await link.submit(submit(key), whole=True).next()).tokens == [7]
        await answering

    run(tmp_path, scenario)


def test_an_operation_gets_its_own_reply_or_refusal(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        first, second = asyncio.create_task(link.ask(GetStats)), asyncio.create_task(link.ask(GetStats))
        ops = [(await peer.receive()).op for _ in range(2)]
        refusal = Refusal(404, "not_found", "no such session", "id")
        await peer.send(batch({}, replies=[Reply(ops[1], error=refusal), Reply(ops[0], Outcome({"n": 1}))]))
        assert (await first).values == {"n": 1}
        with pytest.raises(UserError) as refused:
            await second
        assert (refused.value.status, refused.value.code, refused.value.param) == (404, "not_found", "id")

    run(tmp_path, scenario)


def test_effects_of_requests_that_were_abandoned_are_ignored(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        link.submit(submit(1), whole=False)
        kept = link.submit(submit(2), whole=False)
        link.abandon(1, "left")
        link.abandon(1, "left")
        await peer.send(batch({1: [1], 2: [2]}, done=[Done(key=1, reason="abort")]))
        assert (await kept.next()).tokens == [2]
        messages = [await peer.receive() for _ in range(3)]
        assert [type(message) for message in messages] == [Submit, Submit, Cancel]

    run(tmp_path, scenario)


def test_failure_ends_every_waiter_and_every_later_call(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=True)
        asking = asyncio.create_task(link.ask(GetStats))
        await asyncio.sleep(0)
        await peer.send(EngineFailed("out of memory"))
        done = (await stream.next()).done
        assert done is not None and (done.status, done.message) == (503, "out of memory")
        with pytest.raises(NotReady, match="out of memory"):
            await asking
        with pytest.raises(NotReady, match="out of memory"):
            link.submit(submit(2), whole=True)
        assert link.in_flight == 0

    run(tmp_path, scenario)


def test_nothing_is_sent_before_the_engine_is_ready(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        with pytest.raises(NotReady, match="loading the model"):
            link.submit(submit(1), whole=True)
        with pytest.raises(NotReady, match="loading the model"):
            await link.ask(GetStats)

    run(tmp_path, scenario, ready=None)


def test_a_message_that_makes_no_sense_breaks_the_link_loudly(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        stream = link.submit(submit(1), whole=True)
        await peer.send(Batch(step=1, delta_keys=b"\0" * 8, delta_counts=b"\1\0\0\0"))
        done = (await stream.next()).done
        assert done is not None and "the link to the engine broke" in done.message

    run(tmp_path, scenario)


def test_splitting_a_step_of_256_requests_is_quick(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        keys = range(1, 257)
        streams = [link.submit(submit(key), whole=False) for key in keys]
        message = batch({key: [key] for key in keys})
        times = []
        for _ in range(20):
            start_s = time.process_time()
            link._take_batch(message)
            times.append(time.process_time() - start_s)
        assert min(times) < 0.005
        assert len((await streams[-1].next()).tokens) == 20

    run(tmp_path, scenario)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_a_request_that_cannot_be_sent_is_not_in_flight(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        with pytest.raises(OverflowError):
            link.submit(Submit(key=1, tokens=b"", sampling=Sampling(seed=0), prompt_logprobs_from=1 << 64), whole=True)
        assert link.in_flight == 0

    run(tmp_path, scenario)


# -- between two engines -------------------------------------------------------------------------------------------


async def open_session(link: EngineLink, peer: Peer, session: str) -> None:
    opening = asyncio.create_task(link.ask(lambda op: OpenSession(op=op, session=session)))
    message = await peer.receive()
    assert isinstance(message, OpenSession)
    await peer.send(batch({}, replies=[Reply(message.op)]))
    await opening


@asynccontextmanager
async def next_peer(link: EngineLink, folder: Path) -> AsyncIterator[Peer]:
    """The next engine's end, which has said that it is ready."""
    await link.reopen(f"ipc://{folder}/next")
    with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(link.address)
        peer = Peer(socket)
        await peer.send(READY)
        yield peer


def test_what_is_sent_while_no_engine_is_there_is_nothing_to_the_next_one(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        link.fail("gone")
        link.send(DropTurn(7, "s", "turn"))
        async with next_peer(link, tmp_path) as following:
            await link.wait_ready()
            link.send(CloseSession(7, "s"))
            assert await following.receive() == CloseSession(7, "s")
            await following.send(batch({}, replies=[Reply(7, Outcome({"closed": True, "deferred": False}))]))
            await following.send(batch({}, replies=[Reply(7, Outcome({}))]))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(link.wait_failed(), 0.2)

    run(tmp_path, scenario)


def test_a_session_that_is_closed_while_it_comes_back_is_closed_once_it_has(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        await open_session(link, peer, "s")
        link.fail("gone")
        async with next_peer(link, tmp_path) as following:
            restoring = await following.receive()
            assert isinstance(restoring, RestoreSession)
            link.tell(lambda op: CloseSession(op, "s"))
            await following.send(batch({}, replies=[Reply(restoring.op)]))
            closing = await following.receive()
            assert isinstance(closing, CloseSession) and closing.session == "s"
            await link.wait_ready()
            assert link.histories.is_empty and link.histories.lost_total == 0

    run(tmp_path, scenario)


def test_an_operation_that_is_begun_as_its_engine_falls_is_told_so(tmp_path: Path) -> None:
    async def scenario(link: EngineLink, peer: Peer) -> None:
        await open_session(link, peer, "s")
        link.fail("gone")
        async with next_peer(link, tmp_path):
            asked = link.histories.restore(link._ask)
            link.fail("gone as well")
            with pytest.raises(NotReady, match="as well"):
                await asyncio.wait_for(asked, 2)

    run(tmp_path, scenario)
