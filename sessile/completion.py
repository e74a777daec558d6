"""What a request asks for and what it gets, in Python: the same types in process and over HTTP."""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

Prompt = str | Sequence[int]
"""Text, or token ids."""


class SamplingParams(TypedDict, total=False):
    """How output is chosen and where it ends: `SamplingParams(temperature=0, max_new_tokens=32)`.

    Names, ranges and defaults are those of `sampling_params` of POST /generate (docs/HTTP.md). What is left out has its
    default; None means the same, but for max_new_tokens.
    """

    temperature: float
    """0 to 100; 0 always takes the most likely token. 1 if not given."""
    top_p: float
    """Above 0, to 1: sample among the most likely tokens that have this share of the probability together."""
    top_k: int
    """Sample among so many most likely tokens; 0 or -1: among all."""
    min_p: float
    """0 to 1: sample among tokens at least so likely as this share of the most likely one's probability."""
    frequency_penalty: float
    """-2 to 2, for each time that a token has been said."""
    presence_penalty: float
    """-2 to 2, if a token has been said at all."""
    repetition_penalty: float
    """Above 0, to 2: divides the score of what prompt or output have said; 1 is none."""
    seed: int | None
    """The same seed gives the same output, whatever else runs. Drawn if not given."""
    logit_bias: Mapping[int, float]
    """-100 to 100 by token id, added to its score."""
    max_new_tokens: int | None
    """Most tokens of output, cut to what the context leaves; 128 if not given. None: what the context leaves."""
    min_new_tokens: int
    """Before so many, no end of sequence and no stop."""
    stop: str | Sequence[str]
    """Strings that end the output; the text ends before them."""
    stop_regex: str | Sequence[str]
    """Patterns that end the output where one matches, in the subset that docs/HTTP.md describes; the match stays."""
    stop_token_ids: Sequence[int]
    """Tokens that end the output, beside the model's own."""
    ignore_eos: bool
    """Go on after the model's end of sequence."""
    skip_special_tokens: bool
    """Leave special tokens out of the text; True if not given."""
    no_stop_trim: bool
    """Keep the stop that ended it in the text."""
    json_schema: str | Mapping[str, Any] | bool
    """The output is JSON that is valid under this schema. One of this and the next three may be given."""
    regex: str
    """The whole output matches this regular expression, in the syntax of Rust's regex crate."""
    ebnf: str
    """The output is derived from the rule root of this GBNF grammar, or from start of a Lark grammar."""
    json_object: bool
    """The output is a JSON object, whatever is in it."""


class GenerateFields(SamplingParams, total=False):
    """All keywords of `generate`: how to sample, and what to tell of it."""

    return_logprob: bool
    """Give the log-probability of each token of output."""
    top_logprobs_num: int
    """And of so many most likely ones at its place; 0 to 20, with return_logprob."""


class Message(TypedDict):
    """One message of a chat."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of output, its log-probability, and the most likely tokens at its place, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request produced.

    text ends before the stop that ended it, unless no_stop_trim; tokens has its tokens as well. finish_reason: "stop",
    "length", or "abort" where it was ended from outside: a turn that was aborted has left its session as it was before.
    matched: the stop string or token id that ended it. prompt_tokens counts the whole context, a session's history
    included; cached_tokens, how many of these were not computed again. logprobs: one for each token, if asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    matched: int | str | None
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What has come of an output since the last piece. The last one has the whole as its completion."""

    text: str
    tokens: list[int]
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session at one moment. tokens: its history; kv_tokens: those of them whose KV is there."""

    id: str
    phase: str
    """"idle", "queued", "running", "preempted" or "closing"."""
    turns: int
    tokens: int
    kv_tokens: int
    own_pages: int
    shared_pages: int
    tokens_max: int


class Generation:
    """An output that is being made, in asyncio: `await` it for the Completion, or iterate over its Pieces.

    Nothing is sent before one or the other. Leaving it early ends the request and rolls a session's turn back, at once
    with `aclose` (or `contextlib.aclosing`), else when Python collects what was left.
    """

    def __init__(self, pieces: "AsyncGenerator[Piece, None]") -> None:
        self._pieces = pieces

    def __aiter__(self) -> "AsyncGenerator[Piece, None]":
        return self._pieces

    def __await__(self) -> "Generator[Any, None, Completion]":
        return self._whole().__await__()

    async def aclose(self) -> None:
        """End the request, if it has not ended. May be called again."""
        await self._pieces.aclose()

    async def _whole(self) -> Completion:
        completion = None
        async for piece in self._pieces:
            completion = piece.completion
        assert completion is not None, "the last piece has the whole"
        return completion
