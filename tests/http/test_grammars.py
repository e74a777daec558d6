"""Fields that ask for an output of a certain form: what they come to, and what of them is refused, on every surface."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from sessile.contract.messages import Grammar
from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine
from tests.unit.drafters import ToldDrafter

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA)
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class FollowingEngine(ToyEngine):
    """Every byte but 0 is a token, and 0 ends an output; drafts that the last token comes again."""

    def __init__(self, address: str) -> None:
        drafter = ToldDrafter(lambda text, count: text[-1:] * count, limit=2)
        super().__init__(address, eos=0, drafter=drafter, drafts_max=4, retract_every=5)


@pytest.fixture(scope="module")
def following() -> Iterator[Running]:
    with running_server(FollowingEngine) as running:
        yield running


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
    ("fields", "grammar"),
    [
        ({"json": SCHEMA}, Grammar("json_schema", TEXT, "structured_outputs.json")),
        ({"regex": "a+"}, Grammar("regex", "a+", "structured_outputs.regex")),
        ({"grammar": "root ::= 'a'"}, Grammar("ebnf", "root ::= 'a'", "structured_outputs.grammar")),
        ({"choice": ["ja", 'so "so"']}, Grammar("lark", 'start: "ja" | "so \\"so\\""', "structured_outputs.choice")),
        ({"json_object": True}, Grammar("json_object", "", "structured_outputs.json_object")),
        ({}, None),
    ],
)
def test_vllms_structured_outputs_are_a_grammar(
    server: Running, client: openai.OpenAI, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    client.chat.completions.create(model="default", messages=HI, extra_body={"structured_outputs": fields})
    assert sent(server) == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"colour": 1}}, "structured_outputs.colour"),
        ({"structured_outputs": {"regex": "a"}, "ebnf": "b"}, "structured_outputs"),
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


# -- with an engine that follows them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "form"),
    [
        ("/generate", {"text": "a", "sampling_params": {"regex": "[a-c]{3,9}-[0-9]{2}"}}, r"[a-c]{3,9}-\d\d"),
        ("/generate", {"text": "a", "sampling_params": {"ebnf": 'root ::= "aaa" ("b" | "cc")'}}, "aaa(b|cc)"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 99, "json_schema": {"enum": ["aaa", "bb"]}}, '"(aaa|bb)"'),
        ("/v1/completions", {"prompt": "a", "max_tokens": 99, "regex": "(yes|no)!!!"}, "(yes|no)!!!"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["on", 'o"f']}}, 'on|o"f'),
    ],
)
def test_what_is_said_has_the_form_and_stops(following: Running, route: str, body: Any, form: str) -> None:
    reply = following.client.post(route, json=body, timeout=60).json()
    text = reply["text"] if "text" in reply else reply["choices"][0]["text"]
    reason = reply["meta_info"]["finish_reason"]["type"] if "text" in reply else reply["choices"][0]["finish_reason"]
    assert re.fullmatch(form, text) and reason == "stop"


def test_a_turn_of_a_session_has_a_form_of_its_own(following: Running) -> None:
    following.client.post("/v1/sessions", json={"id": "s"})
    texts = []
    for form in ("aaa|bbb", "c{5}"):
        reply = following.generate("x", sampling_params={"regex": form}, session_params={"id": "s"}).json()
        texts.append(reply["text"])
    assert texts[0] in ("aaa", "bbb") and texts[1] == "ccccc"
    following.client.delete("/v1/sessions/s")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"regex": "a(b"}, "regex", "character 2: unclosed group"),
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "json_schema", "#/properties/a: keyword 'not'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
            "response_format.json_schema.schema", "Invalid type: strin",
        ),
        ({"ebnf": "root ::= foo"}, "ebnf", "Rule 'foo' not found"),
        ({"json_schema": '{"properties": {"\\ud800": 1}}'}, "json_schema", "half a surrogate pair"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "leave it out"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_grammar_is_400_with_its_place(
    following: Running, body: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    reply = following.client.post("/v1/completions", json={"prompt": "a", "stream": stream, **body}, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and said in error["message"]


def test_h57_a_schema_made_to_exhaust_the_compiler_is_400_within_a_second_and_holds_up_nobody(
    following: Running,
) -> None:
    bomb = {"allOf": [{"type": "integer", "multipleOf": 9000 + n} for n in range(9)]}
    started_s = time.perf_counter()
    reply = following.client.post("/v1/completions", json={"prompt": "a", "json_schema": bomb}, timeout=60)
    assert reply.status_code == 400 and time.perf_counter() - started_s < 5
    assert following.generate("a", sampling_params={"max_new_tokens": 3}).status_code == 200
