"""The same keywords mean the same in process and over HTTP: values that one refuses, the other refuses as well."""

from typing import Any

import orjson
import pytest

from sessile.completion import GenerateFields, SamplingParams
from sessile.contract.messages import Grammar, Sampling
from sessile.errors import InvalidRequest
from sessile.offline.sampling import MAX_NEW_TOKENS, wish_of
from sessile.server.body import parse_body
from sessile.server.generate import SamplingParams as HttpSamplingParams
from sessile.server.sampling import to_sampling

VOCAB_SIZE = 300
ACCEPTED: dict[str, list[Any]] = {
    "temperature": [0, 1e-6, 0.7, 1, 100],
    "top_p": [0.001, 1],
    "top_k": [-1, 0, 5, 2**31 - 1],
    "min_p": [0, 0.5, 1],
    "frequency_penalty": [-2, 0, 2],
    "presence_penalty": [-2, 0, 2],
    "repetition_penalty": [0.01, 2],
    "seed": [-(2**63), 0, 2**64 - 1],
    "max_new_tokens": [0, 1, 2**31 - 1, None],
    "min_new_tokens": [0, 1, 128],
    "stop": ["x", ["x", "ü"], [], ["x"] * 64],
    "stop_regex": ["a+", ["a", "b{2}"], [], ""],
    "stop_token_ids": [[], [0, 299]],
    "logit_bias": [{}, {0: -100, 299: 100.0}],
    "ignore_eos": [True, False],
    "skip_special_tokens": [True, False],
    "no_stop_trim": [True, False],
    "json_schema": ['{"type": "integer"}', {"type": "integer"}, True, False],
    "regex": ["a+"],
    "ebnf": ['root ::= "a"'],
    "json_object": [True, False],
}
REFUSED: dict[str, list[Any]] = {
    "temperature": [-0.1, 100.1, "1", True, float("nan")],
    "top_p": [0, -1, 1.01],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "frequency_penalty": [-2.1, 2.1],
    "presence_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, 2.1],
    "seed": [-(2**63) - 1, 2**64, 1.0],
    "max_new_tokens": [-1, 1.0, 2**31, "5"],
    "min_new_tokens": [-1, 129, True],
    "stop": ["", [""], "x" * 1025, ["x"] * 65, [1], 5],
    "stop_regex": ["(", ["a"] * 9, [1], 5],
    "stop_token_ids": [[300], [-1], ["x"], [0] * 1025],
    "logit_bias": [{300: 1}, {0: 101}, {0: "x"}, []],
    "ignore_eos": [1, "yes"],
    "skip_special_tokens": [0],
    "no_stop_trim": [1],
    "json_schema": [5, ["x"], "x" * 131_073],
    "regex": ["", 5],
    "ebnf": ["", []],
    "json_object": [1],
    "temprature": [1],
}


def over_http(**fields: Any) -> tuple[Sampling, Grammar | None]:
    """What the server makes of the same fields."""
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    params = parse_body(orjson.dumps(fields), HttpSamplingParams)
    sampling = to_sampling(
        params,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        vocab_size=VOCAB_SIZE,
    )
    return sampling, params.grammar_in()


def cases(table: dict[str, list[Any]]) -> list[Any]:
    named = [(name, value) for name, values in table.items() for value in values]
    return [pytest.param(name, value, id=f"{name}={value!r}"[:40]) for name, value in named]


def test_every_parameter_has_values_here() -> None:
    assert set(ACCEPTED) == set(SamplingParams.__annotations__)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_what_is_accepted_means_the_same(name: str, value: Any) -> None:
    fields: Any = {"seed": 5, name: value}
    wish = wish_of(fields, VOCAB_SIZE)
    assert (wish.sampling, wish.grammar) == over_http(**fields)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_what_is_refused_is_refused_by_name_on_both_sides(name: str, value: Any) -> None:
    fields: Any = {name: value}
    with pytest.raises(InvalidRequest, match=f"^{name}: ") as refusal:
        wish_of(fields, VOCAB_SIZE)
    assert refusal.value.param == name
    if value == value and value not in (2**64, -(2**63) - 1):  # JSON has no NaN, and orjson no larger numbers
        with pytest.raises(InvalidRequest, match=name):
            over_http(**fields)


def test_one_grammar_is_enough() -> None:
    fields: Any = {"json_schema": {}, "regex": "a"}
    with pytest.raises(InvalidRequest, match="give json_schema or regex, not both"):
        wish_of(fields, VOCAB_SIZE)


def test_a_misspelt_parameter_suggests_the_right_one() -> None:
    fields: Any = {"temprature": 1}
    with pytest.raises(InvalidRequest, match="did you mean temperature"):
        wish_of(fields, VOCAB_SIZE)


def test_nothing_given_is_what_nothing_means_over_http() -> None:
    wish = wish_of({}, VOCAB_SIZE)
    assert (wish.sampling.max_new_tokens, wish.trim_stop, wish.logprobs) == (MAX_NEW_TOKENS, True, -1)
    assert wish_of({}, VOCAB_SIZE).sampling.seed != wish.sampling.seed


def test_rivals_are_only_told_with_logprobs() -> None:
    assert wish_of(GenerateFields(return_logprob=True, top_logprobs_num=3), VOCAB_SIZE).logprobs == 3
    with pytest.raises(InvalidRequest, match="needs return_logprob"):
        wish_of(GenerateFields(top_logprobs_num=3), VOCAB_SIZE)
