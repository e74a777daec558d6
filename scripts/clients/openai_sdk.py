"""OpenAI's own client against a server: `python scripts/clients/openai_sdk.py http://127.0.0.1:30000`."""

import asyncio
import json
import sys
import time
from typing import Any

import openai
from checks import MODEL, Checks, url_given
from pydantic import BaseModel

PROMPT = "Once upon a time, in a small village by the sea,"
ASK: list[Any] = [{"role": "user", "content": "Name a river in Europe."}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
RESPONSE: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
CONCURRENT = 8
BACKGROUND_S_MAX = 60


class Forecast(BaseModel):
    """Tell the weather of a city"""

    city: str
    days: int


def check_models_and_errors(client: openai.OpenAI, checks: Checks) -> None:
    """What is served, and how refusals arrive."""
    (model,) = client.models.list()
    checks.that(client.models.retrieve(model.id).id == model.id, "the model is listed and found by its name", model.id)
    try:
        client.chat.completions.create(model="gpt-5", messages=ASK)
    except openai.NotFoundError as error:
        found = (error.code, error.param)
        checks.that(found == ("model_not_found", "model"), "another model is a NotFoundError", *found)
    try:
        client.chat.completions.create(**GREEDY | {"temperature": -1}, messages=ASK)
    except openai.BadRequestError as error:
        checks.that(error.param == "temperature", "a bad field is a BadRequestError with its name", error.param)
    raw = client.chat.completions.with_raw_response.create(**GREEDY, messages=ASK)
    checks.that(bool(raw.parse().choices) and bool(raw.request_id), "a raw response has a request id")


def check_completions(client: openai.OpenAI, checks: Checks) -> None:
    """Text behind a prompt: whole, streamed, scored, several."""
    whole = client.completions.create(**GREEDY, prompt=PROMPT)
    counted: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    stream = list(client.completions.create(**GREEDY, prompt=PROMPT, **counted))
    text = "".join(choice.text for chunk in stream for choice in chunk.choices)
    checks.that(text == whole.choices[0].text, "a streamed completion says what the whole one says")
    checks.that(stream[-1].usage is not None and stream[-1].usage.completion_tokens == 24, "its usage comes last")
    scored = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0, temperature=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
    checks.that("".join(logprobs.tokens) == PROMPT, "echo gives the prompt with its log-probabilities")
    checks.that(logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:]),
                "none for the first token, none above 0")  # fmt: skip
    answers = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, n=8, seed=40)
    alone = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, seed=43)
    assert answers.usage is not None and alone.usage is not None
    checks.that(answers.usage.prompt_tokens == alone.usage.prompt_tokens, "8 answers count their prompt once")
    checks.that(answers.choices[3].text == alone.choices[0].text, "the fourth is the one with the seed plus 3")
    stopped = client.completions.create(**GREEDY, prompt=PROMPT, stop=[text.split()[-2]])
    checks.that(stopped.choices[0].finish_reason == "stop" and text.startswith(stopped.choices[0].text), "stop stops")


def check_chat(client: openai.OpenAI, checks: Checks) -> None:
    """Chat: whole, streamed by hand and by the client's helper, parsed, on a session."""
    sentence = {**GREEDY, "max_tokens": 200, "stop": ["."]}  # the helpers refuse what the length limit has cut
    whole = client.chat.completions.create(**sentence, messages=ASK).choices[0]
    chunks = client.chat.completions.create(**sentence, messages=ASK, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    checks.that(said == whole.message.content, "a streamed chat says what the whole one says", repr(said))
    with client.chat.completions.stream(**sentence, messages=ASK, logprobs=True, top_logprobs=2) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    checks.that(final.message.content == said and "content.done" in kinds, "the stream helper adds up to the same")
    assert final.logprobs is not None and final.logprobs.content is not None
    tokens = "".join(token.token for token in final.logprobs.content)
    checks.that(tokens.startswith(said), "its log-probabilities are those of the text and of what stopped it")
    parsed = client.chat.completions.parse(**GREEDY | {"max_tokens": 200}, messages=ASK, response_format=Forecast)
    checks.that(isinstance(parsed.choices[0].message.parsed, Forecast), "parse() gives the model's class",
                parsed.choices[0].message.content)  # fmt: skip
    messages: list[Any] = []
    held = 0
    for text in ("Name a colour.", "Another one.", "And a third."):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(**GREEDY, messages=messages, extra_body={"session_id": "colours"})
        usage = reply.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        if held:
            checks.that(cached == held - 1, "with session_id a turn finds all but the last token",
                        cached, usage.prompt_tokens)  # fmt: skip
        held = usage.prompt_tokens + usage.completion_tokens
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})


