"""Checking of bodies: whatever JSON comes, it becomes a checked model or an InvalidRequest, never another error."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.contract.messages import Sampling
from sessile.errors import InvalidRequest
from sessile.server.body import Body, parse_body, takes
from sessile.server.generate import GenerateBody, SamplingParams
from sessile.server.openai_bodies import ChatBody, CompletionBody
from sessile.server.sampling import to_sampling
from sessile.server.sessions import CreateBody

VOCAB_SIZE = 100
BODIES = (GenerateBody, SamplingParams, ChatBody, CompletionBody, CreateBody)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
plausible = values | st.integers(-3, 200) | st.floats(-3, 3) | st.lists(st.integers(-2, 120), max_size=5)


def fields_of(model: type[Body]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*model.model_fields, *model.tolerated, "unknown"]), plausible, max_size=5)


def checked(raw: bytes, model: type[Body]) -> Body | InvalidRequest:
    try:
        return parse_body(raw, model)
    except InvalidRequest as refusal:
        return refusal


@given(st.sampled_from(BODIES).flatmap(lambda model: st.tuples(st.just(model), fields_of(model))))
def test_any_json_is_a_checked_body_or_names_a_field(case: tuple[type[Body], dict[str, Any]]) -> None:
    model, fields = case
    outcome = checked(json.dumps(fields).encode(), model)
    if isinstance(outcome, InvalidRequest):
        assert outcome.param is not None
        assert outcome.param.split(".")[0] in {*model.model_fields, *model.tolerated, "unknown", "sampling_seed"}
    else:
        assert "unknown" not in fields


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_or_understood(raw: bytes) -> None:
    assert checked(raw, CreateBody)


@given(fields_of(SamplingParams))
def test_what_passes_the_checks_is_in_range_for_the_core(fields: dict[str, Any]) -> None:
    try:
        params = parse_body(json.dumps(fields).encode(), SamplingParams)
        sampling = to_sampling(
            params, max_new_tokens=params.max_new_tokens, min_new_tokens=params.min_new_tokens, vocab_size=VOCAB_SIZE
        )
    except InvalidRequest:
        return
    assert_in_range(sampling)


def assert_in_range(sampling: Sampling) -> None:
    assert 0 <= sampling.seed < 1 << 64
    assert 0 <= sampling.temperature <= 100 and (sampling.temperature == 0 or sampling.temperature >= 1e-5)
    assert 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and sampling.top_k >= 0
    assert 0 < sampling.repetition_penalty <= 2
    assert sampling.max_new_tokens is None or sampling.min_new_tokens <= sampling.max_new_tokens
    assert all(0 <= token < VOCAB_SIZE for token in sampling.stop_token_ids)
    assert all(0 <= token < VOCAB_SIZE and abs(bias) <= 100 for token, bias in sampling.logit_bias)
    assert all(sampling.stop)


@pytest.mark.parametrize(
    ("value", "accepted"), [("true", True), ("1", False), ("1.0", False), ("false", False), ("null", True)]
)
def test_a_tolerated_value_is_tolerated_as_its_own_type_only(value: str, accepted: bool) -> None:
    raw = b'{"spaces_between_special_tokens": %s}' % value.encode()
    if accepted:
        assert parse_body(raw, SamplingParams)
    else:
        with pytest.raises(InvalidRequest, match="spaces_between_special_tokens: not supported"):
            parse_body(raw, SamplingParams)


def test_a_bodys_description_stands_alone() -> None:
    description = json.dumps(takes(GenerateBody))
    assert "$ref" not in description
    assert "repetition_penalty" in description
