"""One call: a request from the moment it is sent to the engine until its end, whichever way that comes about.

Leaving the `with` of a Call gives everything back: a call that has not ended is cancelled in the engine, its rid is
free again, its latencies are counted and its line is logged. There is no other way to send a request.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from msgspec import structs
from starlette.types import Receive

from sessile import __version__
from sessile.contract.messages import Branch, Done, Grammar, Sampling, Submit, pack_tokens
from sessile.errors import InvalidRequest, LimitReached, NotReady, UserError
from sessile.server.config import ServerOptions
from sessile.server.corpora.store import CorpusStore
from sessile.server.dialogues import Dialogues
from sessile.server.keys import KeyRing
from sessile.server.link import Arrival, EngineLink, Stream
from sessile.server.listening import allowed_origins
from sessile.server.metrics import Metrics
from sessile.server.retry import RetryAdvice
from sessile.server.supervision import Supervisor
from sessile.server.tracing import NoSpan, Span, Tracing
from sessile.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DISCONNECTED = "the client disconnected"
ANOTHER_FAILED = "another answer to the same prompt failed"
INPUT_PARAM = "input_ids"
"""What the engine calls the tokens of a request, whatever field they were made of."""
CLIENT_CLOSED_REQUEST = 499
"""The status that proxies log for a client that did not wait for its answer."""


class Service:
    """What all routes share: the link, the tokenizer, the options, and which requests are in flight."""

    def __init__(
        self,
        link: EngineLink,
        tokenizer: Tokenizer,
        options: ServerOptions,
        settings: Mapping[str, Any],
        key_ring: KeyRing | None = None,
        corpora: CorpusStore | None = None,
        supervisor: Supervisor | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.link = link
        self.tokenizer = tokenizer
        self.options = options
        self.settings = settings
        """All settings of the deployment by section, to be shown by /get_server_info."""
        self.key_ring = key_ring
        """The keys that are accepted; None: none is needed."""
        self.corpora = corpora
        """Texts to draft from; None while there is no place for them."""
        self.tracing = tracing or Tracing(None, version=__version__)
        self.supervisor = supervisor
        """Who replaces the engine; None: nobody."""
        self.metrics = Metrics(key_ring.tenants if key_ring else ())
        self.origins = allowed_origins(options)
        """Sites whose pages may send requests from a browser, beside our own."""
        self.retry_advice = RetryAdvice()
        self.started_s = int(time.time())
        self.leaving = False
        """No more requests should be sent here, though they are taken."""
        self.draining = False
        self.keys = itertools.count(1)
        self.keys_by_rid: dict[tuple[str, str], int] = {}
        """Requests in flight, by tenant and rid: nobody meets another's (H55)."""

    @functools.cached_property
    def dialogues(self) -> Dialogues:
        """Turns that lists of messages go on from; made when it is first asked for, which takes some renders."""
        return Dialogues(self.link, self.tokenizer, idle_timeout_s=self.options.dialogue_idle_timeout_s)

    @property
    def model_name(self) -> str:
        """The name that clients know the model by."""
        return self.options.served_name or self.link.ready.model_name

    def check_open(self) -> None:
        """Raise NotReady if no new work is taken: starting, draining, or the engine is gone."""
        if self.draining:
            raise NotReady("the server is shutting down")
        self.link.check_ready()

    @property
    def is_stalled(self) -> bool:
        """Whether the engine has stood still for so long that it is given up."""
        return self.supervisor is not None and self.supervisor.pulse.is_stalled

    @property
    def admitted_max(self) -> int | None:
        """How many requests the engine can run and let wait; None while that is not known."""
        ready = self.link.last_ready
        return ready.rows_max + ready.queue_max if ready is not None and ready.queue_max else None

    @property
    def retry_after_s(self) -> int:
        """What a client that met a limit is told to wait."""
        return self.retry_advice.seconds(self.link.in_flight)

    def time_limits(self, key: int) -> list[asyncio.TimerHandle]:
        """Timers that end a request which has just been sent, unless they are cancelled.

        They only ask: whether its turn was committed before is the engine's to say.
        """
        loop, options, timers = asyncio.get_running_loop(), self.options, []
        if (limit_s := options.queue_timeout_s) is not None:
            reason = f"the request has waited for {limit_s:g} s (--queue-timeout-s): try again later"
            timers.append(loop.call_later(limit_s, self.link.give_up_waiting, key, reason))
        if (limit_s := options.request_timeout_s) is not None:
            reason = f"the request has taken {limit_s:g} s (--request-timeout-s)"
            timers.append(loop.call_later(limit_s, self.link.cancel, key, reason))
        return timers

    def answers(self, order: "Order", count: int) -> "list[Order]":
        """The order as so many answers to one prompt, which is computed once: the i-th with the seed plus i.

        A name of the client's gets the answer's index behind it.
        """
        if count == 1:
            return [order]
        group, sampling = next(self.keys), order.sampling
        return [
            replace(
                order,
                group=group,
                rid=order.rid and f"{order.rid}-{index}",
                sampling=structs.replace(sampling, seed=(sampling.seed + index) % (1 << 64)),
            )
            for index in range(count)
        ]

    def abort(self, tenant: str, rid: str) -> bool:
        """End a tenant's request with this rid; False if it has none in flight."""
        key = self.keys_by_rid.get((tenant, rid))
        if key is None:
            return False
        self.link.cancel(key, "aborted by the client")
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to ask of the engine; fields as in contract Submit."""

    tokens: "list[int] | npt.NDArray[np.int32]"
    sampling: Sampling
    tenant: str
    input_field: str = INPUT_PARAM
    """The client's field that the tokens were made of: what the engine refuses of them is said of it."""
    priority: int = 0
    rid_drawn: bool = False
    """Whether nobody but the server chose `rid`, so that no client can send the turn again by it."""
    rid: str | None = None
    """Names the call while it is in flight, and a session's turn beyond it; None: a fresh one."""
    group: int = -1
    """What orders of the same prompt have in common, drawn from `Service.keys`; -1: there is no other."""
    session: str | None = None
    branch: Branch | None = None
    """With a session: where the turn goes on. None, for a turn without a name: in a streaming session only."""
    expect_tokens: int = -1
    logprobs: int = -1
    prompt_logprobs_from: int = -1
    speculate: bool | None = None
    drafts_max: int = -1
    corpora: tuple[str, ...] | None = None
    remember: bool = False
    grammar: Grammar | None = None


