"""What is said over HTTP, without saying it: bodies, what replies mean, and when to send a request again."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from sessile.completion import Completion, GenerateFields, Piece, Prompt, SessionState, TokenLogprob
from sessile.errors import (
    AnswerChanged,
    HistoryMismatch,
    InvalidRequest,
    NotReady,
    SessionBusy,
    StartupError,
    UserError,
    error_of,
)

PATIENCE_S = 30.0
FIRST_PAUSE_S, PAUSE_S_MAX = 0.1, 5.0
CONNECT_TIMEOUT_S = 10.0
ABORT_TIMEOUT_S = 5.0
BUSY = "already has an active request"
"""How the native surface, whose errors have no code, says that a session's turn is in flight."""
IN_FLIGHT = "is in flight already"
"""The same of a request with this rid, which is ours: the server has not seen yet that we left."""
RETRIED_STATUSES = (429, 503)
ID_BYTES = 16
EXAMPLE_URL = "http://127.0.0.1:30000"
TOLD = ("return_logprob", "top_logprobs_num")
"""Keywords of `generate` that are fields of the body itself."""


def http_options(url: str, api_key: str | None) -> dict[str, Any]:
    """How an httpx client talks to a server. Only the connection has a time limit: a long prompt takes its time.

    Raises StartupError for what is no address of a server.
    """
    try:
        where = httpx.URL(url)
        if where.scheme not in ("http", "https") or not where.host:
            raise httpx.InvalidURL("it must begin with http:// or https://, and a host")
    except httpx.InvalidURL as error:
        raise StartupError(f"{url!r} is not the address of a server: {error}. Give one like {EXAMPLE_URL}") from error
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "trust_env": False,
    }


def drawn_id() -> str:
    """A name that nobody else has or guesses, for a request or a session."""
    return secrets.token_hex(ID_BYTES)


class Attempts:
    """When one request is sent again, and when its error is raised."""

    def __init__(self, url: str, patience_s: float, *, waits_for_turn: bool = False) -> None:
        """waits_for_turn: the session's last turn was left, and may not have ended yet."""
        self._url = url
        self._patience_s = patience_s
        self._waits_for_turn = waits_for_turn
        self._pauses = 0
        self._deadline_s: float | None = None
        self._told: UserError | None = None

    def heard(self) -> None:
        """Something new has come: patience begins anew with the next failure."""
        self._pauses = 0
        self._deadline_s = self._told = None

    def pause_after(self, error: "httpx.TransportError | UserError") -> float:
        """Seconds to wait before the request is sent again. Raises a UserError if that is of no use, or too late."""
        now_s = time.monotonic()
        if self._deadline_s is None:
            self._deadline_s = now_s + self._patience_s
        pause_s: float = min(FIRST_PAUSE_S * 2**self._pauses, PAUSE_S_MAX)
        if isinstance(error, UserError):
            turn_is_ending = isinstance(error, SessionBusy) and self._waits_for_turn
            if error.status not in RETRIED_STATUSES and not turn_is_ending:
                raise error
            pause_s = max(pause_s, error.retry_after_s or 0.0)
            self._told = error
        elif self._told is None:  # what a server has told before it was gone says more
            self._told = unreachable(self._url, error)
        if now_s + pause_s > self._deadline_s:
            raise self._told
        self._pauses += 1
        # It may take the server a moment to see that we have left, and to roll the turn back.
        self._waits_for_turn = True
        return pause_s


def unreachable(url: str, error: httpx.TransportError) -> NotReady:
    """No server answers, or its answer broke off."""
    reason = str(error) or type(error).__name__
    return NotReady(f"the server at {url} cannot be reached or is gone ({reason})")


def content_of(reply: httpx.Response) -> Any:
    """The JSON of a good reply, None if it is empty. Raises the UserError that any other one tells of.

    The body must have been read.
    """
    try:
        content = orjson.loads(reply.content) if reply.content else None
    except orjson.JSONDecodeError:
        content = None
    if reply.is_success:
        return content
    told = content.get("error") if isinstance(content, dict) else None
    told = told if isinstance(told, dict) else {}
    error = refusal(
        reply.status_code,
        told.get("message") or f"the server answered {reply.status_code}",
        code=told.get("code") or "",
        param=told.get("param"),
    )
    seconds = reply.headers.get("retry-after", "")
    error.retry_after_s = float(seconds) if seconds.isdigit() else None
    raise error


def is_put_off(reply: httpx.Response) -> bool:
    """Whether the server said to come back later."""
    return reply.status_code in RETRIED_STATUSES


def refusal(status: int, message: str, *, code: str = "", param: str | None = None) -> UserError:
    """The exception for an error that the server told of. The native surface gives no code."""
    if not code and status == HistoryMismatch.status:
        return HistoryMismatch(message, param=param)
    if not code and (BUSY in message or IN_FLIGHT in message):
        return SessionBusy(message, param=param)
    if 500 <= status and not code:
        return NotReady(message)
    return error_of(status, code, message, param)


