"""Anthropic's own client against a server: `python scripts/clients/anthropic_sdk.py http://127.0.0.1:30000`."""

import asyncio
import sys
from typing import Any

import anthropic
from checks import MODEL, Checks, url_given
from pydantic import BaseModel

ASK: list[Any] = [{"role": "user", "content": "Name a river in Europe."}]
SAYS: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "forecast",
    "description": "Tell the weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CONCURRENT = 8
PAGE_TOKENS = 32
"""What is found in the cache are whole pages, and never the last token."""


class River(BaseModel):
    """A river"""

    name: str
    length_km: int


def text_of(message: Any) -> str:
    """What a message says."""
    return "".join(block.text for block in message.content if block.type == "text")


def check_messages(client: anthropic.Anthropic, checks: Checks) -> None:
    """Whole, streamed by hand and by the helper, counted, cached, begun, stopped."""
    system = [{"type": "text", "text": "You know rivers. " * 20, "cache_control": {"type": "ephemeral"}}]
    asked: dict[str, Any] = {"messages": ASK, "system": system}
    counted = client.messages.count_tokens(model=MODEL, **asked).input_tokens
    whole = client.messages.create(**SAYS, **asked)
    usage = whole.usage
    found = usage.cache_read_input_tokens or 0
    checks.that(usage.input_tokens + found == counted, "count_tokens counts what is then used", counted)
    again = client.messages.create(**SAYS, **asked)
    found = again.usage.cache_read_input_tokens or 0
    checks.that(found >= counted - PAGE_TOKENS, "sent again, its prompt is read from the cache", found)
    checks.that(text_of(again) == text_of(whole), "and says the same", repr(text_of(whole)))
    events = list(client.messages.create(**SAYS, **asked, stream=True))
    checks.that([events[0].type, events[-1].type] == ["message_start", "message_stop"], "a stream begins and ends")
    with client.messages.stream(**SAYS, **asked) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    checks.that(said == text_of(final) == text_of(whole), "the stream helper adds up to the same")
    checks.that((final.stop_reason, final.usage.output_tokens) == ("max_tokens", 24), "with its reason and its usage")
    begun = client.messages.create(**SAYS, messages=[*ASK, {"role": "assistant", "content": "The Danube"}])
    checks.that(not text_of(begun).startswith("The Danube"), "an answer that is begun is gone on with", text_of(begun))
    stopped = client.messages.create(**SAYS, messages=ASK, stop_sequences=[" "])
    checks.that((stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " "), "a stop sequence is named")


def check_tools(client: anthropic.Anthropic, checks: Checks) -> None:
    """A call, whole and streamed, and its result sent back; an answer in a form."""
    asked: dict[str, Any] = {**SAYS, "max_tokens": 200, "tools": [TOOL], "tool_choice": {"type": "any"}}
    message = client.messages.create(**asked, messages=ASK)
    (call, *_) = [block for block in message.content if block.type == "tool_use"]
    checks.that(message.stop_reason == "tool_use" and set(call.input) == {"city", "days"}, "a call is made", call.input)
    with client.messages.stream(**asked, messages=ASK) as stream:
        deltas = sum(event.type == "input_json" for event in stream)
        final = stream.get_final_message()
    (streamed, *_) = [block for block in final.content if block.type == "tool_use"]
    checks.that(streamed.input == call.input and deltas > 1, "streamed it is the same call", f"{deltas} deltas")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain", "is_error": False}
    turns = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**asked | {"tool_choice": {"type": "none"}}, messages=turns)
    checks.that(bool(text_of(answer)), "its result is answered with text")
    parsed = client.messages.parse(**SAYS | {"max_tokens": 200}, messages=ASK, output_format=River)
    checks.that(isinstance(parsed.parsed_output, River), "parse() gives the model's class", parsed.parsed_output)


def check_errors(client: anthropic.Anthropic, checks: Checks) -> None:
    """Refusals are the client's own errors and name the field."""
    try:
        client.messages.create(model="claude", max_tokens=4, messages=ASK)
    except anthropic.NotFoundError as error:
        checks.that("model" in error.message, "another model is a NotFoundError")
    for field, value in (("max_tokens", -1), ("messages", [])):
        try:
            client.messages.create(**{**SAYS, "messages": ASK, field: value})
        except anthropic.BadRequestError as error:
            named = str(error.body["error"]["message"]).startswith(field) if isinstance(error.body, dict) else False
            checks.that(named, f"a bad {field} is a BadRequestError with its name")


async def check_concurrent(url: str, checks: Checks) -> None:
    """The client that awaits: many at a time, whole and streamed."""
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:

        def turn(number: int) -> list[Any]:
            return [{"role": "user", "content": f"Name {number + 2} rivers."}]

        async def streamed(number: int) -> str:
            async with client.messages.stream(**SAYS, messages=turn(number)) as stream:
                return "".join([text async for text in stream.text_stream])

        wholes = await asyncio.gather(
            *(client.messages.create(**SAYS, messages=turn(number)) for number in range(CONCURRENT))
        )
        streams = await asyncio.gather(*map(streamed, range(CONCURRENT)))
        checks.that([text_of(message) for message in wholes] == streams,
                    f"{CONCURRENT} side by side say streamed what they say whole")  # fmt: skip


def main() -> int:
    """Everything, in turn."""
    checks = Checks("anthropic")
    url = url_given()
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        check_messages(client, checks)
        check_tools(client, checks)
        check_errors(client, checks)
    asyncio.run(check_concurrent(url, checks))
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
