"""An engine without a model, behind the real link: echoes its input a token a step, keeps sessions as token lists.

It runs in a thread of its own and speaks contract messages over a PAIR socket, so that the server under test cannot
tell it from a process. Tests look at `received`, stop its steps with `pause`, and queue `refusals` for submits.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import tokenizers
import zmq
from tokenizers import decoders, models, pre_tokenizers

from sessile.contract.messages import (
    Batch,
    Cancel,
    CancelAll,
    CloseSession,
    Done,
    EngineFailed,
    EngineReady,
    Flush,
    GetPool,
    GetSession,
    GetStats,
    ListSessions,
    OpenSession,
    Outcome,
    Refusal,
    Reply,
    Scores,
    SessionPage,
    SessionTokens,
    SessionView,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    TokenDetail,
    pack_tokens,
    unpack_tokens,
)
from sessile.contract.pool import PoolHolder, PoolView
from sessile.text.template import ChatTemplate
from sessile.text.tokenizer import Tokenizer
from sessile.text.vocabulary import Vocabulary, byte_level_bytes

EOS = 256
VOCAB_SIZE = 260
CONTEXT_TOKENS = 512

READY = EngineReady(
    model_name="echo", model_path="/models/echo", architecture="llama", dtype="float32", device="cpu",
    attention="numba", vocab_size=VOCAB_SIZE, context_tokens=CONTEXT_TOKENS, page_size=16, pages_total=64, rows_max=8,
    chunk_tokens=64, kv_bytes=1, weight_bytes=1, start_s=0.0,
)  # fmt: skip


LINES = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
"""A template without an end marker, which no answer can be gone on from."""
MARKED = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""One that ends each message with a marker of one byte, a semicolon."""


