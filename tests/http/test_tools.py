"""Tools over the OpenAI-compatible surface, through OpenAI's own client; the engine says what it is told to."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.http.conftest import Running, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer

ASK = [{"role": "user", "content": "Weather in Oslo and Rome?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ANOTHER = CALL.replace("Oslo", "Rome")
ROOM_TOKENS = 4096
"""The words that offer tools are many bytes, each of which is a token."""
BROKEN = '<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>'


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    server.engine.context_tokens = ROOM_TOKENS
    with client_of(server) as client:
        yield client


def client_of(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "default", "messages": ASK, "tools": [TOOL], **fields})


def says(server: Running, text: str, *, token_s: float = 0.0) -> None:
    server.engine.script = list(text.encode())
    server.engine.token_interval_s = token_s


def prompt_of(server: Running) -> str:
    """What the engine was last asked; a token is a byte."""
    packed = server.engine.submits()[-1].tokens
    return bytes(memoryview(packed).cast("i").tolist()).decode()


def gathered(stream: Any) -> tuple[str, list[dict[str, str]], Any]:
    """Content, calls and the last choice of a stream, put together as clients do."""
    content, calls, last = "", [], None
    for chunk in stream:
        last = chunk.choices[0]
        content += last.delta.content or ""
        for piece in last.delta.tool_calls or []:
            if piece.index == len(calls):
                assert piece.id and piece.type == "function" and piece.function.arguments == ""
                calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
            else:
                assert piece.index == len(calls) - 1 and piece.id is None and piece.function.name is None
                calls[piece.index]["arguments"] += piece.function.arguments
    return content, calls, last


def test_calls_side_by_side_are_parts_of_the_message(server: Running, client: openai.OpenAI) -> None:
    says(server, f"Let me see.\n{CALL}\n{ANOTHER}")
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_an_answer_of_calls_alone_has_no_content(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    assert ask(client).choices[0].message.content is None


@pytest.mark.parametrize("token_s", [0.0, 0.002])
def test_calls_stream_as_openai_streams_them(server: Running, client: openai.OpenAI, token_s: float) -> None:
    says(server, f"Let me see.\n{CALL}\n{ANOTHER}", token_s=token_s)
    content, calls, last = gathered(ask(client, stream=True))
    assert (content, last.finish_reason) == ("Let me see.", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Rome"}'),
    ]  # fmt: skip


def test_arguments_come_before_the_call_has_ended(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL, token_s=0.01)
    pieces = [
        piece.function.arguments
        for chunk in ask(client, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(pieces) > 3 and "".join(pieces) == '{"city": "Oslo"}'


def test_a_call_that_cannot_be_read_is_text_and_flagged(server: Running, client: openai.OpenAI) -> None:
    says(server, f"So: {BROKEN}")
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (f"So:{BROKEN}", None)
    assert choice.finish_reason == "stop"
    (error,) = choice.tool_call_errors
    assert error["index"] == 0 and "Oslo" in error["message"]


def test_a_stream_that_had_begun_a_broken_call_takes_it_back_at_its_end(server: Running, client: openai.OpenAI) -> None:
    says(server, f"{BROKEN}{CALL}", token_s=0.002)
    content, calls, last = gathered(ask(client, stream=True))
    assert content == BROKEN
    assert [error["index"] for error in last.tool_call_errors] == [0]
    assert (calls[1]["arguments"], last.finish_reason) == ('{"city": "Oslo"}', "tool_calls")


def test_a_call_cut_off_by_the_limit_is_text_and_flagged(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    choice = ask(client, max_completion_tokens=50).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == CALL[:50] and len(choice.tool_call_errors) == 1


def test_an_answer_that_calls_nothing_is_as_without_tools(server: Running, client: openai.OpenAI) -> None:
    says(server, "It rains.")
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("It rains.", "stop", None)
    assert not hasattr(choice, "tool_call_errors")


@pytest.mark.parametrize("fields", [{"tools": openai.omit}, {"tool_choice": "none"}])
def test_without_tools_or_with_none_to_choose_nothing_is_a_call(
    server: Running, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    says(server, CALL)
    assert ask(client, **fields).choices[0].message.content == CALL
    assert "weather" not in prompt_of(server)


def test_without_parallel_calls_the_first_is_all(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL + ANOTHER)
    assert len(ask(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_a_model_whose_template_knows_no_tools_is_told_of_them(server: Running, client: openai.OpenAI) -> None:
    ask(client, messages=[{"role": "system", "content": "Be brief."}, *ASK])
    prompt = prompt_of(server)
    assert prompt.startswith("system:Be brief.\n\n# Tools\n")
    assert '{"type": "function", "function": {"name": "weather", "description": "Tell the weather"' in prompt
    assert "<tool_call>" in prompt


def test_calls_and_results_of_earlier_turns_are_rendered(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL + ANOTHER)
    message = ask(client).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(message.tool_calls, ("rain", "sun"), strict=True)
    ]
    says(server, "Rain and sun.")
    ask(client, messages=[*ASK, message.model_dump(exclude_none=True), *results], tools=openai.omit)
    assert prompt_of(server) == (
        f"user:{ASK[0]['content']}\nassistant:{CALL}\n{ANOTHER}\n"
        "user:<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>\n"
    )


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ("weather", "time")), ({"type": "function", "function": {"name": "time"}}, ("time",))],
)
def test_a_call_that_is_demanded_is_asked_of_the_engine_as_a_grammar(
    server: Running, client: openai.OpenAI, choice: Any, names: tuple[str, ...]
) -> None:
    ask(client, tools=[TOOL, {"type": "function", "function": {"name": "time"}}], tool_choice=choice)
    grammar = server.engine.submits()[-1].grammar
    assert (grammar.kind, grammar.field) == ("lark", "tools")
    assert [name for name in ("weather", "time") if f'\\"{name}\\"' in grammar.source] == list(names)


TIME = {"type": "function", "function": {"name": "time"}}


def only(*names: str, mode: str = "auto") -> dict[str, Any]:
    """A tool_choice that allows these."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_that_is_not_allowed_is_text_and_flagged(
    server: Running, client: openai.OpenAI, stream: bool
) -> None:
    says(server, f"So: {CALL}", token_s=0.002 if stream else 0.0)
    reply = ask(client, tools=[TOOL, TIME], stream=stream, **only("time"))
    if stream:
        content, calls, choice = gathered(reply)
    else:
        choice = reply.choices[0]
        content, calls = choice.message.content, choice.message.tool_calls or []
    assert (content, calls, choice.finish_reason) == (f"So:{CALL}", [], "stop")
    (error,) = choice.tool_call_errors
    assert error == {"index": None, "message": "'weather' is not among the tools that tool_choice allows"}