def broken_off() -> httpx.TransportError:
    """A stream that ended before the answer did."""
    return httpx.RemoteProtocolError("the answer broke off")


def state_of(content: Mapping[str, Any]) -> SessionState:
    """A session as the server shows it."""
    return SessionState(**{name: content[name] for name in SessionState.__dataclass_fields__})


@dataclass(slots=True)
class _Heard:
    """What has come of an output in one attempt."""

    texts: list[str] = field(default_factory=list)
    text_chars: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Turn:
    """One request on a stream, sent again if need be: what it says, and what its events come to.

    After a second sending the output is made again, the same by its seed, or said again: what was heard before is left
    out, and must be the same.
    """

    def __init__(self, prompt: Prompt, fields: GenerateFields, session: Mapping[str, Any] | None = None) -> None:
        """session: session_params. Raises InvalidRequest for a prompt that is neither text nor token ids."""
        self.rid = drawn_id()
        self.session_tokens: int | None = None
        """The length of the session's history after the turn, if it was committed."""
        sampling: dict[str, Any] = dict(fields)
        if sampling.get("seed") is None and sampling.get("temperature") != 0:
            sampling["seed"] = secrets.randbits(63)  # so that what is sent again says the same
        if "logit_bias" in sampling:
            sampling["logit_bias"] = {str(token): bias for token, bias in sampling["logit_bias"].items()}
        told: dict[str, Any] = {name: sampling.pop(name) for name in TOLD if name in sampling}
        self.body: dict[str, Any] = {
            "rid": self.rid,
            **input_of(prompt),
            "sampling_params": sampling,
            "stream": True,
            "stream_output": "delta",
            **told,
        }
        if session is not None:
            self.body["session_params"] = session
        self.is_done = False
        self._scored = bool(told.get("return_logprob"))
        self._known = _Heard()
        self._heard = _Heard()

    def again(self) -> None:
        """It is going to be sent once more."""
        if len(self._heard.tokens) > len(self._known.tokens):
            self._known = self._heard
        self._heard = _Heard()

    def take(self, line: str | bytes) -> Piece | None:
        """A line of the stream; what is new in it. Raises the UserError of a request that was refused."""
        line = line.encode() if isinstance(line, str) else line
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            return None
        event = orjson.loads(line[5:])
        if "error" in event:
            raise refusal(int(event["error"].get("code") or 500), event["error"].get("message") or "it failed")
        meta = event["meta_info"]
        finish = meta.get("finish_reason") or {}
        if finish.get("status_code"):
            raise refusal(finish["status_code"], finish.get("message") or "the request was refused")
        text, tokens = self._fresh(event["text"], event.get("output_ids") or [], meta)
        if not finish:
            return Piece(text, tokens) if text or tokens else None
        self.is_done = True
        self.session_tokens = meta.get("session_tokens")
        return Piece(text, tokens, self._completion(meta, finish))

    def _fresh(self, text: str, ids: Sequence[int], meta: Mapping[str, Any]) -> tuple[str, list[int]]:
        """What an event adds to all that was ever heard."""
        heard, known = self._heard, self._known
        token_count = len(heard.tokens)
        if token_count and len(ids) == meta["completion_tokens"]:  # of a server that always says everything so far
            ids, text = ids[token_count:], text[heard.text_chars :]
        repeated = known.tokens[token_count : token_count + len(ids)]
        if list(ids[: len(repeated)]) != repeated:
            raise AnswerChanged("the connection broke, and the answer, made again, differs from what had come of it")
        silent_chars = min(max(known.text_chars - heard.text_chars, 0), len(text))
        heard.texts.append(text)
        heard.text_chars += len(text)
        heard.tokens += ids
        if self._scored:
            heard.logprobs += _logprobs_of(meta)
        return text[silent_chars:], list(ids[len(repeated) :])

    def _completion(self, meta: Mapping[str, Any], finish: Mapping[str, Any]) -> Completion:
        return Completion(
            text="".join(self._heard.texts),
            tokens=self._heard.tokens,
            finish_reason=finish["type"],
            matched=finish.get("matched"),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta.get("cached_tokens") or 0,
            logprobs=self._heard.logprobs if self._scored else None,
        )


def _logprobs_of(meta: Mapping[str, Any]) -> list[TokenLogprob]:
    triples = meta["output_token_logprobs"]
    tops = meta.get("output_top_logprobs") or [None] * len(triples)
    return [
        TokenLogprob(token, logprob, tuple((id, value) for value, id, _ in top or ()))
        for (logprob, token, _), top in zip(triples, tops, strict=True)
    ]


def input_of(prompt: Prompt) -> dict[str, Any]:
    """The prompt as fields of a body. Raises InvalidRequest for what is neither text nor a list."""
    if isinstance(prompt, str):
        return {"text": prompt}
    try:
        return {"input_ids": [int(token) for token in prompt]}
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"prompt: must be text or token ids ({error})", param="prompt") from error