def check_tools(client: openai.OpenAI, checks: Checks) -> None:
    """Calls that are asked for: whole, streamed, parsed, and their result sent back."""
    tool = openai.pydantic_function_tool(Forecast, name="forecast")
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 200, "messages": ASK, "tools": [tool], "tool_choice": "required"}
    reply = client.chat.completions.create(**asked).choices[0]
    (call, *_) = reply.message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    checks.that(reply.finish_reason == "tool_calls" and set(arguments) == {"city", "days"}, "a call is made", arguments)
    with client.chat.completions.stream(**asked) as stream:
        deltas = sum(event.type == "tool_calls.function.arguments.delta" for event in stream)
        final = stream.get_final_completion().choices[0]
    (streamed, *_) = final.message.tool_calls or []
    same = (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    checks.that(same and deltas > 1, "streamed it is the same call", f"{deltas} deltas")
    parsed = client.chat.completions.parse(**asked).choices[0].message.tool_calls or []
    checks.that(isinstance(parsed[0].function.parsed_arguments, Forecast), "parse() gives its arguments' class")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answer = client.chat.completions.create(
        **asked | {"messages": [*ASK, reply.message, result], "tool_choice": "none"}
    ).choices[0]
    checks.that(bool(answer.message.content) and not answer.message.tool_calls, "its result is answered with text")


def cached(response: Any) -> int:
    """Input tokens of a response whose KV was there."""
    return int(response.usage.input_tokens_details.cached_tokens)


def history(response: Any) -> int:
    """Tokens up to the end of a response."""
    return int(response.usage.input_tokens + response.usage.output_tokens)


def check_responses(client: openai.OpenAI, checks: Checks) -> None:
    """A chain, a fork, a stream, what is kept and what is not."""
    root = client.responses.create(**RESPONSE, input="Name a river in Europe.")
    left = client.responses.create(**RESPONSE, input="Where is it?", previous_response_id=root.id)
    right = client.responses.create(**RESPONSE, input="Another one?", previous_response_id=root.id)
    further = client.responses.create(**RESPONSE, input="How long is it?", previous_response_id=left.id)
    for claim, child, parent in (("a chain", left, root), ("a fork", right, root), ("the other branch", further, left)):
        checks.that(cached(child) == history(parent) - 1, f"{claim} finds all but the last token",
                    cached(child), child.usage.input_tokens)  # fmt: skip
    again = client.responses.create(**RESPONSE, input="Where is it?", previous_response_id=root.id)
    checks.that(again.output_text == left.output_text, "asked again from there, the same is said")
    with client.responses.stream(**RESPONSE, input="Where is it?", previous_response_id=root.id) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    checks.that(deltas == final.output_text == left.output_text, "streamed, too")
    checks.that(cached(final) == history(root) - 1, "and from the same KV", cached(final))
    kept = client.responses.retrieve(left.id)
    items = list(client.responses.input_items.list(left.id))
    checks.that(kept.output_text == left.output_text and bool(items), "it can be retrieved, with what it was asked")
    later = client.responses.create(**RESPONSE, input="Hello!", background=True)
    deadline_s = time.monotonic() + BACKGROUND_S_MAX
    while later.status in ("queued", "in_progress") and time.monotonic() < deadline_s:
        time.sleep(0.02)
        later = client.responses.retrieve(later.id)
    checks.that(later.status in ("completed", "incomplete"), "one in the background comes to its end", later.status)
    unkept = client.responses.create(**RESPONSE, input="Hello!", store=False)
    for response in (root, left, right, further, again, final, later):
        client.responses.delete(response.id)
    for claim, gone in (("store: false leaves nothing", unkept), ("delete deletes", left)):
        try:
            client.responses.retrieve(gone.id)
            checks.that(False, claim)
        except openai.NotFoundError:
            checks.that(True, claim)


def check_response_tools(client: openai.OpenAI, checks: Checks) -> None:
    """Functions in responses: a call whole and streamed, its output by what is kept, and by what is sent again."""
    tool: dict[str, Any] = {
        "type": "function", "name": "forecast", "description": "Tell the weather", "strict": True,
        "parameters": {**Forecast.model_json_schema(), "additionalProperties": False},
    }  # fmt: skip
    asked: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200, "tools": [tool], "parallel_tool_calls": False}
    demanded: dict[str, Any] = {**asked, "input": "How is the weather?", "tool_choice": "required"}
    first = client.responses.create(**demanded)
    call: Any = first.output[-1]
    arguments = json.loads(call.arguments)
    checks.that(call.type == "function_call" and set(arguments) == {"city", "days"}, "a response calls", arguments)
    with client.responses.stream(**demanded) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed: Any = stream.get_final_response().output[-1]
    checks.that("".join(deltas) == streamed.arguments == call.arguments and len(deltas) > 1, "streamed it is the same",
                f"{len(deltas)} deltas")  # fmt: skip
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    told: dict[str, Any] = {**RESPONSE, "tools": [tool]}
    after = client.responses.create(**told, input=[output], previous_response_id=first.id)
    beside = client.responses.create(**told, input=[{**output, "output": "sun"}], previous_response_id=first.id)
    for claim, response in (("its output finds", after), ("another output, side by side, finds", beside)):
        checks.that(cached(response) == history(first) - 1, f"{claim} all but the last token",
                    cached(response), response.usage.input_tokens if response.usage else 0)  # fmt: skip
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}, call, output]
    resent = client.responses.create(**told, input=items, store=False)
    checks.that(bool(resent.output), "with store: false all is sent again, and answered", resent.output[-1].type)
    conversation = client.conversations.create()
    made = client.responses.create(**demanded, conversation=conversation.id)
    own: Any = made.output[-1]
    result = {**output, "call_id": own.call_id}
    done = client.responses.create(**told, input=[result], conversation=conversation.id)
    checks.that(cached(done) == history(made) - 1, "in a conversation, too", cached(done))
    listed = [item.type for item in client.conversations.items.list(conversation.id, order="asc")]
    checks.that(listed[:3] == ["message", "function_call", "function_call_output"], "which lists call and output")
    client.conversations.delete(conversation.id)
    refused: dict[str, dict[str, Any]] = {
        "input[0].call_id": {"input": [{**output, "call_id": "none"}]},
        "tools.0.type": {"input": "x", "tools": [{"type": "web_search"}]},
    }
    for param, wrong in refused.items():
        try:
            client.responses.create(**RESPONSE, **wrong)
            checks.that(False, f"{param} is refused")
        except openai.BadRequestError as error:
            checks.that(error.param == param, "what nobody called, and another's tool, is refused by name", param)