def test_a_call_of_a_tool_that_is_allowed_is_one(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL)
    (call,) = ask(client, tools=[TOOL, TIME], **only("weather")).choices[0].message.tool_calls
    assert (call.function.name, server.engine.submits()[-1].grammar) == ("weather", None)


@pytest.mark.parametrize("names", [("time",), ("weather", "time")])
def test_a_call_of_those_allowed_may_be_demanded(
    server: Running, client: openai.OpenAI, names: tuple[str, ...]
) -> None:
    ask(client, tools=[TOOL, TIME], **only(*names, mode="required"))
    source = server.engine.submits()[-1].grammar.source
    assert [name for name in ("weather", "time") if f'\\"{name}\\"' in source] == list(names)


def test_what_is_allowed_does_not_change_the_prompt(server: Running, client: openai.OpenAI) -> None:
    prompts = set()
    for choice in ({}, only("time"), only("weather", mode="required"), {"tool_choice": "required"}):
        ask(client, tools=[TOOL, TIME], **choice)
        prompts.add(prompt_of(server))
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}}, "tool_choice"),
        (only("time"), "tool_choice"),
        (only("weather", "time", mode="required"), "tool_choice"),
        (only(), "tool_choice"),
        (only("weather", mode="none"), "tool_choice"),
        ({"tool_choice": {**only("weather")["tool_choice"], "mode": "auto"}}, "tool_choice.mode"),
        ({"tools": [], **only("weather")}, "tool_choice"),
        ({**only("weather", mode="required"), "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather", "x": 1}}}, "tool_choice.function.x"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_what_makes_no_sense_of_tools_is_refused_by_its_name(
    server: Running, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, **fields)
    assert refusal.value.param == param
    assert server.engine.submits() == []


def test_a_call_cannot_be_demanded_of_no_tools(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, tools=openai.omit, tool_choice="required")
    assert refusal.value.param == "tool_choice"