class Call:
    """One request in flight, as a context manager. Enter sends it; `next` gives what came until done."""

    def __init__(self, service: Service, order: Order, *, whole: bool) -> None:
        """whole: the reader wants the end only, not every step."""
        self.order = order
        self.rid = order.rid or uuid.uuid4().hex
        self._place = (order.tenant, self.rid)
        self.started_s = time.perf_counter()
        self.done: Done | None = None
        self.at_end: Callable[[], None] | None = None
        """Called once: when the call is left, however it ended, or cannot even be sent; or before, by `tell_end`."""
        self.at_start: Callable[[], None] | None = None
        """Called once the engine has been sent the call."""
        self._service = service
        self._whole = whole
        self._stream: Stream | None = None
        self._read_s = 0.0
        self._span: Span = NoSpan()
        self._limits: list[asyncio.TimerHandle] = []
        self._left_for = DISCONNECTED
        """Why nobody waits for the end, if it is left before."""

    @property
    def was_sent(self) -> bool:
        """Whether the engine may know of it."""
        return self._stream is not None

    @property
    def seconds(self) -> float:
        """Since the request arrived."""
        return time.perf_counter() - self.started_s

    def __enter__(self) -> Self:
        """Send the request. Raises NotReady, or InvalidRequest if its rid is in flight already."""
        try:
            self._send()
            if self.at_start is not None:
                self.at_start()
        except BaseException:
            if self.was_sent:
                self.__exit__()
            else:
                self.tell_end()
            raise
        return self

    def _send(self) -> None:
        service, order = self._service, self.order
        service.check_open()
        if self._place in service.keys_by_rid:
            raise InvalidRequest(f"rid: a request {self.rid!r} is in flight already", param="rid")
        submit = Submit(
            key=next(service.keys),
            tokens=pack_tokens(order.tokens),
            sampling=order.sampling,
            tenant=order.tenant,
            priority=order.priority,
            group=order.group,
            session=order.session,
            rid=self.rid if order.branch is not None else "",
            rid_drawn=order.branch is not None and (order.rid_drawn or order.rid is None),
            branch=order.branch,
            expect_tokens=order.expect_tokens,
            logprobs=order.logprobs,
            prompt_logprobs_from=order.prompt_logprobs_from,
            speculate=order.speculate,
            drafts_max=order.drafts_max,
            corpora=order.corpora,
            remember=order.remember,
            grammar=order.grammar,
        )
        service.retry_advice.note_start(service.link.in_flight)
        self._span = service.tracing.begin("generate")
        self._stream = service.link.submit(submit, whole=self._whole)
        service.keys_by_rid[self._place] = submit.key
        self._limits = service.time_limits(submit.key)

    def __exit__(self, *exception: object) -> None:
        assert self._stream is not None
        for limit in self._limits:
            limit.cancel()
        self._service.link.abandon(self._stream.key, self._left_for)
        del self._service.keys_by_rid[self._place]
        self._measure_end(self._stream)
        self.tell_end()

    def tell_end(self) -> None:
        """Call `at_end`: before the client is told of the end, so that what it sends next finds everything done."""
        at_end, self.at_end = self.at_end, None
        if at_end is not None:
            at_end()

    def leave_for(self, reason: str) -> None:
        """Its end is not going to be waited for, and not because the client is gone."""
        self._left_for = reason

    def disconnect(self) -> None:
        """The client is gone: end the request now (H27)."""
        assert self._stream is not None
        self._service.link.abandon(self._stream.key, DISCONNECTED)

    async def next(self) -> Arrival:
        """What came since the last call, at least something; not to be called after an arrival with done."""
        assert self._stream is not None and self.done is None
        arrival = await self._stream.next()
        if arrival.done is not None and arrival.done.param == INPUT_PARAM:
            arrival.done = structs.replace(arrival.done, param=self.order.input_field)
        self.done = arrival.done
        if arrival.tokens and not self._whole:
            self._measure_tokens(self._stream, len(arrival.tokens))
        return arrival

    def _measure_tokens(self, stream: Stream, count: int) -> None:
        metrics = self._service.metrics
        if self._read_s:
            metrics.inter_token_s.observe((stream.last_s - self._read_s) / count, count)
        else:
            metrics.first_token_s.observe(stream.first_s - self.started_s)
            if count > 1:
                metrics.inter_token_s.observe((stream.last_s - stream.first_s) / (count - 1), count - 1)
        self._read_s = stream.last_s

    def _measure_end(self, stream: Stream) -> None:
        done, reason = self.done, "disconnect"
        if done is None and self._left_for != DISCONNECTED:
            done, reason = Done(key=stream.key, reason="abort", message=self._left_for), "abort"
        elif done is None or done.message == DISCONNECTED:
            # The engine was not waited for, so what the prompt was and what of it was cached is not known.
            done = Done(key=stream.key, reason="abort", status=CLIENT_CLOSED_REQUEST, message=DISCONNECTED)
        else:
            reason = done.reason
        metrics = self._service.metrics
        if self._whole and stream.first_s:
            metrics.first_token_s.observe(stream.first_s - self.started_s)
            if done.completion_tokens > 1:
                gaps = done.completion_tokens - 1
                metrics.inter_token_s.observe((stream.last_s - stream.first_s) / gaps, gaps)
        metrics.request_s.observe(self.seconds)
        metrics.count_end(reason, self.order.tenant, done)
        if done.status != LimitReached.status:  # what was turned away says nothing of how fast the line moves
            self._service.retry_advice.note_end()
        fields = {
            "rid": self.rid,
            "tenant": self.order.tenant or None,
            "session": self.order.session,
            "reason": reason,
            "status": done.status,
            "prompt_tokens": done.prompt_tokens,
            "cached_tokens": done.cached_tokens,
            "completion_tokens": stream.tokens,
            "first_token_ms": round((stream.first_s - self.started_s) * 1e3, 1) if stream.first_s else None,
            "total_ms": round(self.seconds * 1e3, 1),
        }
        fields |= {"error": done.message} if done.message else {}
        log.info("request", extra=fields)
        self._span.end(fields)


