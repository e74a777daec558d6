"""Anthropic's messages, through Anthropic's own client; the engine says what it is told to."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import pytest

from tests.http.conftest import Running, ring_of, running_server

ASK = [{"role": "user", "content": "Weather in Oslo?"}]
TOOL = {"name": "weather", "description": "Tell the weather", "input_schema": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>'
ROOM_TOKENS = 4096


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with running_server(reasoning_format="think") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    server.engine.context_tokens = ROOM_TOKENS
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": "default", "max_tokens": 1000, "messages": ASK, **fields})


def says(server: Running, text: str, *, token_s: float = 0.0) -> None:
    server.engine.script = list(text.encode())
    server.engine.token_interval_s = token_s


def prompt_of(server: Running) -> str:
    """What the engine was last asked; a token is a byte."""
    packed = server.engine.submits()[-1].tokens
    return bytes(memoryview(packed).cast("i").tolist()).decode()


def test_a_message_has_text_reason_and_usage(server: Running, client: anthropic.Anthropic) -> None:
    message = ask(client, system="Be brief.")
    assert prompt_of(server) == "system:Be brief.\nuser:Weather in Oslo?\n"
    assert message.content[0].text == prompt_of(server)
    assert (message.role, message.model, message.stop_reason) == ("assistant", "echo", "end_turn")
    prompt_tokens = len(prompt_of(server))
    usage = message.usage
    assert (usage.input_tokens, usage.output_tokens) == (prompt_tokens, prompt_tokens + 1)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (0, 0)


def test_text_blocks_are_text_and_may_be_marked_for_the_cache(server: Running, client: anthropic.Anthropic) -> None:
    def block(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}

    ask(client, system=[block("a"), block("b")], messages=[{"role": "user", "content": [block("c"), block("d")]}])
    assert prompt_of(server) == "system:a\nb\nuser:c\nd\n"


def test_a_stop_sequence_that_ends_the_answer_is_named(client: anthropic.Anthropic) -> None:
    message = ask(client, stop_sequences=["Oslo", "zz"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Oslo")
    assert message.content[0].text == "user:Weather in "


def test_an_answer_that_reaches_its_limit_says_so(client: anthropic.Anthropic) -> None:
    assert ask(client, max_tokens=3).stop_reason == "max_tokens"


def test_no_tokens_at_all_may_be_asked_for_to_warm_the_cache(client: anthropic.Anthropic) -> None:
    message = ask(client, max_tokens=0)
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)


def test_an_answer_may_be_begun_for_the_model(server: Running, client: anthropic.Anthropic) -> None:
    ask(client, messages=[*ASK, {"role": "assistant", "content": "The weather is"}])
    assert prompt_of(server) == "user:Weather in Oslo?\nassistant:The weather is"


def test_neighbours_of_one_role_are_one_turn(server: Running, client: anthropic.Anthropic) -> None:
    ask(client, messages=[*ASK, {"role": "user", "content": "And Rome?"}])
    assert prompt_of(server) == "user:Weather in Oslo?\nAnd Rome?\n"


def test_a_call_is_a_block(server: Running, client: anthropic.Anthropic) -> None:
    says(server, f"Let me see.\n{CALL}\n{CALL}")
    message = ask(client, tools=[TOOL])
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    call = message.content[1]
    assert (call.name, call.input, message.stop_reason) == ("weather", {"city": "Oslo"}, "tool_use")
    assert '{"name": "weather", "description": "Tell the weather", "parameters": {"type": "object"' in prompt_of(server)


def test_a_number_of_any_length_in_a_call_is_passed_on(server: Running, client: anthropic.Anthropic) -> None:
    says(server, CALL.replace('"Oslo"', "9" * 30))
    assert ask(client, tools=[TOOL]).content[-1].input == {"city": int("9" * 30)}


def test_a_call_and_its_result_go_back_into_the_prompt(server: Running, client: anthropic.Anthropic) -> None:
    says(server, f"<think>Hm.</think>Let me see.\n{CALL}")
    message = ask(client, tools=[TOOL])
    rain = [{"type": "text", "text": "rain"}]
    result = {"type": "tool_result", "tool_use_id": message.content[-1].id, "content": rain}
    failed = {"type": "tool_result", "tool_use_id": "x", "content": "gone", "is_error": True}
    turn = [result, failed, {"type": "text", "text": "So?"}]
    ask(client, messages=[*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": turn}])
    assert prompt_of(server) == (
        f"user:Weather in Oslo?\nassistant:Let me see.\n{CALL}\n"
        "user:<tool_response>\nrain\n</tool_response>\n<tool_response>\nError: gone\n</tool_response>\nuser:So?\n"
    )


def test_a_stream_adds_up_to_the_message(server: Running, client: anthropic.Anthropic) -> None:
    says(server, f"<think>Hm, so.</think>Let me see.\n{CALL}", token_s=0.01)
    kinds = []
    with client.messages.stream(model="default", max_tokens=1000, messages=ASK, tools=[TOOL]) as stream:
        for event in stream:
            kinds.append(event.type)
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.input) == ("Hm, so.", "Let me see.", {"city": "Oslo"})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == len(f"<think>Hm, so.</think>Let me see.\n{CALL}") + 1
    assert message.usage.output_tokens_details.thinking_tokens == len("<think>Hm, so.</think>")
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert kinds.count("input_json") > 3


def test_thinking_may_be_left_out_of_what_is_told(server: Running, client: anthropic.Anthropic) -> None:
    says(server, "<think>Hm, so.</think>Yes.", token_s=0.002)
    thinking = {"type": "adaptive", "display": "omitted"}
    whole = ask(client, thinking=thinking)
    with client.messages.stream(model="default", max_tokens=99, messages=ASK, thinking=thinking) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert [(block.type, getattr(block, "thinking", None)) for block in message.content] == [
            ("thinking", ""), ("text", None),
        ]  # fmt: skip
        assert message.usage.output_tokens_details.thinking_tokens == len("<think>Hm, so.</think>")


def test_a_call_that_cannot_be_read_is_text_and_flagged(server: Running, client: anthropic.Anthropic) -> None:
    says(server, f"So: {BROKEN}", token_s=0.002)
    message = ask(client, tools=[TOOL])
    assert [(block.type, block.text) for block in message.content] == [("text", f"So:{BROKEN}")]
    assert (message.stop_reason, message.tool_call_errors[0]["index"]) == ("end_turn", 0)
    with client.messages.stream(model="default", max_tokens=1000, messages=ASK, tools=[TOOL]) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["text", "tool_use", "text"]
    assert streamed.content[-1].text == BROKEN and streamed.stop_reason == "end_turn"


def test_the_tokens_of_a_prompt_are_counted_without_an_answer(server: Running, client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="default", messages=ASK, system="Be brief.")
    assert count.input_tokens == len("system:Be brief.\nuser:Weather in Oslo?\n")
    assert server.engine.submits() == []
    with_tools = client.messages.count_tokens(model="default", messages=ASK, tools=[TOOL])
    ask(client, tools=[TOOL])
    assert with_tools.input_tokens == len(prompt_of(server))


def test_the_asynchronous_client_works_too(server: Running, client: anthropic.Anthropic) -> None:
    async def converse() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
            client.messages.stream(model="default", max_tokens=99, messages=ASK) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(converse()) == "user:Weather in Oslo?\n"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_is_demanded_is_asked_of_the_engine_as_a_grammar(
    server: Running, client: anthropic.Anthropic, choice: dict[str, Any]
) -> None:
    ask(client, tools=[TOOL], tool_choice=choice)
    assert server.engine.submits()[-1].grammar.kind == "lark"
    ask(client, tools=[TOOL], tool_choice={"type": "none"})
    assert server.engine.submits()[-1].grammar is None and "weather" not in prompt_of(server)


def test_an_answer_may_have_to_be_json_behind_its_thinking(server: Running, client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    ask(client, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    grammar = server.engine.submits()[-1].grammar
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)
    assert grammar.lead.startswith('lead: ("<think>" thought space)?')


def test_calls_side_by_side_may_be_turned_off(server: Running, client: anthropic.Anthropic) -> None:
    says(server, CALL + CALL)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(client, tools=[TOOL], tool_choice=choice).content) == 1


BLOCKS = {
    "messages.0.content.0.type": [{"type": "image", "source": {}}],
    "messages.0.content.1.type": [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "a", "name": "f"}],
    "messages.0.content.0.text": [{"type": "text", "text": 5}],
    "messages.0.content.0.citations": [{"type": "text", "text": "x", "citations": [{}]}],
    "messages.0.content.0.cache_control": [{"type": "text", "text": "x", "cache_control": {"type": "eternal"}}],
    "messages.0.content.0.cache_control.ttl": [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "9h"}}
    ],
    "messages.0.content.0.tool_use_id": [{"type": "tool_result", "content": "x"}],
    "messages.0.content.0.content.0.type": [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}
    ],
    "messages.0.content": 5,
}  # fmt: skip


@pytest.mark.parametrize("field", BLOCKS)
def test_blocks_that_make_no_sense_are_refused_by_their_name(
    server: Running, client: anthropic.Anthropic, field: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        ask(client, messages=[{"role": "user", "content": BLOCKS[field]}])
    assert refusal.value.body["type"] == "error"
    assert refusal.value.body["error"]["type"] == "invalid_request_error"
    assert refusal.value.body["error"]["message"].startswith(f"{field}: ")
    assert server.engine.submits() == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"), ({"temperature": -1}, "temperature"),
        ({"messages": [*ASK, {"role": "assistant", "content": "x "}]}, "messages"), ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"), ({"stop": ["x"]}, "stop"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"), ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"), ({"n": 2}, "n"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"), ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_refused_by_their_name(
    server: Running, client: anthropic.Anthropic, fields: dict[str, Any], name: str
) -> None:
    body = {"model": "default", "max_tokens": 9, "messages": ASK, **fields}
    reply = server.client.post("/v1/messages", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(name)


def test_an_answer_with_calls_must_be_given_their_results(client: anthropic.Anthropic) -> None:
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    with pytest.raises(anthropic.BadRequestError, match="results"):
        ask(client, messages=[*ASK, {"role": "assistant", "content": [{"type": "text", "text": "x"}, call]}])


def test_another_model_is_not_found_in_anthropics_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as refusal:
        ask(client, model="claude-9")
    assert refusal.value.body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_a_400_even_for_a_stream(client: anthropic.Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        ask(client, messages=[{"role": "user", "content": "x" * 5000}], stream=stream)


def test_a_stream_that_is_aborted_ends_as_a_message_with_what_was_said(
    server: Running, client: anthropic.Anthropic
) -> None:
    says(server, "x" * 400, token_s=0.01)
    more = {"rid": "r", "ignore_eos": True}
    with client.messages.stream(model="default", max_tokens=400, messages=ASK, extra_body=more) as stream:
        next(iter(stream.text_stream))
        server.client.post("/abort_request", json={"rid": "r"})
        message = stream.get_final_message()
    assert message.stop_reason == "abort" and 0 < len(message.content[0].text) < 400


def test_an_answer_that_is_aborted_is_not_asked_for_again_on_either_surface(
    server: Running, client: anthropic.Anthropic
) -> None:
    says(server, "x" * 400, token_s=0.01)
    chat = {"model": "default", "messages": ASK, "max_tokens": 400, "rid": "chat"}
    with ThreadPoolExecutor(2) as pool:
        message = pool.submit(ask, client.with_options(max_retries=2), max_tokens=400, extra_body={"rid": "message"})
        completion = pool.submit(server.client.post, "/v1/chat/completions", json=chat)
        server.wait_until(lambda: len(server.engine.submits()) == 2)
        for rid in ("message", "chat"):
            server.client.post("/abort_request", json={"rid": rid})
    assert message.result().stop_reason == "abort"
    assert completion.result().status_code == 200
    assert completion.result().json()["choices"][0]["finish_reason"] == "abort"
    assert len(server.engine.submits()) == 2


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_message_of_no_blocks_is_refused_by_its_name(client: anthropic.Anthropic, role: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        ask(client, messages=[{"role": role, "content": []}])
    assert refusal.value.body["error"]["message"].startswith("messages")


def test_a_turn_in_which_nothing_was_said_may_be_sent_back(server: Running, client: anthropic.Anthropic) -> None:
    ask(client, messages=[*ASK, {"role": "assistant", "content": []}, {"role": "user", "content": "Well?"}])
    assert prompt_of(server) == "user:Weather in Oslo?\nassistant:\nuser:Well?\n"


def test_a_stream_that_fails_before_its_first_event_names_its_error_as_clients_know_it() -> None:
    with running_server(stream_keep_alive_s=0.05) as server:
        server.engine.pause()
        body = {"model": "default", "max_tokens": 9, "messages": ASK, "stream": True}
        with server.client.stream("POST", "/v1/messages", json=body) as reply:
            lines = reply.iter_lines()
            assert next(lines) == ": keep-alive"
            server.call(server.service.link.fail, "the engine fell over")
            rest = [line for line in lines if line and not line.startswith(":")]
        assert rest[0] == "event: error" and "the engine fell over" in rest[1] and len(rest) == 2


def test_a_client_that_closes_its_stream_ends_the_request(server: Running, client: anthropic.Anthropic) -> None:
    server.engine.token_interval_s = 0.005
    with client.messages.stream(
        model="default", max_tokens=400, messages=ASK, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.wait_until(lambda: server.engine.running == 0)
    assert len(server.engine.cancels()) == 1


def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    with running_server(key_ring=ring_of(acme="user")) as running:
        with anthropic.Anthropic(base_url=running.url, api_key="acme-key", max_retries=0) as client:
            assert ask(client).content
        with anthropic.Anthropic(base_url=running.url, auth_token="acme-key", max_retries=0) as client:
            assert ask(client).content
        with (
            anthropic.Anthropic(base_url=running.url, api_key="another", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError) as refusal,
        ):
            ask(client)
        assert refusal.value.body["error"]["type"] == "authentication_error"
        assert httpx.post(f"{running.url}/v1/messages", json={}).status_code == 401
