"""Sampling fields of every surface: their ranges, and the one way from them to contract Sampling."""

import secrets
from typing import Annotated, Any, ClassVar, Self

from pydantic import AliasChoices, Field, model_validator

from sessile.contract.messages import Sampling
from sessile.errors import InvalidRequest
from sessile.server.body import Body, field_fault, says
from sessile.text.patterns import compile_pattern

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing logits by it would overflow."""

COUNT_MAX = (1 << 31) - 1
LOGPROBS_MAX = 20
PRIORITY_MAX = 100
"""Priorities are from minus this to this; higher goes first among the requests of a tenant."""

STOPS_MAX = 64
STOP_BYTES_MAX = 1024
PATTERNS_MAX = 8
LISTED_TOKENS_MAX = 1024
"""Most entries of stop_token_ids and of logit_bias."""

ANSWERS_MAX = 128
"""Most answers that one request asks for, those to all of its prompts together."""

Count = Annotated[int, Field(ge=0, le=COUNT_MAX)]
Answers = Annotated[int, Field(ge=1, le=ANSWERS_MAX)]
Priority = Annotated[int, Field(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
Stops = Annotated[str | list[str], says("must be a string or a list of strings")]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], says("must map token ids to -100 … 100")]


class SamplingFields(Body):
    """What all surfaces have in common. null means: not given."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    """0 always takes the likeliest token; 1 if not given."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Choose among the likeliest tokens that have this share of the probability together."""
    top_k: int | None = Field(default=None, ge=-1, le=COUNT_MAX)
    """Choose among so many likeliest tokens; 0 and -1: among all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Choose among tokens at least so likely as this share of the likeliest one's probability."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken from the score of a token for each time that it has been said."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken from the score of a token that has been said at all."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    """Divides the score of what prompt or output have said; 1 is none."""
    seed: int | None = Field(
        default=None, ge=-(1 << 63), lt=1 << 64, validation_alias=AliasChoices("seed", "sampling_seed")
    )
    """The same seed gives the same output, whatever else runs; the server draws one if it is not given."""
    logit_bias: Biases | None = None
    """Added to the score of a token, by its id."""
    stop: Stops | None = None
    """Strings that end the output; its text ends before them."""
    stop_regex: Stops | None = None
    """Patterns that end the output with the token in which a match ends; unlike a stop string it stays in the text."""
    stop_token_ids: list[int] | None = Field(default=None, max_length=LISTED_TOKENS_MAX)
    """Tokens that end the output, beside the model's own."""
    ignore_eos: bool | None = None
    """Go on after the model's end of sequence."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true if not given."""
    no_stop_trim: bool | None = None

    stop_field: ClassVar[str] = "stop"
    """What the surface calls `stop`."""

    @model_validator(mode="after")
    def _check_stops(self) -> Self:
        stops = self.stop_strings
        if len(stops) > STOPS_MAX:
            raise field_fault(self.stop_field, f"at most {STOPS_MAX} strings")
        if any(not 1 <= len(stop.encode()) <= STOP_BYTES_MAX for stop in stops):
            raise field_fault(self.stop_field, f"each string must be of 1 to {STOP_BYTES_MAX} bytes")
        if len(self.stop_patterns) > PATTERNS_MAX:
            raise field_fault("stop_regex", f"at most {PATTERNS_MAX} patterns")
        return self

    @property
    def stop_patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple; an empty one asks for nothing."""
        given = self.stop_regex or ()
        return tuple(each for each in ((given,) if isinstance(given, str) else given) if each)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whatever form they were given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def to_sampling(
    fields: SamplingFields, *, max_new_tokens: int | None, min_new_tokens: int | None, vocab_size: int
) -> Sampling:
    """Contract Sampling of checked fields. Raises InvalidRequest for ids outside the vocabulary and min above max."""
    if min_new_tokens and max_new_tokens is not None and min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            f"min_new_tokens: {min_new_tokens} is above max_new_tokens, {max_new_tokens}", param="min_new_tokens"
        )
    given: dict[str, Any] = {
        name: value
        for name in (
            "top_p",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "ignore_eos",
            "skip_special_tokens",
        )
        if (value := getattr(fields, name)) is not None
    }
    if fields.temperature is not None:
        given["temperature"] = fields.temperature if fields.temperature >= GREEDY_BELOW else 0.0
    if fields.top_k is not None:
        given["top_k"] = max(fields.top_k, 0)
    stop_token_ids = tuple(fields.stop_token_ids or ())
    check_vocabulary(stop_token_ids, vocab_size, "stop_token_ids")
    return Sampling(
        seed=secrets.randbits(64) if fields.seed is None else fields.seed % (1 << 64),
        logit_bias=_logit_bias(fields.logit_bias or {}, vocab_size),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or 0,
        stop=tuple(stop.encode() for stop in fields.stop_strings),
        stop_patterns=tuple(compile_pattern(each, param="stop_regex") for each in fields.stop_patterns),
        stop_token_ids=stop_token_ids,
        **given,
    )


def check_vocabulary(tokens: "list[int] | tuple[int, ...]", vocab_size: int, param: str) -> None:
    """Raise InvalidRequest naming the first id that the model does not have."""
    if tokens and not (0 <= min(tokens) and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param}: {wrong} is not in the vocabulary; ids are 0 to {vocab_size - 1}", param=param)


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > LISTED_TOKENS_MAX:
        raise InvalidRequest(f"logit_bias: at most {LISTED_TOKENS_MAX} tokens", param="logit_bias")
    pairs = []
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise InvalidRequest(f"logit_bias: {name!r} is not a token id", param="logit_bias")
        pairs.append((int(name), bias))
    check_vocabulary([token for token, _ in pairs], vocab_size, "logit_bias")
    return tuple(pairs)