@contextlib.asynccontextmanager
async def attended(receive: Receive, *calls: Call) -> AsyncIterator[None]:
    """Send the calls; end them all as soon as the client disconnects, and in any case on leaving."""
    watcher: asyncio.Task[None] | None = None
    with contextlib.ExitStack() as stack:
        try:
            for call in calls:
                stack.enter_context(call)
            watcher = asyncio.create_task(_watch(receive, calls))
            yield
        except UserError:
            _leave_siblings(calls)
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
            if any(call.done is not None and call.done.reason == "error" for call in calls):
                _leave_siblings(calls)


async def _watch(receive: Receive, calls: tuple[Call, ...]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for call in calls:
        call.disconnect()


def _leave_siblings(calls: Sequence[Call]) -> None:
    for call in calls:
        call.leave_for(ANOTHER_FAILED)


async def arrivals_of(calls: Sequence[Call]) -> AsyncIterator[tuple[int, Arrival]]:
    """What comes for any of the calls, with the call's index, until all have ended."""
    if len(calls) == 1:
        while calls[0].done is None:
            yield 0, await calls[0].next()
        return
    pending = {asyncio.create_task(call.next()): index for index, call in enumerate(calls)}
    try:
        while pending:
            arrived, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(arrived, key=pending.__getitem__):
                index = pending.pop(task)
                yield index, task.result()
                if calls[index].done is None:
                    pending[asyncio.create_task(calls[index].next())] = index
    finally:
        for task in pending:
            task.cancel()
