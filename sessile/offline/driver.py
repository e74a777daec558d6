"""Drives an engine in a thread of its own, and tells those who asked what becomes of their requests.

Why a thread: an exception in the caller, Ctrl-C above all, then cannot strike in the middle of a step, timers of idle
sessions run by themselves, and requests of several threads or of asyncio share steps. It costs no second process,
copies nothing, and is whole when the caller's process is; a server, which must outlive its engine, has two processes.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sessile.contract.messages import (
    Batch,
    Cancel,
    Done,
    EngineFailed,
    EngineReady,
    FromEngine,
    Refusal,
    Reply,
    Shutdown,
    Submit,
    ToEngine,
    TokenDetail,
    unpack_tokens,
)
from sessile.engine.build import Engine
from sessile.engine.clock import Clock
from sessile.engine.inbox import MESSAGES_PER_TURN_MAX
from sessile.errors import NotReady, error_of

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Arrival:
    """What one step brought for one request. done: its end, with the last arrival."""

    tokens: list[int] = field(default_factory=list)
    details: list[TokenDetail] = field(default_factory=list)
    done: Done | None = None


Receive = Callable[[Arrival], None]
"""Called on the engine's thread: must neither block nor raise."""


class QueueInbox:
    """Messages put in by any thread."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def put(self, message: ToEngine) -> None:
        """Append a message to the stream."""
        self._messages.put(message)

    def take(self, wait_ns: int) -> list[ToEngine]:
        """See engine.inbox.Inbox."""
        messages: list[ToEngine] = []
        try:
            if wait_ns:
                messages.append(self._messages.get(timeout=wait_ns / 1e9))
            while len(messages) < MESSAGES_PER_TURN_MAX:
                messages.append(self._messages.get_nowait())
        except queue.Empty:
            pass
        return messages


class Driver:
    """A running engine. Owns it until `close`. Usable from any thread."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.ready: EngineReady = engine.ready
        self._engine = engine
        self._inbox = QueueInbox()
        self._loop = engine.loop(self._inbox, self, clock)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        """Held to enter or leave the two below, and to end them: nobody waits for an engine that has ended."""
        self._receivers: dict[int, Receive] = {}
        self._asked: dict[int, Future[Any]] = {}
        self._ended = ""
        """Why there is no engine any more."""
        self._thread = threading.Thread(target=self._run, name="sessile-engine", daemon=True)
        self._thread.start()

    def submit(self, submit: Callable[[int], Submit], receive: Receive) -> int:
        """Start a request; its key. submit: makes the message for a key. Raises NotReady if the engine has ended."""
        key = next(self._numbers)
        message = submit(key)
        with self._lock:
            self._check_running()
            self._receivers[key] = receive  # before it is sent (H52)
        self._inbox.put(message)
        return key

    def cancel(self, key: int) -> None:
        """End a request, as an abort; one that has ended is left alone. Its receiver hears no more."""
        with self._lock:
            is_running = self._receivers.pop(key, None) is not None
        if is_running:
            self._inbox.put(Cancel(key))

    def ask(self, message: Callable[[int], ToEngine]) -> "Future[Any]":
        """Send an operation; its reply's value to come, or the UserError that it carries."""
        op = next(self._numbers)
        answer: Future[Any] = Future()
        with self._lock:
            self._check_running()
            self._asked[op] = answer
        self._inbox.put(message(op))
        return answer

    def close(self) -> None:
        """End what runs, as aborts, and give the device back. May be called again."""
        self._inbox.put(Shutdown())
        if threading.current_thread() is not self._thread:  # whose garbage collection may be what calls us
            self._thread.join()

    def send(self, message: FromEngine) -> None:
        """Called by the loop, as its outbox, with the effects of a step."""
        assert not isinstance(message, (EngineReady, EngineFailed)), "start and failure are seen by the thread itself"
        for key, arrival in arrivals_of(message).items():
            with self._lock:
                receive = self._receivers.pop(key, None) if arrival.done else self._receivers.get(key)
            if receive:  # else it was cancelled
                receive(arrival)
        for reply in message.replies:
            with self._lock:
                answer = self._asked.pop(reply.op, None)
            if answer:  # else it is the loop's own
                settle(answer, reply)

    def _check_running(self) -> None:
        if self._ended:
            raise NotReady(self._ended)

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            self._loop.run()
        except Exception as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
            log.exception("the engine failed", extra={"events": self._engine.machine.event_lines()})
        self._end(reason)
        self._engine.close()

    def _end(self, reason: str) -> None:
        """Tell all who still wait, and whoever comes later, that there is no engine."""
        with self._lock:
            self._ended = reason
            receivers, self._receivers = self._receivers, {}
            asked, self._asked = self._asked, {}
        for key, receive in receivers.items():
            done = Done(key=key, reason="error", status=NotReady.status, code=NotReady.code, message=reason)
            receive(Arrival(done=done))
        for op, answer in asked.items():
            settle(answer, Reply(op, error=Refusal(NotReady.status, NotReady.code, reason)))


def arrivals_of(batch: Batch) -> dict[int, Arrival]:
    """What a batch brings, by request."""
    arrivals: dict[int, Arrival] = {}
    tokens = unpack_tokens(batch.delta_tokens).tolist()
    start = 0
    keys = memoryview(batch.delta_keys).cast("q")
    for key, count in zip(keys, unpack_tokens(batch.delta_counts).tolist(), strict=True):
        arrivals[key] = Arrival(tokens[start : start + count])
        start += count
    for detail in batch.details:
        arrivals[detail.key].details.append(detail)
    for done in batch.done:
        arrivals.setdefault(done.key, Arrival()).done = done
    return arrivals


def settle(answer: "Future[Any]", reply: Reply) -> None:
    """Give a reply to whoever waits for it, if he still does."""
    if not answer.set_running_or_notify_cancel():
        return
    if reply.error:
        answer.set_exception(error_of(reply.error.status, reply.error.code, reply.error.message, reply.error.param))
    else:
        answer.set_result(reply.value)
