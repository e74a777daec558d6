"""Fields that ask for an output of a certain form: what they come to, and what of them is refused, on every surface."""

import json
from typing import Any

import openai
import pytest

from sessile.contract.messages import Grammar
from tests.http.conftest import Running

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA)
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def sent(server: Running) -> Grammar | None:
    (submit,) = server.engine.submits()
    return submit.grammar


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"json_schema": TEXT}, Grammar("json_schema", TEXT, "sampling_params.json_schema")),
        ({"json_schema": SCHEMA}, Grammar("json_schema", TEXT, "sampling_params.json_schema")),
        ({"json_object": True}, Grammar("json_object", "", "sampling_params.json_object")),
        ({"regex": "a+"}, Grammar("regex", "a+", "sampling_params.regex")),
        ({"ebnf": "root ::= 'a'"}, Grammar("ebnf", "root ::= 'a'", "sampling_params.ebnf")),
        ({"json_object": False, "regex": None}, None),
    ],
)
def test_native_fields_come_to_one_grammar_that_names_its_field(
    server: Running, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    assert server.generate("hi", sampling_params=fields).status_code == 200
    assert sent(server) == grammar


@pytest.mark.parametrize("fields", [{"regex": "a", "ebnf": "b"}, {"json_schema": "{}", "json_object": True}])
def test_two_grammars_are_refused_by_the_name_of_the_second(server: Running, fields: dict[str, Any]) -> None:
    reply = server.generate("hi", sampling_params=fields)
    assert reply.status_code == 400 and server.engine.submits() == []
    first, second = fields
    assert f"sampling_params.{second}: give {first} or" in reply.text


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object", "", "response_format")),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}},
            Grammar("json_schema", TEXT, "response_format.json_schema.schema"),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": False, "schema": SCHEMA}},
            Grammar("json_schema", TEXT, "response_format.json_schema.schema"),
        ),
    ],
)
def test_response_format_is_a_grammar_in_chats(
    server: Running, client: openai.OpenAI, response_format: Any, grammar: Grammar | None
) -> None:
    client.chat.completions.create(model="default", messages=HI, response_format=response_format)
    assert sent(server) == grammar


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf"])
def test_sglangs_names_are_taken_at_the_top_of_openais_bodies(
    server: Running, client: openai.OpenAI, name: str
) -> None:
    client.completions.create(model="default", prompt="a", extra_body={name: TEXT})
    assert sent(server) == Grammar(name, TEXT, name)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format"),
        ({"response_format": {"type": "json_object", "colour": 1}}, "response_format.colour"),
        ({"regex": "a" * 131_073}, "regex"),
        ({"json_schema": {"description": "a" * 131_073}}, "json_schema"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused_with_its_param(
    server: Running, client: openai.OpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=HI, extra_body=body)
    assert refusal.value.param is not None and refusal.value.param.endswith(param)
    assert server.engine.submits() == []