def check_response_forms(client: openai.OpenAI, checks: Checks) -> None:
    """Output in a form that is asked for, a choice among tools, and items named instead of sent again."""
    asked: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200}
    parsed = client.responses.parse(**asked, input="How is the weather in Rome?", text_format=Forecast)
    checks.that(isinstance(parsed.output_parsed, Forecast), "parse() of a response gives the model's class",
                parsed.output_text)  # fmt: skip
    wanted, other = ({**openai.pydantic_function_tool(Forecast, name=name)["function"], "type": "function"}
                     for name in ("forecast", "record"))  # fmt: skip
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "forecast"}]}
    made: Any = client.responses.create(
        **asked, input="How is the weather?", tools=[other, wanted], tool_choice=allowed, parallel_tool_calls=False,
    )  # fmt: skip
    call = made.output[-1]
    checks.that(call.name == "forecast", "of two tools the one that is allowed is called", call.name)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    told: dict[str, Any] = {**RESPONSE, "tools": [other, wanted], "store": False}
    sent = client.responses.create(**told, input=[*items, call, output])
    named = client.responses.create(**told, input=[*items, {"type": "item_reference", "id": call.id}, output])
    checks.that(named.output_text == sent.output_text, "an item that is named is the item that was said")


def check_conversations(client: openai.OpenAI, checks: Checks) -> None:
    """A conversation and its items."""
    conversation = client.conversations.create(metadata={"topic": "greetings"})
    first = client.responses.create(**RESPONSE, input="Hello!", conversation=conversation.id)
    second = client.responses.create(**RESPONSE, input="Who are you?", conversation=conversation.id)
    checks.that(cached(second) == history(first) - 1, "a conversation's turn finds all but the last token",
                cached(second), second.usage.input_tokens if second.usage else 0)  # fmt: skip
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    checks.that([item.role for item in items] == ["user", "assistant"] * 2, "it has four items")
    found = client.conversations.retrieve(conversation.id)
    checks.that(found.metadata == {"topic": "greetings"}, "and its metadata")
    checks.that(client.conversations.delete(conversation.id).deleted, "it is deleted")


async def check_concurrent(url: str, checks: Checks) -> None:
    """The client that awaits: many at a time, whole and streamed."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def whole(number: int) -> str:
            reply = await client.completions.create(**GREEDY, prompt=f"{number}. {PROMPT}")
            return reply.choices[0].text

        async def streamed(number: int) -> str:
            chunks = await client.completions.create(**GREEDY, prompt=f"{number}. {PROMPT}", stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        wholes = await asyncio.gather(*map(whole, range(CONCURRENT)))
        streams = await asyncio.gather(*map(streamed, range(CONCURRENT)))
        checks.that(wholes == streams, f"{CONCURRENT} side by side say streamed what they say whole")
        async with client.chat.completions.stream(**GREEDY, messages=ASK) as stream:
            kinds = [event.type async for event in stream]
        checks.that("content.done" in kinds, "the stream helper works awaited")
        root = await client.responses.create(**RESPONSE, input="Name a river in Europe.")
        branches = await asyncio.gather(
            *(client.responses.create(**RESPONSE, input=text, previous_response_id=root.id) for text in "abcd")
        )
        found = [cached(branch) for branch in branches]
        checks.that(found == [history(root) - 1] * 4, "four responses side by side go on from one", *found)


def main() -> int:
    """Everything, in turn."""
    checks = Checks("openai")
    url = url_given() + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for check in (
            check_models_and_errors, check_completions, check_chat, check_tools, check_responses, check_response_tools,
            check_response_forms, check_conversations,
        ):  # fmt: skip
            check(client, checks)
    asyncio.run(check_concurrent(url, checks))
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
