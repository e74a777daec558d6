"""Functions in /v1/responses through OpenAI's own client; the engine says what it is told to, or is the real core."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.http.conftest import Running, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.test_tools import ANOTHER, BROKEN, CALL, FORMATS, ROOM_TOKENS, client_of, prompt_of, says
from tests.http.toy_engine import ToyEngine

ASK = "Weather in Oslo and Rome?"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TOOLED = (
    "{% if tools %}<tool_call>{{ tools | length }};{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A template that knows tools, in few bytes, and ends each message with a semicolon."""


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    server.engine.context_tokens = ROOM_TOKENS
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def marked() -> Iterator[Running]:
    """A server whose template lets answers be gone on from."""
    with running_server(tokenizer=byte_tokenizer(MARKED)) as running:
        running.engine.context_tokens = ROOM_TOKENS
        yield running


def ask(client: openai.OpenAI, text: Any = ASK, **fields: Any) -> Any:
    return client.responses.create(**{"model": "default", "input": text, "tools": [TOOL], **fields})


def output_of(call: Any, text: str) -> dict[str, str]:
    return {"type": "function_call_output", "call_id": call.call_id, "output": text}


def kinds(response: Any) -> list[str]:
    return [item.type for item in response.output]


def test_calls_are_items_beside_the_words(server: Running, client: openai.OpenAI) -> None:
    says(server, f"Let me see.\n{CALL}\n{ANOTHER}")
    response = ask(client)
    assert kinds(response) == ["message", "function_call", "function_call"]
    assert (response.status, response.output_text) == ("completed", "Let me see.")
    calls = response.output[1:]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Rome"}'),
    ]  # fmt: skip
    assert {call.status for call in calls} == {"completed"}
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2


