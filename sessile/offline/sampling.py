"""Keywords of `generate` to the core's Sampling, with the ranges and messages of the HTTP surface.

tests/unit/test_offline_sampling.py holds the two together, value by value.
"""

import difflib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sessile.completion import GenerateFields
from sessile.contract.messages import Grammar, Sampling
from sessile.contract.patterns import StopPattern
from sessile.errors import InvalidRequest
from sessile.text.patterns import compile_pattern

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing logits by it would overflow."""
COUNT_MAX = (1 << 31) - 1
LOGPROBS_MAX = 20
MAX_NEW_TOKENS = 128
"""Where none is given."""
STOPS_MAX = 64
PATTERNS_MAX = 8
STOP_BYTES_MAX = 1024
LISTED_TOKENS_MAX = 1024
GRAMMAR_CHARS_MAX = 131_072


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be. above: low itself is not allowed."""

    kind: type
    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise InvalidRequest unless it is such a number."""
        kinds = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise _fault(name, f"must be {'a number' if self.kind is float else 'a whole number'}, got {value!r}")
        if not (self.low < value if self.above else self.low <= value) or not value <= self.high:
            bounds = f"above {self.low} and up to" if self.above else f"from {self.low} to"
            raise _fault(name, f"must be {bounds} {self.high}, got {value!r}")


_RANGES = {
    "temperature": _Range(float, 0, 100),
    "top_p": _Range(float, 0, 1, above=True),
    "top_k": _Range(int, -1, COUNT_MAX),
    "min_p": _Range(float, 0, 1),
    "frequency_penalty": _Range(float, -2, 2),
    "presence_penalty": _Range(float, -2, 2),
    "repetition_penalty": _Range(float, 0, 2, above=True),
    "seed": _Range(int, -(1 << 63), (1 << 64) - 1),
    "max_new_tokens": _Range(int, 0, COUNT_MAX),
    "min_new_tokens": _Range(int, 0, COUNT_MAX),
    "top_logprobs_num": _Range(int, 0, LOGPROBS_MAX),
}
_SWITCHES = ("ignore_eos", "skip_special_tokens", "no_stop_trim", "return_logprob", "json_object")
_GRAMMARS = ("json_schema", "regex", "ebnf", "json_object")


@dataclass(frozen=True, slots=True)
class Wish:
    """What one request asks for. trim_stop: its text ends before the stop. logprobs, grammar: as in Submit."""

    sampling: Sampling
    trim_stop: bool
    logprobs: int
    grammar: Grammar | None


def wish_of(keywords: GenerateFields, vocab_size: int) -> Wish:
    """Check keywords. Raises InvalidRequest naming the first that is unknown, of a wrong type or out of range."""
    _check_names(keywords)
    given: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    for name, value in given.items():
        if name in _RANGES:
            _RANGES[name].check(name, value)
        elif name in _SWITCHES and not isinstance(value, bool):
            raise _fault(name, f"must be True or False, got {value!r}")
    most, least = keywords.get("max_new_tokens", MAX_NEW_TOKENS), given.get("min_new_tokens", 0)
    if most is not None and least > most:
        raise _fault("min_new_tokens", f"{least} is above max_new_tokens, {most}")
    if given.get("top_logprobs_num") and not given.get("return_logprob"):
        raise _fault("top_logprobs_num", "needs return_logprob=True")
    temperature = given.get("temperature", 1.0)
    seed = given.get("seed")
    plain = ("top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    floats: dict[str, Any] = {name: float(given[name]) for name in plain if name in given}
    sampling = Sampling(
        seed=secrets.randbits(64) if seed is None else seed % (1 << 64),
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(given.get("top_k", 0), 0),
        logit_bias=_biases(given.get("logit_bias", {}), vocab_size),
        max_new_tokens=most,
        min_new_tokens=least,
        stop=_stops(given.get("stop", ())),
        stop_patterns=_patterns(given.get("stop_regex", ())),
        stop_token_ids=_listed("stop_token_ids", given.get("stop_token_ids", ()), vocab_size),
        ignore_eos=given.get("ignore_eos", False),
        skip_special_tokens=given.get("skip_special_tokens", True),
        **floats,
    )
    return Wish(
        sampling,
        trim_stop=not given.get("no_stop_trim", False),
        logprobs=given.get("top_logprobs_num", 0) if given.get("return_logprob") else -1,
        grammar=_grammar(given),
    )


def _check_names(keywords: Mapping[str, Any]) -> None:
    known = GenerateFields.__annotations__
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise _fault(name, "no such sampling parameter" + (f"; did you mean {close[0]}?" if close else ""))


def _grammar(given: dict[str, Any]) -> Grammar | None:
    """The one that is asked for; whether it is any good, the engine finds when it compiles it."""
    # A schema may be false: nothing is valid under it, which is for the engine to say.
    kinds = [kind for kind in _GRAMMARS if kind in given and (given[kind] is not False or kind == "json_schema")]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise _fault(kinds[1], f"give {kinds[0]} or {kinds[1]}, not both")
    (kind,) = kinds
    source = given[kind]
    if kind == "json_object":
        return Grammar(kind, "", kind)
    if kind == "json_schema" and isinstance(source, dict | bool):
        source = json.dumps(source)
    if not isinstance(source, str):
        raise _fault(kind, f"must be {'a JSON schema, or the text of one' if kind == 'json_schema' else 'a string'}")
    if not (kind == "json_schema" or source) or len(source) > GRAMMAR_CHARS_MAX:
        raise _fault(kind, f"must be of 1 to {GRAMMAR_CHARS_MAX:,} characters")
    return Grammar(kind, source, kind)


def _stops(stop: str | Sequence[str]) -> tuple[bytes, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or any(not isinstance(string, str) for string in strings):
        raise _fault("stop", "must be a string or a list of strings")
    if len(strings) > STOPS_MAX:
        raise _fault("stop", f"at most {STOPS_MAX} strings")
    encoded = tuple(string.encode(errors="surrogatepass") for string in strings)
    if any(not 1 <= len(string) <= STOP_BYTES_MAX for string in encoded):
        raise _fault("stop", f"each string must be of 1 to {STOP_BYTES_MAX} bytes")
    return encoded


def _patterns(given: str | Sequence[str]) -> tuple[StopPattern, ...]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list | tuple) or any(not isinstance(pattern, str) for pattern in patterns):
        raise _fault("stop_regex", "must be a string or a list of strings")
    asked = [pattern for pattern in patterns if pattern]
    if len(asked) > PATTERNS_MAX:
        raise _fault("stop_regex", f"at most {PATTERNS_MAX} patterns")
    return tuple(compile_pattern(pattern, param="stop_regex") for pattern in asked)


def _listed(name: str, tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if not isinstance(tokens, list | tuple):
        raise _fault(name, "must be a list of token ids")
    if len(tokens) > LISTED_TOKENS_MAX:
        raise _fault(name, f"at most {LISTED_TOKENS_MAX} tokens")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise _fault(name, f"{token!r} is not in the vocabulary; ids are 0 to {vocab_size - 1}")
    return tuple(tokens)


def _biases(biases: Mapping[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not isinstance(biases, Mapping):
        raise _fault("logit_bias", "must map token ids to numbers from -100 to 100")
    tokens = _listed("logit_bias", list(biases), vocab_size)
    for bias in biases.values():
        _Range(float, -100, 100).check("logit_bias", bias)
    return tuple((token, float(biases[token])) for token in tokens)


def _fault(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {message}", param=name)
