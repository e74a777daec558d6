"""text.format of /v1/responses through OpenAI's own client: what it comes to, and what of it is refused."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from sessile.contract.messages import Grammar
from tests.http.conftest import Running, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.test_tools import client_of
from tests.http.toy_engine import ToyEngine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "wet": {"type": "boolean"}},
    "required": ["city", "wet"],
    "additionalProperties": False,
}
NAMED: dict[str, Any] = {"type": "json_schema", "name": "forecast", "schema": SCHEMA}
TOOL: dict[str, Any] = {"type": "function", "name": "weather"}


class Forecast(BaseModel):
    city: Literal["Oslo", "Rome"]
    wet: bool


class FollowingEngine(ToyEngine):
    """One that follows grammars; 0 ends an output."""

    def __init__(self, address: str) -> None:
        super().__init__(address, pages=900, page_size=16, eos=0)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def following() -> Iterator[openai.OpenAI]:
    with running_server(FollowingEngine, tokenizer=byte_tokenizer(MARKED)) as running, client_of(running) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "default", "input": "Weather?", "temperature": 0, **fields})


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ({}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "text"}, "verbosity": "medium"}, None),
        ({"format": {"type": "json_object"}}, Grammar("json_object", "", "text.format")),
        ({"format": NAMED}, Grammar("json_schema", json.dumps(SCHEMA), "text.format.schema")),
        (
            {"format": {**NAMED, "strict": True, "description": "d"}},
            Grammar("json_schema", json.dumps(SCHEMA), "text.format.schema"),
        ),
    ],
)
def test_a_format_is_the_grammar_that_chat_would_ask_for(
    server: Running, client: openai.OpenAI, text: Any, grammar: Grammar | None
) -> None:
    ask(client, text=text)
    assert server.engine.submits()[-1].grammar == grammar


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (openai.omit, {"type": "text"}),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        ({"format": NAMED}, {**NAMED, "strict": False, "description": None}),
        (
            {"format": {**NAMED, "strict": True, "description": "d", "schema": {"maximum": 10**20}}},
            {**NAMED, "strict": True, "description": "d", "schema": {"maximum": 10**20}},
        ),
    ],
)
def test_a_response_shows_the_format_that_it_was_asked_for(client: openai.OpenAI, text: Any, shown: Any) -> None:
    created, *_, last = ask(client, text=text, stream=True)
    for response in (created.response, last.response, client.responses.retrieve(last.response.id)):
        assert response.text.format.model_dump(by_alias=True) == shown
        assert response.text.verbosity == "medium"


def test_what_is_answered_is_valid_under_the_schema_and_parsed_by_the_client(following: openai.OpenAI) -> None:
    response = following.responses.parse(model="default", input="Weather?", temperature=0, text_format=Forecast)
    assert (response.status, type(response.output_parsed)) == ("completed", Forecast)


def test_a_stream_is_of_the_same_form(following: openai.OpenAI) -> None:
    with following.responses.stream(model="default", input="Weather?", text_format=Forecast) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert Forecast.model_validate_json(deltas) == final.output_parsed


@pytest.mark.parametrize("keep", ["previous_response_id", "conversation"])
def test_each_response_has_a_form_of_its_own_and_the_kv_of_the_one_before(following: openai.OpenAI, keep: str) -> None:
    where = {"conversation": following.conversations.create().id} if keep == "conversation" else {}
    first = ask(following, text={"format": NAMED}, **where)
    where = where or {"previous_response_id": first.id}
    second = ask(following, text={"format": {**NAMED, "schema": {"enum": ["yes", "no"]}}}, **where)
    third = ask(following, max_output_tokens=3, **where)
    assert set(json.loads(first.output_text)) == {"city", "wet"} and second.output_text in ('"yes"', '"no"')
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert third.text.format.type == "text" and third.status == "incomplete"


def test_an_object_of_any_kind_begins_as_one(following: openai.OpenAI) -> None:
    assert ask(following, text={"format": {"type": "json_object"}}, max_output_tokens=20).output_text.startswith("{")


@pytest.mark.parametrize("extra", [{}, {"stream": True}])
@pytest.mark.parametrize(
    ("schema", "said"),
    [({"type": "strin"}, "Invalid type: strin"), ({"properties": {"a": {"not": {}}}}, "#/properties/a: keyword 'not'")],
)
def test_what_is_wrong_with_a_schema_is_400_with_its_place(
    following: openai.OpenAI, schema: Any, said: str, extra: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refusal:
        ask(following, text={"format": {**NAMED, "schema": schema}}, **extra)
    assert refusal.value.param == "text.format.schema"


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("text", "text"),
        ({"form": {}}, "text.form"),
        ({"format": "json_object"}, "text.format"),
        ({"format": {}}, "text.format.type"),
        ({"format": {"type": "xml"}}, "text.format.type"),
        ({"format": {"type": "json_schema", "name": "n"}}, "text.format.schema"),
        ({"format": {"type": "json_schema", "name": "n", "schema": "{}"}}, "text.format.schema"),
        ({"format": {"type": "json_schema", "schema": {}}}, "text.format.name"),
        ({"format": {**NAMED, "name": "two words"}}, "text.format.name"),
        ({"format": {**NAMED, "name": "n" * 65}}, "text.format.name"),
        ({"format": {**NAMED, "strict": "yes"}}, "text.format.strict"),
        ({"format": {**NAMED, "schema": {"description": "a" * 131_073}}}, "text.format.schema"),
        ({"format": {**NAMED, "json_schema": {}}}, "text.format.json_schema"),
        ({"format": {"type": "text", "schema": {}}}, "text.format.schema"),
        ({"format": {"type": "json_object", "name": "n"}}, "text.format.name"),
        ({"verbosity": "low"}, "text.verbosity"),
        ({"verbosity": "high"}, "text.verbosity"),
        ({"verbosity": "loud"}, "text.verbosity"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_with_its_param(server: Running, text: Any, param: str) -> None:
    reply = server.client.post("/v1/responses", json={"input": "x", "text": text})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert server.engine.submits() == []


def test_a_call_that_is_demanded_beside_a_form_is_refused(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="text.format.schema") as refusal:
        ask(client, text={"format": NAMED}, tools=[TOOL], tool_choice="required")
    assert refusal.value.param == "tool_choice"
    assert server.engine.submits() == []