ASSISTANT = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
        ({"role": "tool", "tool_call_id": "c"}, "messages[1].content"),
        ({**ASSISTANT, "tool_calls": "x"}, "messages[1].tool_calls"),
        ({**ASSISTANT, "tool_calls": [{"id": "c", "type": "custom"}]}, "messages[1].tool_calls[0]"),
        ({**ASSISTANT, "tool_calls": [{"id": "c"}]}, "messages[1].tool_calls[0].function"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f"}}]}, "messages[1].tool_calls[0].id"),
        (
            {**ASSISTANT, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls"),
    ],
)
def test_messages_with_calls_that_make_no_sense_are_refused(
    client: openai.OpenAI, message: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, messages=[*ASK, message])
    assert refusal.value.param == param


def test_logprobs_of_a_stream_with_calls_come_once_each(server: Running, client: openai.OpenAI) -> None:
    says(server, CALL, token_s=0.002)
    tokens = ""
    for chunk in ask(client, stream=True, logprobs=True):
        if chunk.choices[0].logprobs is not None:
            tokens += "".join(entry.token for entry in chunk.choices[0].logprobs.content)
    assert tokens == CALL


FORMATS = {
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "pythonic": '[weather(city="Oslo")]',
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_may_be_named_at_start(name: str) -> None:
    with running_server(tool_format=name) as running, client_of(running) as client:
        running.engine.context_tokens = ROOM_TOKENS
        says(running, FORMATS[name], token_s=0.002)
        _, calls, last = gathered(ask(client, stream=True))
        assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Oslo"}')]
        assert last.finish_reason == "tool_calls"


def test_a_server_that_reads_no_calls_refuses_tools() -> None:
    with running_server(tool_format="none") as running, client_of(running) as client:
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client)
        assert refusal.value.param == "tools"


def test_several_answers_are_read_each_by_itself(server: Running, client: openai.OpenAI) -> None:
    says(server, f"So.\n{CALL}", token_s=0.002)
    choices = ask(client, n=2).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1]
    assert choices[0].message.tool_calls[0].id != choices[1].message.tool_calls[0].id
    told: dict[int, str] = {0: "", 1: ""}
    for chunk in ask(client, n=2, stream=True):
        choice = chunk.choices[0]
        told[choice.index] += choice.delta.content or ""
        told[choice.index] += "".join(piece.function.arguments for piece in choice.delta.tool_calls or [])
    assert told == {0: 'So.{"city": "Oslo"}', 1: 'So.{"city": "Oslo"}'}


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_goes_on_from_a_turn_with_calls(stream: bool) -> None:
    with running_server(tokenizer=byte_tokenizer(MARKED)) as running, client_of(running) as client:
        running.engine.context_tokens = ROOM_TOKENS
        says(running, f"Let me see.\n{CALL}")
        session = {"extra_body": {"session_id": "s"}}
        if stream:
            content, calls, _ = gathered(ask(client, stream=True, **session))
            made = [{"id": call.pop("id"), "type": "function", "function": call} for call in calls]
            said = {"role": "assistant", "content": content, "tool_calls": made}
        else:
            said = ask(client, **session).choices[0].message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
        says(running, "Rain.")
        ask(client, messages=[*ASK, said, result], **session)
        assert prompt_of(running) == ";user:<tool_response>\nrain\n</tool_response>;assistant:"
        assert running.engine.submits()[-1].branch.parent == running.engine.submits()[0].rid


@pytest.mark.parametrize("arguments", ['{"a": 100000000000000000000}', '{"a":' * 120 + "1" + "}" * 120])
def test_a_session_takes_schemas_and_arguments_that_are_long_or_deep(arguments: str) -> None:
    """What turns are known by is written of them, too."""
    with running_server(tokenizer=byte_tokenizer(MARKED)) as running, client_of(running) as client:
        running.engine.context_tokens = ROOM_TOKENS
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"maxProperties": 10**20}}}
        says(running, f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>')
        session: dict[str, Any] = {"tools": [tool], "extra_body": {"session_id": "s"}}
        said = ask(client, **session).choices[0].message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
        says(running, "Rain.")
        ask(client, messages=[*ASK, said, result], **session)
        assert running.engine.submits()[-1].branch.parent == running.engine.submits()[0].rid


def test_arguments_that_are_too_deep_are_refused(client: openai.OpenAI) -> None:
    function = {"name": "f", "arguments": '{"a":' * 129 + "1" + "}" * 129}
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, messages=[*ASK, {**ASSISTANT, "tool_calls": [{"id": "c", "function": function}]}])
    assert refusal.value.param == "messages[1].tool_calls[0].function.arguments"
