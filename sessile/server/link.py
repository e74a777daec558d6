"""The front end's side of the link to its engine: one PAIR socket, one message a frame, one wake a request a step.

The server binds an ipc:// path inside a directory that only its user may enter; the engine process connects. All
messages are structs of sessile.contract.messages in msgpack; nothing is ever pickled.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
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
    Refusal,
    Scores,
    SessionGone,
    Submit,
    ToEngine,
    TokenDetail,
    unpack_tokens,
)
from sessile.errors import NotReady, UserError
from sessile.server.histories import TOKEN_BYTES, Histories, Place
from sessile.server.request_log import RequestLog

log = logging.getLogger(__name__)

NOT_READY_YET = "the engine is still loading the model; try again in a moment"


@dataclass(slots=True)
class Arrival:
    """What came for one request since it was last looked at; done is set on the last one."""

    tokens: list[int] = field(default_factory=list)
    details: list[TokenDetail] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    done: Done | None = None


class Stream:
    """The way back of one request. The link puts in, one coroutine takes out.

    With whole, the reader is woken once, at the end. Without, at most lag_tokens_max tokens wait for the reader; a
    longer lag ends the request.
    """

    __slots__ = ("_arrival", "_lag_tokens_max", "_reader", "_whole", "first_s", "key", "last_s", "tokens")

    def __init__(self, key: int, *, whole: bool, lag_tokens_max: int) -> None:
        self.key = key
        self.first_s = 0.0
        """When the first token came, by time.perf_counter; 0.0 before it."""
        self.last_s = 0.0
        self.tokens = 0
        """How many have come."""
        self._arrival = Arrival()
        self._whole = whole
        self._lag_tokens_max = lag_tokens_max
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> Arrival:
        """Wait until something has come, then take all of it. Not to be called after an arrival with done."""
        if not self._has_news():
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        arrival, self._arrival = self._arrival, Arrival()
        return arrival

    def put_tokens(self, tokens: list[int], now_s: float) -> bool:
        """Add the tokens of one step; False if too many wait and the request must end."""
        if not self.first_s:
            self.first_s = now_s
        self.last_s = now_s
        self.tokens += len(tokens)
        self._arrival.tokens.extend(tokens)
        return self._whole or len(self._arrival.tokens) <= self._lag_tokens_max

    def put_detail(self, detail: TokenDetail) -> None:
        self._arrival.details.append(detail)

    def put_scores(self, scores: Scores) -> None:
        self._arrival.scores.append(scores)

    def end(self, done: Done) -> None:
        """The one end of the request; a second one is a bug of the sender."""
        assert self._arrival.done is None, f"request {self.key} ended twice"
        self._arrival.done = done

    def wake(self) -> None:
        """Let the reader run if there is anything for it. Called once a step."""
        if self._reader is not None and not self._reader.done() and self._has_news():
            self._reader.set_result(None)

    def _has_news(self) -> bool:
        arrival = self._arrival
        if arrival.done is not None:
            return True
        return not self._whole and bool(arrival.tokens or arrival.scores)


class EngineLink:
    """Sends messages to the engine and hands what comes back to those who wait for it.

    Owns the socket. After fail(), every waiter has got an error and every further call raises NotReady, until reopen()
    and the next engine's first message; nothing is sent meanwhile. That engine has got all sessions that are held
    before anybody else can ask it.
    """

    def __init__(
        self,
        address: str,
        *,
        lag_tokens_max: int = 4096,
        histories: Histories | None = None,
        request_log: RequestLog | None = None,
    ) -> None:
        self.address = address
        self.request_log = request_log
        """Where all that passes is noted for the simulator; None: nowhere."""
        self.histories = histories or Histories()
        """What is known of open sessions, for the next engine."""
        self.gone_listeners: list[Callable[[SessionGone], None]] = []
        """Called for each session that ended by itself, or was lost with an engine."""
        self.histories.on_lost = self._note_lost
        self._lag_tokens_max = lag_tokens_max
        self._ready: EngineReady | None = None
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._ready_or_failed = asyncio.Event()
        self._streams: dict[int, Stream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._ops = itertools.count(1)
        self._untold: list[DropTurn | CloseSession] = []
        """What the next engine has to be told once it has the sessions back."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._bound(address)
        self._tasks: list[asyncio.Task[None]] = []

    def _bound(self, address: str) -> "zmq.asyncio.Socket":
        socket = self._context.socket(zmq.PAIR)
        # What may wait is bounded by the engine's queue limit and by each stream's lag, not by a count of messages.
        socket.set_hwm(0)
        socket.bind(address)
        return socket

    def start(self) -> None:
        """Begin to receive; needs the running event loop."""
        self._begin(self._receive())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    async def _end_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reopen(self, address: str) -> None:
        """Wait for another engine, at another address: nothing that was meant for the last one reaches it."""
        assert self._failure is not None, "an engine is there, or on its way"
        await self._end_tasks()
        self._socket.close(linger=0)
        self.address, self._socket = address, self._bound(address)
        self._ready = self._failure = None
        self._failed.clear()
        self._ready_or_failed.clear()
        self.start()

    async def close(self) -> None:
        """Stop receiving and close the socket; what was sent still reaches a living engine."""
        await self._end_tasks()
        self._socket.close(linger=200)
        self._context.term()

    @property
    def ready(self) -> EngineReady:
        """What the engine serves. Raises NotReady before it said so and after it died."""
        if self._failure is not None:
            raise NotReady(self._failure)
        if self._ready is None:
            raise NotReady(NOT_READY_YET)
        return self._ready

    @property
    def last_ready(self) -> EngineReady | None:
        """What the engine serves, or served before it was lost; None before the first one said so."""
        return self._ready

    def check_ready(self) -> None:
        """Raise NotReady unless the engine is there to be asked."""
        assert self.ready

    @property
    def failure(self) -> str | None:
        """Why the engine is gone, or None."""
        return self._failure

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def wait_ready(self) -> EngineReady:
        """Wait for the engine's first message. Raises NotReady with the reason if it fails instead."""
        await self._ready_or_failed.wait()
        return self.ready

    async def wait_failed(self) -> str:
        """Wait until the engine is gone; why."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def submit(self, message: Submit, *, whole: bool) -> Stream:
        """Send a request and return its way back, which exists before the engine can answer (H52)."""
        self.check_ready()
        assert message.key not in self._streams, f"request key {message.key} used twice"
        frame = self._encoder.encode(message)  # Before anything is registered: what cannot be sent is not in flight.
        stream = Stream(message.key, whole=whole, lag_tokens_max=self._lag_tokens_max)
        refusal = self.histories.refusal(message)
        if refusal is not None:
            stream.end(refused(message.key, refusal))
            return stream
        self._streams[message.key] = stream
        self._note_sent(message)
        self._socket.send(frame)
        return stream

    def cancel(self, key: int, reason: str) -> None:
        """Ask the engine to end a request; its Done follows. Unknown and ended keys are ignored."""
        if key in self._streams:
            self.send(Cancel(key, reason))

    def give_up_waiting(self, key: int, reason: str) -> None:
        """Ask the engine to refuse a request that has not begun; one that has goes on."""
        if key in self._streams:
            self.send(Cancel(key, reason, if_waiting=True))

    def abandon(self, key: int, reason: str) -> None:
        """End a request that nobody reads any more: the engine is told, its waiter gets an abort at once."""
        stream = self._streams.pop(key, None)
        if stream is not None:
            self.send(Cancel(key, reason))
            stream.end(Done(key=key, reason="abort", message=reason))
            stream.wake()

    async def ask(self, make: Callable[[int], ToEngine]) -> Any:
        """Send the operation that make(op) builds; its reply's value, or the UserError that it carries."""
        self.check_ready()
        return await self._ask(make)

    async def _ask(self, make: Callable[[int], ToEngine]) -> Any:
        if self._failure is not None:
            raise NotReady(self._failure)
        op = next(self._ops)
        message = make(op)
        if (refusal := self.histories.refusal(message)) is not None:
            raise refusal_error(refusal.status, refusal.code, refusal.message, refusal.param)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[op] = reply
        try:
            self.send(message)
            return await reply
        finally:
            del self._replies[op]

    def tell(self, make: Callable[[int], DropTurn | CloseSession]) -> None:
        """Send the operation that make(op) builds, whose reply nobody waits for; it holds for the next engine too."""
        message = make(next(self._ops))
        if self._failure is None and self._ready is not None:
            self.send(message)
            return
        self.histories.follow(message)
        if self._failure is None:
            self._untold.append(message)

    def send(self, message: ToEngine) -> None:
        """Queue a message; messages arrive in order. Never waits: the socket has no high-water mark.

        Nothing is sent, nor noted as sent, after fail(): no engine would answer it, and the next one must not.
        """
        if self._failure is not None:
            return
        frame = self._encoder.encode(message)
        self._note_sent(message)
        self._socket.send(frame)

    def _note_sent(self, message: ToEngine) -> None:
        self.histories.note_sent(message)
        if self.request_log is not None:
            self.request_log.note_sent(message)

    def _note_lost(self, place: Place) -> None:
        tenant, session = place
        for listener in self.gone_listeners:
            listener(SessionGone(session, "lost", tenant))

    def fail(self, reason: str) -> None:
        """The engine is gone: end every request and every operation with the reason, now and from now on."""
        if self._failure is not None:
            return
        self._failure = reason
        self._failed.set()
        self._ready_or_failed.set()
        self._untold.clear()
        self.histories.note_engine_gone()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(Done(key=stream.key, reason="error", status=503, code=NotReady.code, message=reason))
            stream.wake()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(NotReady(reason))

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            message = self._decoder.decode(frame)
            if isinstance(message, Batch):
                self._take_batch(message)
            elif isinstance(message, EngineReady):
                if self.request_log is not None:
                    self.request_log.note_ready(message)
                self._begin(self._bring_back(message))
            else:
                assert isinstance(message, EngineFailed)
                self.fail(message.message)
            # With frames waiting, recv() returns at once; readers must get their turn after each step all the same.
            await asyncio.sleep(0)

    async def _bring_back(self, ready: EngineReady) -> None:
        """Give a new engine the sessions that it should have; only then it is there for everybody."""
        if not self.histories.is_empty:
            try:
                await self.histories.restore(self._ask)
            except NotReady:
                return  # It is gone as well.
        if self._failure is None:
            untold, self._untold = self._untold, []
            for message in untold:
                self.send(message)
            self._ready = ready
            self._ready_or_failed.set()

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the link to the engine broke", exc_info=error)
            self.fail(f"the link to the engine broke: {error}")

    def _take_batch(self, batch: Batch) -> None:
        """Split one step's effects among their requests, then wake each of them once."""
        woken: dict[int, Stream] = {}
        for scores in batch.scores:
            if (stream := self._streams.get(scores.key)) is not None:
                stream.put_scores(scores)
                woken[scores.key] = stream
        if batch.delta_keys:
            self._take_deltas(batch, woken)
        for detail in batch.details:
            if (stream := self._streams.get(detail.key)) is not None:
                stream.put_detail(detail)
        for done in batch.done:
            if (stream := self._streams.pop(done.key, None)) is not None:
                stream.end(done)
                woken[done.key] = stream
        for stream in woken.values():
            stream.wake()
        self.histories.note_batch(batch)
        if self.request_log is not None:
            self.request_log.note_batch(batch)
        for reply in batch.replies:
            self._take_reply(reply.op, reply.value, reply.error)
        for gone in batch.gone:
            fields = {"session": gone.session, "tenant": gone.tenant or None, "reason": gone.reason}
            log.info("session ended", extra=fields)
            for listener in self.gone_listeners:
                listener(gone)

    def _take_deltas(self, batch: Batch, woken: dict[int, Stream]) -> None:
        keys = np.frombuffer(batch.delta_keys, "<i8").tolist()
        ends = np.cumsum(np.frombuffer(batch.delta_counts, "<i4")).tolist()
        tokens = unpack_tokens(batch.delta_tokens).tolist()
        assert len(keys) == len(ends) and ends[-1] == len(tokens), "deltas of a batch do not add up"
        now_s = time.perf_counter()
        # A request that ends here brings no more, however much it brings: a repeated reply comes all at once.
        ending = {done.key for done in batch.done}
        collecting = self.histories.collecting
        start = 0
        for key, end in zip(keys, ends, strict=True):
            if (turn := collecting.get(key)) is not None:
                turn.output += batch.delta_tokens[start * TOKEN_BYTES : end * TOKEN_BYTES]
            stream = self._streams.get(key)
            if stream is not None:
                woken[key] = stream
                if not stream.put_tokens(tokens[start:end], now_s) and key not in ending:
                    self.abandon(key, f"the client reads too slowly: over {self._lag_tokens_max} tokens wait for it")
            start = end

    def _take_reply(self, op: int, value: Any, error: Refusal | None) -> None:
        reply = self._replies.get(op)
        if reply is None or reply.done():
            return
        if error is None:
            reply.set_result(value)
        else:
            reply.set_exception(refusal_error(error.status, error.code, error.message, error.param))


def refused(key: int, refusal: Refusal) -> Done:
    """The end of a request that was not even sent."""
    return Done(
        key=key,
        reason="error",
        status=refusal.status,
        code=refusal.code,
        message=refusal.message,
        param=refusal.param,
    )


def refusal_error(status: int, code: str, message: str, param: str | None = None) -> UserError:
    """The exception for a refusal that the engine sent."""
    error = UserError(message, param=param)
    error.status = status
    error.code = code or error.code
    return error