def byte_tokenizer(template: str = LINES) -> Tokenizer:
    """One token a byte, its id the byte's value; <eos> is 256."""
    by_byte = {byte_level_bytes(char)[0]: char for char in pre_tokenizers.ByteLevel.alphabet()}
    backend = tokenizers.Tokenizer(models.BPE({by_byte[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    pieces = {byte: bytes([byte]) for byte in range(256)} | {EOS: b"<eos>"}
    return Tokenizer(backend, Vocabulary.build(pieces, [EOS]), (EOS,), None, ChatTemplate(template, {}))


@dataclass
class _Session:
    tokens: list[int] = field(default_factory=list)
    turn: int | None = None
    turns: int = 0
    closing: bool = False
    opened: OpenSession | None = None


@dataclass
class _Request:
    submit: Submit
    script: list[int]
    prompt_tokens: int
    cached_tokens: int
    output: list[int] = field(default_factory=list)


class FakeEngine:
    """Connects to a server's link on start(). script: output of every request; None echoes its input."""

    def __init__(self, address: str) -> None:
        self.received: list[ToEngine] = []
        self.refusals: list[Done] = []
        self.script: list[int] | None = None
        self.token_interval_s = 0.0
        self.context_tokens = CONTEXT_TOKENS
        self._address = address
        self._stepping = threading.Event()
        self._stepping.set()
        self._stuck = threading.Event()
        self._ending = threading.Event()
        self._failure: str | None = None
        self._requests: dict[int, _Request] = {}
        self._sessions: dict[str, _Session] = {}
        self._steps = 0
        self._batch: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def pause(self) -> None:
        """Take messages but make no steps."""
        self._stepping.clear()

    def resume(self) -> None:
        self._stepping.set()
        self._stuck.clear()

    def hang(self) -> None:
        """Take no messages either, as a stuck step loop would."""
        self._stuck.set()

    def fail(self, message: str) -> None:
        """Say EngineFailed and end, as a dying engine process does."""
        self._failure = message

    @property
    def running(self) -> int:
        return len(self._requests)

    def submits(self) -> list[Submit]:
        return [message for message in list(self.received) if isinstance(message, Submit)]

    def cancels(self) -> list[Cancel]:
        return [message for message in list(self.received) if isinstance(message, Cancel)]

    def _run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PAIR)
        socket.connect(self._address)
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToEngine)
        socket.send(encoder.encode(READY))
        while not self._ending.is_set() and self._failure is None:
            if self._stuck.is_set():
                time.sleep(0.001)
                continue
            self._batch = {"deltas": [], "details": [], "scores": [], "done": [], "replies": []}
            wait_ms = 0 if self._requests and self._stepping.is_set() else 2
            while socket.poll(wait_ms):
                message = decoder.decode(socket.recv())
                self.received.append(message)
                self._take(message)
                wait_ms = 0
            if self._stepping.is_set():
                self._step()
            if any(self._batch.values()):
                socket.send(encoder.encode(self._packed()))
        if self._failure is not None:
            socket.send(encoder.encode(EngineFailed(self._failure)))
        socket.close(linger=200)
        context.term()

    def _packed(self) -> Batch:
        deltas = self._batch.pop("deltas")
        return Batch(
            step=self._steps,
            delta_keys=np.array([key for key, _ in deltas], "<i8").tobytes(),
            delta_counts=np.array([len(tokens) for _, tokens in deltas], "<i4").tobytes(),
            delta_tokens=pack_tokens([token for _, tokens in deltas for token in tokens]),
            **self._batch,
        )

    def _step(self) -> None:
        if not self._requests:
            return
        self._steps += 1
        if self.token_interval_s:
            time.sleep(self.token_interval_s)
        for request in list(self._requests.values()):
            self._advance(request)

    def _advance(self, request: _Request) -> None:
        submit, sampling = request.submit, request.submit.sampling
        if submit.prompt_logprobs_from >= 0 and not request.output:
            self._score(submit)
        if sampling.max_new_tokens == 0:
            self._finish(request, "length")
            return
        token = request.script[len(request.output)] if len(request.output) < len(request.script) else EOS
        request.output.append(token)
        self._batch["deltas"].append((submit.key, [token]))
        if submit.logprobs >= 0:
            self._batch["details"].append(_detail(submit.key, token, submit.logprobs))
        text = bytes(token for token in request.output if token < 256) if sampling.stop else b""
        for stop in sampling.stop:
            if stop in text:
                self._finish(request, "stop", matched=stop, kept_bytes=text.index(stop))
                return
        if token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos):
            self._finish(request, "stop", matched=token)
        elif len(request.output) == sampling.max_new_tokens:
            self._finish(request, "length")

    def _score(self, submit: Submit) -> None:
        start = max(submit.prompt_logprobs_from, 1)
        tokens = unpack_tokens(submit.tokens)[start:]
        logprobs = np.full(len(tokens), -1.5, "<f4").tobytes()
        self._batch["scores"].append(Scores(submit.key, start, pack_tokens(tokens), logprobs))

    def _finish(self, request: _Request, reason: str, message: str = "", **how: Any) -> None:
        key = request.submit.key
        del self._requests[key]
        session = self._sessions.get(request.submit.session or "")
        if session is not None:
            session.turn = None
            if reason != "abort":
                session.tokens += unpack_tokens(request.submit.tokens).tolist() + request.output
                session.turns += 1
        self._batch["done"].append(
            Done(
                key=key, reason=reason, message=message, prompt_tokens=request.prompt_tokens,
                cached_tokens=request.cached_tokens, completion_tokens=len(request.output),
                session_tokens=len(session.tokens) if session and reason != "abort" else -1, **how,
            )
        )  # fmt: skip

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._take_submit(message)
        elif isinstance(message, Cancel):
            if message.key in self._requests:
                self._finish(self._requests[message.key], "abort", message.message)
        elif isinstance(message, Shutdown):
            for request in list(self._requests.values()):
                self._finish(request, "abort", "the engine is shutting down")
            self._ending.set()
        else:
            value = self._answer(message)
            answer = {"error": value} if isinstance(value, Refusal) else {"value": value}
            self._batch["replies"].append(Reply(message.op, **answer))

    def _take_submit(self, submit: Submit) -> None:
        refusal = self.refusals.pop(0) if self.refusals else self._refusal(submit)
        if refusal is not None:
            self._batch["done"].append(msgspec.structs.replace(refusal, key=submit.key))
            return
        tokens = unpack_tokens(submit.tokens).tolist()
        history = []
        if submit.session is not None:
            self._sessions[submit.session].turn = submit.key
            history = self._sessions[submit.session].tokens
        self._requests[submit.key] = _Request(
            submit, tokens if self.script is None else self.script, len(history) + len(tokens), max(0, len(history) - 1)
        )

    def _refusal(self, submit: Submit) -> Done | None:
        def refuse(status: int, code: str, message: str) -> Done:
            return Done(key=0, reason="error", status=status, code=code, message=message)

        tokens = len(submit.tokens) // 4
        if submit.session is not None:
            session = self._sessions.get(submit.session)
            if session is None:
                return refuse(404, "not_found", f"session {submit.session!r} does not exist")
            if session.turn is not None:
                return refuse(409, "session_busy", f"session {submit.session!r} already has an active request")
            tokens += len(session.tokens)
        if tokens >= self.context_tokens:
            return refuse(413, "too_long", f"{tokens} tokens do not fit the context length of {self.context_tokens}")
        return None

    def _answer(self, message: Any) -> Any:
        if isinstance(message, GetStats):
            return self._stats()
        if isinstance(message, GetPool):
            return self._pool(message.holders)
        if isinstance(message, CancelAll):
            requests = list(self._requests.values())
            for request in requests:
                self._finish(request, "abort", "aborted by the client")
            return Outcome({"cancelled": len(requests)})
        if isinstance(message, Flush):
            if self._requests:
                return Refusal(400, "busy", "requests are running")
            return Outcome({"pages": 3})
        if isinstance(message, ListSessions):
            names = sorted(name for name in self._sessions if message.after is None or name > message.after)
            views = [self._view(name) for name in names[: message.limit]]
            return SessionPage(views, len(names) > message.limit, len(self._sessions))
        return self._answer_session(message)

    def _answer_session(self, message: OpenSession | CloseSession | GetSession | SessionTokens) -> Any:
        if isinstance(message, OpenSession):
            if message.session in self._sessions:
                return Refusal(400, "duplicate_session", f"session {message.session!r} is open already", "session_id")
            self._sessions[message.session] = _Session(opened=message)
            return self._view(message.session)
        if message.session not in self._sessions:
            return Refusal(404, "not_found", f"session {message.session!r} does not exist")
        if isinstance(message, GetSession):
            return self._view(message.session)
        if isinstance(message, SessionTokens):
            return Outcome({"tokens": pack_tokens(self._sessions[message.session].tokens)})
        del self._sessions[message.session]
        return Outcome({"closed": True, "deferred": False})

    def _view(self, name: str) -> SessionView:
        session = self._sessions[name]
        assert session.opened is not None
        tokens = len(session.tokens)
        return SessionView(
            id=name, phase="idle" if session.turn is None else "running", tokens=tokens, kv_tokens=max(0, tokens - 1),
            own_pages=1, shared_pages=0, turns=session.turns, opened_s=0.0, last_used_s=0.0,
            idle_timeout_s=session.opened.idle_timeout_s, tokens_max=session.opened.tokens_max or CONTEXT_TOKENS,
            metadata=session.opened.metadata,
        )  # fmt: skip

    def _pool(self, holders: int) -> PoolView:
        named = [PoolHolder(key=key, phase="running", own_pages=2, shared_pages=1, row=0) for key in self._requests]
        named = named[:holders]
        rest = len(self._requests) - len(named)
        return PoolView(
            page_size=READY.page_size, pages_total=READY.pages_total, limbo=[(7, 3)], tree_pinned=4, tree_parked=2,
            tree_unpinned=1, scratch=1, quarantine=0, rows_total=READY.rows_max, requests_running=len(self._requests),
            requests_waiting=0, requests_draining=0, sessions_open=len(self._sessions), sessions_idle=0,
            session_tokens=0, request_pages=2 * len(self._requests), session_pages=0, holders=named,
            rest_requests=rest, rest_sessions=0, rest_own_pages=2 * rest,
            free=READY.pages_total - 3 - 7 - 1 - 2 * len(self._requests),
        )  # fmt: skip

    def _stats(self) -> Stats:
        empty = {int: 0, float: 0.0}
        figures: dict[str, Any] = {each.name: empty.get(each.type, {}) for each in msgspec.structs.fields(Stats)}
        figures |= {
            "pages_total": READY.pages_total, "pages_scratch": 1, "page_size": READY.page_size,
            "pages_free": READY.pages_total - 1, "requests_running": len(self._requests),
            "sessions_open": len(self._sessions), "steps_total": self._steps, "rows_total": READY.rows_max,
            "tenants": [], "sources": [], "finished_total": {"stop": 1},
            "sessions_by_phase": {"idle": len(self._sessions)}, "audit_violations_total": {"pages": 1},
            "time_s": time.monotonic(),
        }  # fmt: skip
        return Stats(**figures)


def _detail(key: int, token: int, tops: int) -> TokenDetail:
    ids = [(token + rank) % VOCAB_SIZE for rank in range(tops)]
    return TokenDetail(
        key,
        np.array([-0.5], "<f4").tobytes(),
        pack_tokens(ids) if tops else b"",
        np.array([-0.5 - rank for rank in range(tops)], "<f4").tobytes() if tops else b"",
    )