def test_an_answer_of_calls_alone_has_no_message(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    assert kinds(ask(client)) == ["function_call"]


def test_words_behind_a_call_are_a_message_of_their_own(server: Running, client: openai.OpenAI) -> None:
    says(server, f"So: {CALL} and done")
    response = ask(client)
    assert kinds(response) == ["message", "function_call", "message"]
    says(server, "Rain.")
    ask(client, [{"role": "user", "content": ASK}, *response.output, output_of(response.output[1], "rain")])
    assert f"\nassistant:{response.output_text}\n{CALL}\nuser:<tool_response>\nrain" in prompt_of(server)


def test_a_response_shows_the_tools_that_it_was_given(server: Running, client: openai.OpenAI) -> None:
    long_number = {**TOOL, "name": "count", "parameters": {"type": "object", "maxProperties": 10**20}}
    response = ask(client, tools=[TOOL, long_number], parallel_tool_calls=False)
    assert (response.tool_choice, response.parallel_tool_calls) == ("auto", False)
    assert response.tools[0].model_dump(exclude_unset=True) == TOOL
    named = ask(client, tool_choice={"type": "function", "name": "weather"})
    assert (named.tool_choice.type, named.tool_choice.name) == ("function", "weather")


@pytest.mark.parametrize("token_s", [0.0, 0.002])
def test_a_stream_tells_of_calls_with_openais_typed_events(
    server: Running, client: openai.OpenAI, token_s: float
) -> None:
    says(server, f"Let me see.\n{CALL}\n{ANOTHER}", token_s=token_s)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    told = [event for event in events if event.type != "response.output_text.delta"]
    of_a_call = [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    assert list(dict.fromkeys(event.type for event in told if getattr(event, "output_index", None) == 1)) == of_a_call
    assert [event.item.type for event in events if event.type == "response.output_item.done"] == kinds(final)
    for index, item in enumerate(final.output[1:], 1):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        deltas = "".join(event.delta for event in own if event.type == "response.function_call_arguments.delta")
        assert deltas == own[-2].arguments == own[-1].item.arguments == item.arguments
        assert (own[0].item.arguments, own[0].item.status, own[-1].item.status) == ("", "in_progress", "completed")
        assert {event.item_id for event in own[1:-1]} == {own[0].item.id} == {item.id}
        assert own[0].item.call_id == item.call_id
    assert client.responses.retrieve(final.id).output == final.output


def test_the_clients_helpers_parse_arguments_and_add_streams_up(server: Running, client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: str

    says(server, f"Let me see.\n{CALL}", token_s=0.01)
    tools: Any = [openai.pydantic_function_tool(Weather, name="weather")]
    assert client.responses.parse(model="default", input=ASK, tools=tools).output[1].parsed_arguments.city == "Oslo"
    with client.responses.stream(model="default", input=ASK, tools=tools) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 1 and deltas[-1].snapshot == final.output[1].arguments
    assert final.output[1].parsed_arguments == Weather(city="Oslo")
    says(server, "Rain.")
    ask(client, [{"role": "user", "content": ASK}, *final.output, output_of(final.output[1], "rain")])
    assert f"assistant:Let me see.\n{CALL}\n" in prompt_of(server)


def test_a_call_that_cannot_be_read_is_text_and_flagged(server: Running, client: openai.OpenAI) -> None:
    says(server, f"So: {BROKEN}")
    response = ask(client)
    assert (kinds(response), response.status) == (["message"], "completed")
    assert response.output_text == f"So:{BROKEN}"
    (error,) = response.tool_call_errors
    assert "Oslo" in error["message"]
    assert client.responses.retrieve(response.id).tool_call_errors == [error]


def test_a_stream_that_had_begun_a_broken_call_takes_it_back(server: Running, client: openai.OpenAI) -> None:
    says(server, f"{BROKEN}{CALL}", token_s=0.002)
    with client.responses.stream(model="default", input=ASK, tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert (kinds(final), final.output_text) == (["message", "function_call"], BROKEN)
    (error,) = final.tool_call_errors
    done = [event for event in events if event.type == "response.output_item.done"]
    void = next(event for event in done if event.output_index == error["index"])
    assert (void.item.type, void.item.status) == ("function_call", "incomplete")
    assert void.item.call_id not in {item.call_id for item in final.output if item.type == "function_call"}
    whole = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in whole] == ['{"city": "Oslo"}']


@pytest.mark.parametrize("token_s", [0.0, 0.002])
def test_words_on_both_sides_of_a_broken_call_are_streamed_as_two_messages_and_kept_as_one(
    server: Running, client: openai.OpenAI, token_s: float
) -> None:
    says(server, f"So: {BROKEN}", token_s=token_s)
    events = list(ask(client, stream=True))
    told = ""
    for done in [event for event in events if event.type == "response.output_text.done"]:
        own = [event for event in events if getattr(event, "output_index", None) == done.output_index]
        deltas = "".join(event.delta for event in own if event.type == "response.output_text.delta")
        assert deltas == done.text == own[-2].part.text == own[-1].item.content[0].text
        told += deltas
    assert kinds(events[-1].response) == ["message"]
    assert events[-1].response.output_text == told == f"So:{BROKEN}"


def test_a_call_cut_off_by_the_limit_is_text_and_flagged(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    response = ask(client, max_output_tokens=50)
    assert (response.status, kinds(response), response.output_text) == ("incomplete", ["message"], CALL[:50])
    assert response.output[0].status == "incomplete" and len(response.tool_call_errors) == 1


@pytest.mark.parametrize("fields", [{"tools": openai.omit}, {"tool_choice": "none"}, {"tools": []}])
def test_without_tools_or_with_none_to_choose_nothing_is_a_call(
    server: Running, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    says(server, CALL)
    response = ask(client, **fields)
    assert (kinds(response), response.output_text) == (["message"], CALL)
    assert not hasattr(response, "tool_call_errors") and "# Tools" not in prompt_of(server)


def test_without_parallel_calls_the_first_is_all(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL + ANOTHER)
    assert kinds(ask(client, parallel_tool_calls=False)) == ["function_call"]


@pytest.mark.parametrize(
    ("choice", "names"), [("required", ("weather", "time")), ({"type": "function", "name": "time"}, ("time",))]
)
def test_a_call_that_is_demanded_is_asked_of_the_engine_as_a_grammar(
    server: Running, client: openai.OpenAI, choice: Any, names: tuple[str, ...]
) -> None:
    ask(client, tools=[TOOL, {"type": "function", "name": "time"}], tool_choice=choice)
    grammar = server.engine.submits()[-1].grammar
    assert (grammar.kind, grammar.field) == ("lark", "tools")
    assert [name for name in ("weather", "time") if f'\\"{name}\\"' in grammar.source] == list(names)


TIME = {"type": "function", "name": "time"}


def only(*names: str, mode: str = "auto") -> dict[str, Any]:
    """A tool_choice that allows these."""
    tools = [{"type": "function", "name": name} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "mode": mode, "tools": tools}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_that_is_not_allowed_is_text_and_flagged(
    server: Running, client: openai.OpenAI, stream: bool
) -> None:
    says(server, CALL, token_s=0.002 if stream else 0.0)
    reply = ask(client, tools=[TOOL, TIME], stream=stream, **only("time"))
    response = list(reply)[-1].response if stream else reply
    assert (kinds(response), response.output_text, response.status) == (["message"], CALL, "completed")
    (error,) = response.tool_call_errors
    assert error["index"] is None and "'weather' is not among" in error["message"]


def test_a_response_shows_which_tools_are_allowed(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    response = ask(client, tools=[TOOL, TIME], **only("weather"))
    assert response.tool_choice.model_dump() == only("weather")["tool_choice"]
    assert (kinds(response), len(response.tools)) == (["function_call"], 2)


@pytest.mark.parametrize("names", [("time",), ("weather", "time")])
def test_a_call_of_those_allowed_may_be_demanded(
    server: Running, client: openai.OpenAI, names: tuple[str, ...]
) -> None:
    ask(client, tools=[TOOL, TIME], **only(*names, mode="required"))
    source = server.engine.submits()[-1].grammar.source
    assert [name for name in ("weather", "time") if f'\\"{name}\\"' in source] == list(names)


def test_other_tools_may_be_allowed_from_turn_to_turn_at_no_cost_in_kv() -> None:
    engine = partial(ToyEngine, pages=900, page_size=16, eos=0)
    with running_server(engine, tokenizer=byte_tokenizer(TOOLED)) as toy, client_of(toy) as client:
        bare = {**TIME, "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
        fields = {"tools": [bare, {**bare, "name": "day"}], "parallel_tool_calls": False, "temperature": 0}
        first = ask(client, "When?", **fields, **only("time", mode="required"))
        assert [item.name for item in first.output] == ["time"]
        output = [output_of(first.output[0], "now")]
        second = ask(client, output, previous_response_id=first.id, **fields, **only("day", mode="required"))
        assert [item.name for item in second.output] == ["day"]
        assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_chat_reads_is_read(name: str) -> None:
    with running_server(tool_format=name) as running, client_of(running) as client:
        running.engine.context_tokens = ROOM_TOKENS
        says(running, FORMATS[name], token_s=0.002)
        final = list(ask(client, stream=True))[-1].response
        assert [(item.name, item.arguments) for item in final.output] == [("weather", '{"city": "Oslo"}')]


def test_a_server_that_reads_no_calls_refuses_tools() -> None:
    with running_server(tool_format="none") as running, client_of(running) as client:
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client)
        assert refusal.value.param == "tools"


# -- outputs, and what goes on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_output_goes_on_from_the_turn_that_called(marked: Running, stream: bool) -> None:
    with client_of(marked) as client:
        says(marked, f"Let me see.\n{CALL}")
        first = list(ask(client, stream=True))[-1].response if stream else ask(client)
        turn = marked.engine.submits()[-1].rid
        says(marked, "Rain.")
        second = ask(client, [output_of(first.output[1], "rain")], previous_response_id=first.id)
        assert prompt_of(marked) == ";user:<tool_response>\nrain\n</tool_response>;assistant:"
        assert marked.engine.submits()[-1].branch.parent == turn
        assert second.output_text == "Rain."


def test_an_output_goes_on_in_a_conversation_which_lists_both(marked: Running) -> None:
    with client_of(marked) as client:
        conversation = client.conversations.create()
        says(marked, CALL)
        (call,) = ask(client, conversation=conversation.id).output
        says(marked, "Rain.")
        parts = [{"type": "input_text", "text": "rain"}, {"type": "input_text", "text": "wind"}]
        ask(client, [{**output_of(call, ""), "output": parts}], conversation=conversation.id)
        assert prompt_of(marked) == ";user:<tool_response>\nrain\nwind\n</tool_response>;assistant:"
        items = list(client.conversations.items.list(conversation.id, order="asc"))
        assert [item.type for item in items] == ["message", "function_call", "function_call_output", "message"]
        assert (items[1].call_id, items[2].call_id, items[2].output) == (call.call_id, call.call_id, "rain\nwind")
        asked = list(client.responses.input_items.list(ask(client, conversation=conversation.id).id))
        assert [item.type for item in asked] == ["message"]


def test_items_of_calls_may_be_put_into_a_conversation(marked: Running) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'}
    output = {"type": "function_call_output", "call_id": "c", "output": "rain"}
    with client_of(marked) as client:
        with pytest.raises(openai.BadRequestError) as refusal:
            client.conversations.create(items=[output, call])
        assert refusal.value.param == "items[0].call_id"
        conversation = client.conversations.create(items=[call])
        client.conversations.items.create(conversation.id, items=[output])
        with pytest.raises(openai.BadRequestError) as refusal:
            client.conversations.items.create(conversation.id, items=[output, {**output, "call_id": "d"}])
        assert refusal.value.param == "items[1].call_id"
        ask(client, "So?", conversation=conversation.id, tools=openai.omit)
        assert prompt_of(marked) == (
            f"assistant:{CALL};user:<tool_response>\nrain\n</tool_response>;user:So?;assistant:"
        )


def test_with_store_false_the_client_sends_all_items_again(marked: Running) -> None:
    with client_of(marked) as client:
        says(marked, f"Let me see.\n{CALL}\n{ANOTHER}")
        items: list[Any] = [{"role": "user", "content": ASK}]
        first = ask(client, items, store=False)
        items += [*first.output, *[output_of(call, text) for call, text in zip(first.output[1:], ("rain", "sun"),
                                                                               strict=True)]]  # fmt: skip
        says(marked, "Rain and sun.")
        second = ask(client, items, store=False)
        resent = prompt_of(marked)
        assert second.output_text == "Rain and sun."
        assert resent.endswith(
            f";user:{ASK};assistant:Let me see.\n{CALL}\n{ANOTHER};"
            "user:<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>;assistant:"
        )
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client, [output_of(first.output[1], "rain")], store=False)
        assert refusal.value.param == "input[0].call_id"


def test_other_tools_than_before_are_another_prompt_from_its_beginning(marked: Running) -> None:
    with client_of(marked) as client:
        says(marked, CALL)
        first = ask(client)
        says(marked, "Rain.")
        output = [output_of(first.output[0], "rain")]
        ask(client, output, previous_response_id=first.id, tools=openai.omit)
        assert prompt_of(marked).startswith(f"user:{ASK};assistant:{CALL};user:<tool_response>")
        assert marked.engine.submits()[-1].branch.parent is None


def test_a_response_in_the_background_calls_too(marked: Running) -> None:
    with client_of(marked) as client:
        says(marked, CALL)
        begun = ask(client, background=True)
        marked.wait_until(lambda: client.responses.retrieve(begun.id).status == "completed")
        (call,) = client.responses.retrieve(begun.id).output
        says(marked, "Rain.")
        assert ask(client, [output_of(call, "rain")], previous_response_id=begun.id).output_text == "Rain."


@pytest.mark.parametrize("keep", ["previous_response_id", "conversation"])
def test_an_output_finds_all_kv_of_the_call_but_its_last_token(keep: str) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    tools = [{"type": "function", "name": "weather", "parameters": city, "strict": True}]
    engine = partial(ToyEngine, pages=900, page_size=16, eos=0)
    with (
        running_server(engine, tokenizer=byte_tokenizer(TOOLED)) as toy,
        client_of(toy) as client,
    ):
        where = {"conversation": client.conversations.create().id} if keep == "conversation" else {}
        fields = {"tools": tools, "parallel_tool_calls": False, "temperature": 0}
        first = ask(client, "Weather?", tool_choice="required", **where, **fields)
        (call,) = first.output
        assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
        where = where or {"previous_response_id": first.id}
        second = ask(client, [output_of(call, "rain")], max_output_tokens=6, **where, **fields)
        held = first.usage.input_tokens + first.usage.output_tokens
        assert second.usage.input_tokens_details.cached_tokens == held - 1
        assert second.usage.input_tokens == held + len(";tool:rain;assistant:")
        if keep == "previous_response_id":
            beside = ask(client, [output_of(call, "sun")], max_output_tokens=6, **where, **fields)
            assert beside.usage.input_tokens_details.cached_tokens == held - 1


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_is_an_item_before_what_is_said() -> None:
    with running_server(reasoning_format="think") as running, client_of(running) as client:
        running.engine.context_tokens = ROOM_TOKENS
        says(running, f"<think>Oslo, so.</think>\n{CALL}", token_s=0.002)
        with client.responses.stream(model="default", input=ASK, tools=[TOOL]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert kinds(final) == ["reasoning", "function_call"]
        assert (final.output[0].content[0].text, final.output[0].summary) == ("Oslo, so.", [])
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == "Oslo, so."
        assert final.usage.output_tokens_details.reasoning_tokens == len("<think>Oslo, so.</think>")
        says(running, "Rain.")
        again = [{"role": "user", "content": ASK}, *final.output, output_of(final.output[1], "rain")]
        assert ask(client, again).output_text == "Rain."
        assert f"assistant:{CALL}\nuser:<tool_response>" in prompt_of(running)


# -- refusals ---------------------------------------------------------------------------------------------------------

CALLED = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools.0.parameters"),
        ({"tools": [{"type": "function", "name": "f", "params": {}}]}, "tools.0.params"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "time"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "weather", "mode": "auto"}}, "tool_choice.mode"),
        (only(), "tool_choice"),
        (only("weather", mode="any"), "tool_choice"),
        (only("time"), "tool_choice"),
        (only("weather", "time", mode="required"), "tool_choice"),
        ({"tools": [], **only("weather")}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{**TIME, "strict": True}]}},
         "tool_choice.tools.0.strict"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        ({"input": [OUTPUT, CALLED]}, "input[0].call_id"),
        ({"input": [CALLED, {**OUTPUT, "call_id": "d"}]}, "input[1].call_id"),
        ({"input": [CALLED, {**OUTPUT, "call_id": 5}]}, "input[1].call_id"),
        ({"input": [CALLED, {**OUTPUT, "output": None}]}, "input[1].output"),
        ({"input": [CALLED, {**OUTPUT, "output": [{"type": "input_image"}]}]}, "input[1].output[0].type"),
        ({"input": [CALLED, {**OUTPUT, "result": "x"}]}, "input[1].result"),
        ({"input": [{"type": "function_call"}]}, "input[0].call_id"),
        ({"input": [{**CALLED, "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{**CALLED, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{**CALLED, "arguments": '{"a":' * 129 + "1" + "}" * 129}]}, "input[0].arguments"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "input[0].type"),
        ({"input": [{"type": ["function_call"]}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "content": [{"type": "text"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ],
)
def test_what_makes_no_sense_of_tools_is_refused_by_its_name(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    reply = server.client.post("/v1/responses", json={"input": ASK, "tools": [TOOL], **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert server.engine.submits() == []


def test_a_tool_that_openais_servers_run_is_refused_by_its_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="web_search"):
        ask(client, tools=[{"type": "web_search"}])


@pytest.mark.parametrize("arguments", ['{"a": 100000000000000000000}', '{"a":' * 120 + "1" + "}" * 120])
def test_arguments_of_any_size_go_back_into_the_prompt(marked: Running, arguments: str) -> None:
    with client_of(marked) as client:
        says(marked, f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>')
        first = ask(client)
        (call,) = first.output
        assert json.loads(call.arguments) == json.loads(arguments)
        turn = marked.engine.submits()[-1].rid
        says(marked, "Rain.")
        ask(client, [output_of(call, "rain")], previous_response_id=first.id)
        assert marked.engine.submits()[-1].branch.parent == turn
